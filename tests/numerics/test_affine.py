from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from onnxq.numerics.affine import QuantParams, choose, dequantize, quantize
from onnxq.numerics.dtypes import INT4, INT8, INT16, INT32, UINT4, UINT8, UINT16

FLOAT32 = np.finfo(np.float32)
SMALL_TYPES = [INT4, UINT4, INT8, UINT8, INT16, UINT16]
MODERATE = st.floats(-1e4, 1e4, width=32)

no_deadline = settings(deadline=None)
any_small_type = st.sampled_from(SMALL_TYPES)


def tensors(max_dims=3):
    return hnp.arrays(np.float32, hnp.array_shapes(min_dims=1, max_dims=max_dims, max_side=6), elements=MODERATE)


def reference(op_type, x, params, opset):
    """The output of a one-node model under onnx.reference."""
    onnx_type = TensorProto.DataType.Value(params.dtype.name.upper())
    attributes = {} if params.axis is None else {"axis": params.axis}
    if params.block_size is not None:
        attributes["block_size"] = params.block_size
    node = helper.make_node(op_type, ["x", "scale", "zero_point"], ["y"], **attributes)
    x_type, y_type = (TensorProto.FLOAT, onnx_type) if op_type == "QuantizeLinear" else (onnx_type, TensorProto.FLOAT)
    inputs = [
        helper.make_tensor_value_info("x", x_type, None),
        helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("zero_point", onnx_type, None),
    ]
    graph = helper.make_graph([node], "one", inputs, [helper.make_tensor_value_info("y", y_type, None)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    code_type = helper.tensor_dtype_to_np_dtype(onnx_type)
    feed = {
        "x": x if op_type == "QuantizeLinear" else x.astype(code_type),
        "scale": params.scale,
        "zero_point": params.zero_point.astype(code_type),
    }
    return ReferenceEvaluator(model).run(None, feed)[0]


def assert_as_reference(x, params, opset):
    codes = quantize(x, params)
    expected = reference("QuantizeLinear", x, params, opset)
    assert codes.dtype == params.dtype.storage
    assert codes.shape == x.shape
    np.testing.assert_array_equal(codes, expected.astype(params.dtype.storage))
    values = dequantize(codes, params)
    expected = reference("DequantizeLinear", codes, params, opset)
    assert values.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


# Half of the range of x, so that saturation occurs.
def half_range(x, dtype, symmetric, axis=None):
    others = None if axis is None else tuple(i for i in range(x.ndim) if i != axis)
    return choose(x.min(axis=others) / 2, x.max(axis=others).clip(0) / 2 + 1, dtype, symmetric, axis)


@no_deadline
@given(tensors(), st.sampled_from([INT8, UINT8]), st.booleans(), st.sampled_from([19, 21]))
def test_per_tensor_is_bit_exact_with_onnx_reference(x, dtype, symmetric, opset):
    assert_as_reference(x, half_range(np.minimum(x, x.max() / 2), dtype, symmetric), opset)


@no_deadline
@given(tensors(), st.data(), st.sampled_from([INT8, UINT8]), st.booleans(), st.sampled_from([19, 21]))
def test_per_channel_is_bit_exact_with_onnx_reference(x, data, dtype, symmetric, opset):
    axis = data.draw(st.integers(0, x.ndim - 1))
    assert_as_reference(x, half_range(np.minimum(x, 0), dtype, symmetric, axis), opset)


@no_deadline
@given(tensors(), st.sampled_from([INT4, UINT4, INT16, UINT16]), st.booleans())
def test_the_other_widths_are_bit_exact_with_onnx_reference(x, dtype, symmetric):
    assert_as_reference(x, half_range(np.minimum(x, 0), dtype, symmetric), 21)


@no_deadline
@given(tensors(), st.data(), any_small_type, st.integers(1, 5))
def test_blocks_are_bit_exact_with_onnx_reference(x, data, dtype, block_size):
    axis = data.draw(st.integers(0, x.ndim - 1))
    shape = list(x.shape)
    shape[axis] = -(-shape[axis] // block_size)
    low = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(-100, 0, width=32)))
    high = data.draw(hnp.arrays(np.float32, shape, elements=st.floats(0.5, 100, width=32)))
    params = replace(choose(low, high, dtype, axis=axis), block_size=block_size)
    if params.scale.size > 1:  # onnx.reference takes one element for a scale per tensor and then refuses its block_size
        assert_as_reference(x, params, 21)


def test_blocks_by_hand():
    x = np.array([[1, 2, 30], [-4, 5, 60]], dtype=np.float32)
    scale = np.array([[1, 10], [0.5, 20]], dtype=np.float32)
    params = QuantParams(scale, np.array([[0, 1], [2, 0]], dtype=np.int8), INT8, axis=1, block_size=2)
    codes = quantize(x, params)
    np.testing.assert_array_equal(codes, [[1, 2, 4], [-6, 12, 3]])
    np.testing.assert_array_equal(dequantize(codes, params), x)


def test_rounds_half_to_even_and_saturates():
    params = QuantParams(np.float32(2).reshape(()), np.uint8(10).reshape(()), UINT8)
    x = np.array([-1, 1, 3, 5, 7, -1000, 1000, -np.inf, np.inf, 3e38], dtype=np.float32)
    np.testing.assert_array_equal(quantize(x, params), [10, 10, 12, 12, 14, 0, 255, 0, 255, 255])


def test_a_quotient_beyond_float32_saturates():
    params = choose(0.0, 1e-36, UINT8)
    np.testing.assert_array_equal(quantize(np.array([3e38, -3e38], dtype=np.float32), params), [255, 0])


def test_scalar_empty_and_strided_tensors():
    params = choose(-1.0, 1.0, INT8, symmetric=True)
    assert quantize(np.float32(1.0), params).shape == ()
    assert quantize(np.float32(1.0), params) == 127
    assert quantize(np.zeros((0, 3), np.float32), params).shape == (0, 3)
    x = np.linspace(-1, 1, 24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_array_equal(quantize(x.T[::2], params), quantize(x, params).T[::2])


def test_quantize_and_dequantize_leave_their_arguments_alone():
    x = np.linspace(-3, 5, 12, dtype=np.float32).reshape(3, 4)
    params = choose(x.min(axis=1), x.max(axis=1), UINT8, axis=0)
    before = x.copy()
    codes = quantize(x, params)
    kept = codes.copy()
    dequantize(codes, params)
    np.testing.assert_array_equal(x, before)
    np.testing.assert_array_equal(codes, kept)


def test_int32_codes_keep_all_their_bits():
    params = QuantParams(np.float32(1).reshape(()), np.int32(0).reshape(()), INT32)
    x = np.array([2**24 + 2, -(2**31), 2.0**31, 3e9], dtype=np.float32)
    np.testing.assert_array_equal(quantize(x, params), [2**24 + 2, -(2**31), 2**31 - 1, 2**31 - 1])
    odd = QuantParams(np.float32(1).reshape(()), np.int32(1).reshape(()), INT32)
    np.testing.assert_array_equal(quantize(x, odd), [2**24 + 3, -(2**31) + 1, 2**31 - 1, 2**31 - 1])
    # The difference 2**24 is exact although neither code is a float32.
    codes = np.array([2**24 + 1 + 2**30], dtype=np.int32)
    shifted = QuantParams(np.float32(0.5).reshape(()), np.int32(2**30 + 1).reshape(()), INT32)
    np.testing.assert_array_equal(dequantize(codes, shifted), [2.0**23])


def test_nan_is_refused_even_beside_infinities():
    params = choose(-1.0, 1.0, INT8)
    with pytest.raises(ValueError, match="holds NaN"):
        quantize(np.array([np.inf, np.nan, -np.inf], dtype=np.float32), params)


@no_deadline
@given(tensors(), any_small_type, st.booleans())
def test_error_is_at_most_half_a_step_and_zero_is_exact(x, dtype, symmetric):
    params = choose(x.min(), x.max(), dtype, symmetric)
    step = float(params.scale)
    error = np.abs(dequantize(quantize(x, params), params).astype(np.float64) - x)
    # The outermost value lies half a step further out when the zero point was rounded; float32 rounds x / scale and
    # the product, each to one part in 2**24 of at most 2**bits steps.
    rounding = 2.0 ** (dtype.bits - 22)
    assert error.max() <= step * (0.5 + rounding + (0.0 if symmetric else 0.5))
    inside = (quantize(x, params) > dtype.qmin) & (quantize(x, params) < dtype.qmax)
    assert error[inside].max(initial=0.0) <= step * (0.5 + rounding)
    zero = np.zeros(1, np.float32)
    assert dequantize(quantize(zero, params), params)[0] == 0.0


@no_deadline
@given(MODERATE, MODERATE, any_small_type)
def test_asymmetric_choice(a, b, dtype):
    low, high = min(a, b, 0.0), max(a, b, 0.0)
    params = choose(min(a, b), max(a, b), dtype)
    if low == high:
        assert params.scale == 1.0
    else:
        expected = max((high - low) / (dtype.qmax - dtype.qmin), FLOAT32.tiny)
        assert params.scale == pytest.approx(expected, rel=2.0**-24)
    zero_point = np.clip(round(dtype.qmin - low / float(params.scale)), dtype.qmin, dtype.qmax)
    assert params.zero_point == zero_point
    assert params.scale.shape == params.zero_point.shape == ()


@no_deadline
@given(tensors(1), any_small_type)
def test_symmetric_choice_never_uses_the_code_without_a_mirror_image(x, dtype):
    params = choose(x.min(), x.max(), dtype, symmetric=True)
    middle = 0 if dtype.signed else 2 ** (dtype.bits - 1)
    assert params.zero_point == middle
    codes = quantize(x, params).astype(np.int64) - middle
    assert np.abs(codes).max() <= 2 ** (dtype.bits - 1) - 1
    np.testing.assert_array_equal(quantize(-x, params).astype(np.int64) - middle, -codes)


@no_deadline
@given(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([*SMALL_TYPES, INT32]),
    st.booleans(),
)
def test_scale_is_always_a_normal_float32(a, b, dtype, symmetric):
    params = choose(min(a, b), max(a, b), dtype, symmetric)
    assert params.scale.dtype == np.float32
    assert FLOAT32.tiny <= params.scale <= FLOAT32.max
    assert np.isfinite(np.float32(1) / params.scale)
    assert dtype.qmin <= params.zero_point <= dtype.qmax


def test_bounds_beyond_float32_get_the_largest_scale():
    assert choose(-1e300, 1e300, INT8).scale == FLOAT32.max


@pytest.mark.parametrize("symmetric", [False, True])
def test_channel_choice_equals_the_scalar_choices(symmetric):
    low = np.array([-3.0, 0.0, 1.0, -2.0], dtype=np.float32)
    high = np.array([1.0, 0.0, 7.0, -1.0], dtype=np.float32)
    params = choose(low, high, UINT8, symmetric, axis=1)
    assert params.axis == 1
    for i in range(4):
        one = choose(low[i], high[i], UINT8, symmetric)
        assert (params.scale[i], params.zero_point[i]) == (one.scale, one.zero_point)
    assert params.scale[1] == 1.0


@pytest.mark.parametrize("bounds", [(np.nan, 1.0), (0.0, np.inf), (-np.inf, 0.0), ([0.0, 0.0], [1.0, np.nan])])
def test_choose_refuses_bounds_that_are_not_finite(bounds):
    with pytest.raises(ValueError, match="NaN or infinite"):
        choose(*bounds, INT8)


def test_choose_refuses_a_minimum_above_the_maximum():
    with pytest.raises(ValueError, match="minimum above its maximum"):
        choose(2.0, 1.0, INT8)


def test_shapes_that_do_not_fit_are_refused():
    scale, zero = np.ones(3, np.float32), np.zeros(3, np.int8)
    x = np.ones((2, 4), np.float32)
    with pytest.raises(ValueError, match=r"\[3\].*\[2, 4\] along axis 1.*need the shape \[4\]"):
        quantize(x, QuantParams(scale, zero, INT8, axis=1))
    with pytest.raises(ValueError, match="no axis"):
        quantize(x, QuantParams(scale, zero, INT8))
    with pytest.raises(ValueError, match="axis 2 does not exist"):
        quantize(x, QuantParams(scale, zero, INT8, axis=2))
    with pytest.raises(ValueError, match=r"need the shape \[2, 2\]"):
        quantize(x, QuantParams(np.ones((2, 3), np.float32), np.zeros((2, 3), np.int8), INT8, axis=1, block_size=2))


def test_parameters_of_wrong_dtypes_or_shapes_are_refused():
    with pytest.raises(ValueError, match="convert them to float32 and int8"):
        QuantParams(np.ones(3), np.zeros(3, np.int8), INT8, axis=0)
    with pytest.raises(ValueError, match="convert them to float32 and uint8"):
        QuantParams(np.ones(3, np.float32), np.zeros(3, np.int8), UINT8, axis=0)
    with pytest.raises(ValueError, match="same shape"):
        QuantParams(np.ones(3, np.float32), np.zeros(1, np.int8), INT8, axis=0)


def test_one_element_of_any_rank_is_per_tensor():
    params = QuantParams(np.full(1, 0.5, np.float32), np.ones(1, np.int8), INT8)
    np.testing.assert_array_equal(quantize(np.ones((2, 2), np.float32), params), np.full((2, 2), 3))


def test_negative_axis():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    scale, zero = np.array([1, 2, 4], np.float32), np.zeros(3, np.int8)
    last, negative = QuantParams(scale, zero, INT8, axis=1), QuantParams(scale, zero, INT8, axis=-1)
    np.testing.assert_array_equal(quantize(x, negative), quantize(x, last))
