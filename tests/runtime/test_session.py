"""Sessions: what they return, and that everything that can go wrong is an onnxq error with a remedy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxq.errors import DataError, ModelError, RuntimeUnavailable, UsageError
from onnxq.runtime.session import CPU, Port, Session, SessionOptions

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)


def model_bytes(
    nodes: Sequence[Any], inputs: Sequence[Any], outputs: Sequence[Any], weights: Sequence[Any] = ()
) -> bytes:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return model.SerializeToString()


def value(name: str, shape: Sequence[int | str | None] | None, dtype: int = TensorProto.FLOAT) -> Any:
    return helper.make_tensor_value_info(name, dtype, shape)


def linear() -> bytes:
    """y = x @ w; s = the sum of y. x is [n, 3]."""
    return model_bytes(
        [
            helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul"),
            helper.make_node("ReduceSum", ["y"], ["s"], name="sum", keepdims=0),
        ],
        [value("x", ["n", 3])],
        [value("y", ["n", 4]), value("s", [])],
        [numpy_helper.from_array(WEIGHT, "w")],
    )


def identity(dtype: int, shape: Sequence[int | str | None] | None) -> bytes:
    return model_bytes(
        [helper.make_node("Identity", ["x"], ["y"])], [value("x", shape, dtype)], [value("y", shape, dtype)]
    )


def test_run_computes_every_output_by_name() -> None:
    x = np.array([[1, -2, 3], [0.5, 0, 4]], np.float32)
    got = Session(linear()).run({"x": x})
    assert list(got) == ["y", "s"]
    np.testing.assert_allclose(got["y"], x @ WEIGHT, rtol=1e-6)
    np.testing.assert_allclose(got["s"], (x @ WEIGHT).sum(), rtol=1e-6)


def test_run_returns_only_the_outputs_asked_for_in_that_order() -> None:
    session = Session(linear())
    x = np.ones((1, 3), np.float32)
    assert list(session.run({"x": x}, ["s", "y"])) == ["s", "y"]
    assert list(session.run({"x": x}, ["s"])) == ["s"]
    assert session.run({"x": x}, []) == {}
    with pytest.raises(UsageError, match=r"no output 'z'; ask for some of 'y', 's'"):
        session.run({"x": x}, ["z"])


def test_a_path_and_a_pathlike_load_as_well(tmp_path: Path) -> None:
    path = tmp_path / "linear.onnx"
    path.write_bytes(linear())
    x = np.ones((1, 3), np.float32)
    for model in (path, str(path)):
        np.testing.assert_array_equal(Session(model).run({"x": x})["y"], x @ WEIGHT)


def test_ports_have_names_dtypes_and_shapes() -> None:
    session = Session(linear())
    assert session.inputs == [Port("x", np.dtype(np.float32), ("n", 3))]
    assert session.outputs == [Port("y", np.dtype(np.float32), ("n", 4)), Port("s", np.dtype(np.float32), ())]
    assert session.providers == [CPU]
    unnamed = Session(identity(TensorProto.INT64, ["n", None, 2])).inputs[0]
    assert unnamed.shape == ("n", None, 2)
    assert str(unnamed) == "int64 [n, ?, 2]"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (TensorProto.FLOAT16, np.float16),
        (TensorProto.DOUBLE, np.float64),
        (TensorProto.UINT8, np.uint8),
        (TensorProto.INT8, np.int8),
        (TensorProto.BOOL, np.bool_),
        (TensorProto.STRING, np.object_),
    ],
)
def test_port_dtypes_run_there_and_back(dtype: int, expected: type) -> None:
    session = Session(identity(dtype, ["n"]))
    assert session.inputs[0].dtype == np.dtype(expected)
    x = np.array(["a", "bc"]) if expected is np.object_ else np.array([0, 1]).astype(expected)
    got = session.run({"x": x})["y"]
    assert got.tolist() == x.tolist()
    assert got.dtype == np.dtype(expected)


def test_bfloat16_is_fed_and_given_as_float32() -> None:
    """Rounded to nearest even at 8 bits: 1 + 2**-8 is halfway and goes to 1, 1 + 3 * 2**-8 to 1 + 2**-6."""
    session = Session(identity(TensorProto.BFLOAT16, ["n"]))
    assert session.inputs == [Port("x", np.dtype(np.float32), ("n",), bfloat16=True)]
    assert str(session.inputs[0]) == "bfloat16 [n]"
    x = np.array([1.5, 1 + 2**-8, 1 + 3 * 2**-8, -np.inf], np.float32)
    got = session.run({"x": x})["y"]
    assert got.dtype == np.float32
    assert got.tolist() == [1.5, 1, 1 + 2**-6, -np.inf]
    assert session.run({"x": x[:0]})["y"].shape == (0,)
    session.runner({"x": x})()
    with pytest.raises(DataError, match=r"given float16 \[1\] but wants bfloat16 \[n\]; cast it with .*'float32'"):
        session.run({"x": np.ones(1, np.float16)})


def test_bfloat16_beside_other_types() -> None:
    model = model_bytes(
        [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("Identity", ["i"], ["j"])],
        [value("x", [2], TensorProto.BFLOAT16), value("i", [2, 1], TensorProto.INT64)],
        [value("y", [2], TensorProto.BFLOAT16), value("j", [2, 1], TensorProto.INT64)],
    )
    got = Session(model).run({"x": np.array([1, 2], np.float32), "i": np.array([[3], [4]])}, ["j", "y"])
    assert {k: v.tolist() for k, v in got.items()} == {"j": [[3], [4]], "y": [1, 2]}


def test_what_numpy_has_no_type_for_has_no_dtype() -> None:
    cast = helper.make_graph([helper.make_node("Cast", ["x"], ["y"], to=1)], "g",
                             [value("x", [2], TensorProto.FLOAT8E5M2)], [value("y", [2])])
    float8 = helper.make_model(cast, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)
    assert Session(float8.SerializeToString()).inputs[0].dtype is None
    sequence = model_bytes(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [value("x", [2])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )
    assert Session(sequence).outputs[0].dtype is None


def test_an_array_out_of_order_is_made_contiguous() -> None:
    x = np.arange(12, dtype=np.float32).reshape(3, 4).T[::2]
    assert not x.flags.c_contiguous
    np.testing.assert_array_equal(Session(linear()).run({"x": x})["y"], x @ WEIGHT)


def test_a_scalar_stays_a_scalar() -> None:
    got = Session(identity(TensorProto.INT64, [])).run({"x": np.array(7)})["y"]
    assert got.shape == ()
    assert got == 7


@pytest.mark.parametrize(
    ("feed", "message"),
    [
        ({}, r"input 'x' of .* is missing from the feed; add it as float32 \[n, 3\]"),
        (
            {"x": np.zeros((2, 3), np.float32), "mask": np.zeros(1)},
            r"no input 'mask'; leave it out, the inputs are 'x'",
        ),
        ({"x": np.zeros((2, 3))}, r"'x' was given float64 \[2, 3\] but wants float32 \[n, 3\]; cast it with .astype"),
        ({"x": np.zeros((2, 3), ">f4")}, r"'x' was given byte-swapped float32 \[2, 3\] but wants float32"),
        (
            {"x": np.zeros(3, np.float32)},
            r"'x' was given float32 \[3\] but wants float32 \[n, 3\]; reshape it to rank 2",
        ),
        (
            {"x": np.zeros((2, 5), np.float32)},
            r"'x' was given float32 \[2, 5\] but wants float32 \[n, 3\]; .* or crop it",
        ),
    ],
)
def test_a_feed_that_does_not_fit_is_named(feed: dict[str, Any], message: str) -> None:
    session = Session(linear())
    with pytest.raises(DataError, match=message):
        session.run(feed)
    with pytest.raises(DataError, match=message):
        session.runner(feed)


def test_a_failing_run_is_a_model_error(capfd: pytest.CaptureFixture[str]) -> None:
    product = model_bytes(
        [helper.make_node("MatMul", ["x", "z"], ["y"], name="mm")],
        [value("x", ["a", "b"]), value("z", ["c", "d"])],
        [value("y", None)],
    )
    with pytest.raises(ModelError, match=r"failed in a run of the model in memory.* running MatMul node. Name:'mm'"):
        Session(product).run({"x": np.zeros((2, 3), np.float32), "z": np.zeros((4, 3), np.float32)})
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", [b"", b"not a model", linear()[: len(linear()) // 2]])
def test_a_model_that_does_not_load(content: bytes, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(content)
    for model, label in ((path, "broken.onnx"), (content, r"the model in memory \(\d+ bytes\)")):
        with pytest.raises(ModelError, match=rf"^onnxruntime can't load .*{label}: ") as caught:
            Session(model, profile_prefix=str(tmp_path / "profile"))
        assert "\n" not in str(caught.value)
        assert "[ONNXRuntimeError]" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_missing_file_and_an_empty_path_are_model_errors(tmp_path: Path) -> None:
    for path in (tmp_path / "nothing.onnx", ""):
        with pytest.raises(ModelError, match="check the path"):
            Session(path)


def test_warnings_of_onnxruntime_are_not_printed(capfd: pytest.CaptureFixture[str]) -> None:
    wrong_shape = model_bytes([helper.make_node("Identity", ["x"], ["y"])], [value("x", None)], [value("y", [])])
    Session(wrong_shape).run({"x": np.zeros(3, np.float32)})  # warns that the shape is not as declared
    assert capfd.readouterr() == ("", "")


def test_a_provider_that_this_onnxruntime_lacks() -> None:
    with pytest.raises(RuntimeUnavailable, match=r"has no CANNExecutionProvider.*pip install onnxruntime-cann"):
        Session(linear(), SessionOptions(provider="CANNExecutionProvider"))
    with pytest.raises(RuntimeUnavailable, match=r"has no cpu, .*'CPUExecutionProvider'.*check the name"):
        Session(linear(), SessionOptions(provider="cpu"))


def _pretend_cuda(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider", CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", make)


def test_a_silent_fall_back_to_the_cpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = onnxruntime.InferenceSession
    asked: list[Any] = []

    def make(model: bytes, options: Any, providers: list[str], **rest: Any) -> Any:
        asked.append(providers)
        return real(model, options, providers=[CPU], **rest)

    _pretend_cuda(monkeypatch, make)
    with pytest.raises(RuntimeUnavailable, match=f"CUDAExecutionProvider did not load .* {CPU}; .*onnxruntime-gpu"):
        Session(linear(), SessionOptions(provider="CUDAExecutionProvider"))
    assert asked == [["CUDAExecutionProvider", CPU]]


def test_a_provider_that_throws_as_it_starts_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(*_: Any, **rest: Any) -> Any:
        assert rest["enable_fallback"] == 0
        raise RuntimeError("/src/provider.cc:7 void start(const Options&) CUDA failure 35: driver too old\nat line 7")

    _pretend_cuda(monkeypatch, make)
    with pytest.raises(RuntimeUnavailable, match=r"did not start: CUDA failure 35: driver too old; to use it, pip"):
        Session(linear(), SessionOptions(provider="CUDAExecutionProvider"))


def test_a_negative_number_of_threads_is_refused() -> None:
    with pytest.raises(UsageError, match="threads is -1; give 0"):
        SessionOptions(threads=-1)


def _saved_ops(tmp_path: Path, options: SessionOptions) -> list[str]:
    saved = tmp_path / "saved.onnx"
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="matmul"),
        helper.make_node("Add", ["m", "b"], ["y"], name="add"),
    ]
    weights = [
        numpy_helper.from_array(np.ones((3, 400), np.float32), "w"),
        numpy_helper.from_array(np.ones(400, np.float32), "b"),
    ]
    Session(
        model_bytes(nodes, [value("x", [2, 3])], [value("y", [2, 400])], weights), options, optimized_path=str(saved)
    )
    assert (tmp_path / "saved.onnx.data").stat().st_size >= 4800
    return [node.op_type for node in onnx.load(saved, load_external_data=False).graph.node]


def test_the_optimized_graph_is_saved_with_its_weights_beside_it(tmp_path: Path) -> None:
    assert _saved_ops(tmp_path, SessionOptions()) == ["Gemm"]


def test_optimize_and_config_reach_onnxruntime(tmp_path: Path) -> None:
    assert _saved_ops(tmp_path, SessionOptions(optimize=False)) == ["MatMul", "Add"]
    config = (("optimization.disable_specified_optimizers", "MatMulAddFusion"),)
    assert _saved_ops(tmp_path, SessionOptions(config=config)) == ["MatMul", "Add"]


def test_a_profile_is_written_where_it_was_asked_for(tmp_path: Path) -> None:
    session = Session(linear(), profile_prefix=str(tmp_path / "run"))
    session.run({"x": np.ones((1, 3), np.float32)})
    path = Path(session.end_profiling())
    assert path.parent == tmp_path
    assert path.name.startswith("run")
    assert any(event["name"] == "matmul_kernel_time" for event in json.loads(path.read_text()))


def test_end_profiling_without_a_profile_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="profile_prefix"):
        Session(linear()).end_profiling()
    session = Session(linear(), profile_prefix=str(tmp_path / "run"))
    session.end_profiling()
    with pytest.raises(UsageError, match="profile_prefix"):
        session.end_profiling()
