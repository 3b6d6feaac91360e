import numpy as np
import pytest
from onnx import TensorProto, helper

from onnxq.errors import UsageError
from onnxq.numerics import dtypes


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda dtype: dtype.name)
def test_range_follows_from_width_and_sign(dtype):
    assert dtype.qmax - dtype.qmin == 2**dtype.bits - 1
    assert dtype.qmin == (-(2 ** (dtype.bits - 1)) if dtype.signed else 0)
    assert dtype.signed == (not dtype.name.startswith("u"))


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda dtype: dtype.name)
def test_storage_is_the_smallest_that_holds_the_codes(dtype):
    kind = "int" if dtype.signed else "uint"
    holding = [
        np.dtype(f"{kind}{bits}")
        for bits in (8, 16, 32, 64)
        if np.iinfo(f"{kind}{bits}").min <= dtype.qmin and dtype.qmax <= np.iinfo(f"{kind}{bits}").max
    ]
    assert dtype.storage == holding[0]


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda dtype: dtype.name)
def test_names_are_those_of_onnx(dtype):
    onnx_type = helper.tensor_dtype_to_np_dtype(TensorProto.DataType.Value(dtype.name.upper()))
    assert onnx_type.name == dtype.name


@pytest.mark.parametrize("dtype", dtypes.ALL, ids=lambda dtype: dtype.name)
def test_by_name(dtype):
    assert dtypes.by_name(dtype.name) is dtype


def test_by_name_lists_the_known_names():
    with pytest.raises(UsageError, match=r"unknown data type 'int3'; use one of int2, uint2, int4, .*int32"):
        dtypes.by_name("int3")
