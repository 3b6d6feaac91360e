"""Which onnxruntime runs what: python -m benchmarks.runtimes PYTHON [PYTHON ...]

Each PYTHON is the interpreter of an environment with its own onnxruntime. Every operator, type and opset that onnxq
writes is tried there in a model of one node; the table says from which version on it loads, runs and gives the result
that the onnxruntime of this environment gives. `onnxq.targets.runtimes` holds what came of it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

MS = "com.microsoft"
CLOSE = 0.05  # of float results, about 1: some versions round what they multiply to int8, others do not
RUN = """
import json, sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.log_severity_level = 4
found = {"version": ort.__version__}
for path in sys.argv[2:]:
    try:
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        feed = {k: v for k, v in np.load(sys.argv[1]).items() if k in {i.name for i in session.get_inputs()}}
        made = session.run(None, feed)[0]
        found[path] = np.asarray(made, np.float64).ravel()[:4096].tolist()
    except Exception as e:
        found[path] = str(e).splitlines()[0][:200]
print(json.dumps(found))
"""


def feeds() -> dict[str, Any]:
    """What the probes read, by name."""
    draw = np.random.default_rng(0)
    return {"x": draw.normal(size=(2, 4, 64)).astype(np.float32), "image": draw.normal(size=(1, 8, 6, 6)).astype(
        np.float32), "q": draw.integers(0, 256, (1, 8, 6, 6)).astype(np.uint8), "q2": draw.integers(
        0, 256, (2, 4, 64)).astype(np.uint8), "i": np.arange(8, dtype=np.int64).reshape(2, 4),
        "steps": draw.normal(size=(5, 2, 16)).astype(np.float32),
        "heads": draw.normal(size=(1, 2, 4, 16)).astype(np.float32), "positions": np.arange(4, dtype=np.int64)[None]}


KINDS = {"x": (TensorProto.FLOAT, (2, 4, 64)), "image": (TensorProto.FLOAT, (1, 8, 6, 6)),
         "q": (TensorProto.UINT8, (1, 8, 6, 6)), "q2": (TensorProto.UINT8, (2, 4, 64)),
         "i": (TensorProto.INT64, (2, 4)), "steps": (TensorProto.FLOAT, (5, 2, 16)),
         "heads": (TensorProto.FLOAT, (1, 2, 4, 16)), "positions": (TensorProto.INT64, (1, 4))}


def probe(op: str, inputs: list[str], constants: dict[str, Any], made: int, domain: str = "", opset: int = 13,
          ir: int = 8, **attributes: Any) -> onnx.ModelProto:
    """A model of one node; what is no constant is read by name."""
    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    ports = [helper.make_tensor_value_info(n, *KINDS[n]) for n in dict.fromkeys(inputs) if n in KINDS]
    stored = [v if isinstance(v, TensorProto) else numpy_helper.from_array(np.asarray(v), n)
              for n, v in constants.items()]
    graph = helper.make_graph([node], "probe", ports, [helper.make_tensor_value_info("y", made, None)], stored)
    imports = [helper.make_opsetid("", opset)] + ([helper.make_opsetid(domain, 1)] if domain else [])
    return helper.make_model(graph, opset_imports=imports, ir_version=ir)


def _linear() -> dict[str, onnx.ModelProto]:
    draw = np.random.default_rng(1)
    weight = draw.integers(-64, 64, (64, 32)).astype(np.int8)
    scale, zero, one, mid = np.full(32, .01, np.float32), np.zeros(32, np.int8), np.float32(.02), np.uint8(128)
    bias = np.zeros(32, np.float32)
    shared = {"w": weight, "s": scale, "wz": zero, "xs": one, "xz": mid, "b": bias, "b32": bias.astype(np.int32),
              "ys": np.float32(.5), "yz": mid, "w4": draw.integers(-64, 64, (16, 8, 1, 1)).astype(np.int8),
              "s4": np.full(16, .01, np.float32), "z4": np.zeros(16, np.int8)}

    def some(*names: str) -> dict[str, Any]:
        return {n: shared[n] for n in names if n in shared}

    def one_of(op: str, made: int, *inputs: str, **more: Any) -> onnx.ModelProto:
        return probe(op, list(inputs), some(*inputs), made, **more)

    flat = probe("QGemm", ["a", *["xs", "xz", "w", "s", "wz", "b32"]],
                 {"a": draw.integers(0, 256, (3, 64)).astype(np.uint8), **some(*["xs", "xz", "w", "s", "wz", "b32"])},
                 TensorProto.FLOAT, MS)
    return {
        "QLinearMatMul": one_of("QLinearMatMul", TensorProto.UINT8, *["q2", "xs", "xz", "w", "s", "wz", "ys", "yz"]),
        "QLinearConv": one_of("QLinearConv", TensorProto.UINT8, *["q", "xs", "xz", "w4", "s4", "z4", "ys", "yz"]),
        "MatMulIntegerToFloat": one_of("MatMulIntegerToFloat", TensorProto.FLOAT, *["q2", "w", "xs", "s", "xz", "wz",
                                                                               "b"], domain=MS),
        "DynamicQuantizeMatMul": one_of("DynamicQuantizeMatMul", TensorProto.FLOAT, *["x", "w", "s", "wz", "b"],
                                        domain=MS),
        "QGemm": flat,
    }


def _blocks() -> dict[str, onnx.ModelProto]:
    draw, found = np.random.default_rng(2), {}
    for bits in (2, 4, 8):
        for block in (16, 32, 64, 128, 256):
            count, inputs = -(-64 // block), 64
            blobs = draw.integers(0, 256, (32, count, block * bits // 8)).astype(np.uint8)
            found[f"MatMulNBits of {bits} bits, blocks of {block}"] = probe(
                "MatMulNBits", ["x", "blobs", "scales"],
                {"blobs": blobs, "scales": np.full((32, count), .01, np.float32)}, TensorProto.FLOAT, MS,
                K=inputs, N=32, bits=bits, block_size=block, accuracy_level=4)
    blobs, zeros = draw.integers(0, 256, (32, 2, 16)).astype(np.uint8), draw.integers(0, 256, (32, 1)).astype(np.uint8)
    found["MatMulNBits with zero points and a bias"] = probe(
        "MatMulNBits", ["x", "blobs", "scales", "zeros", "", "bias"],
        {"blobs": blobs, "scales": np.full((32, 2), .01, np.float32), "zeros": zeros,
         "bias": draw.normal(size=32).astype(np.float32) * 5}, TensorProto.FLOAT, MS, K=64, N=32, bits=4, block_size=32,
        accuracy_level=4)
    for bits in (4, 8):
        for count in (2, 3):  # blocks in a row
            rows = draw.integers(0, 256, (50, 32 * count * bits // 8)).astype(np.uint8)
            parts = {"rows": rows, "scales": np.full((50, count), .3 if bits == 4 else .02, np.float32)}
            zeros = {"zeros": draw.integers(0, 256, (50, -(-count * bits // 8))).astype(np.uint8)}
            for what, more in (("", {}), (" with zero points", zeros)):
                found[f"GatherBlockQuantized of {bits} bits, {count} blocks{what}"] = probe(
                    "GatherBlockQuantized", ["rows", "i", "scales", *more], parts | more, TensorProto.FLOAT, MS,
                    bits=bits, block_size=32, gather_axis=0, quantize_axis=1)
    for bits, kind, opset, ir in ((4, TensorProto.INT4, 21, 10), (2, TensorProto.INT2, 25, 12)):
        codes = helper.make_tensor("codes", kind, (64, 32), draw.integers(-2, 2, 64 * 32).tolist())
        found[f"DequantizeLinear of blocks of {bits} bits (opset {opset})"] = probe(
            "DequantizeLinear", ["codes", "scales"], {"codes": codes, "scales": np.full((2, 32), .01, np.float32)},
            TensorProto.FLOAT, opset=opset, ir=ir, axis=0, block_size=32)
        found[f"Cast of {bits} bits (opset {opset})"] = probe(
            "Cast", ["codes"], {"codes": codes}, TensorProto.FLOAT, opset=opset, ir=ir, to=TensorProto.FLOAT)
    return found


def _joining() -> dict[str, onnx.ModelProto]:
    pair, half = {"s": np.float32(.02), "z": np.uint8(128)}, {"t": np.float32(.04), "u": np.uint8(100)}
    both, found = {**pair, **half}, {}
    for op in ("QLinearAdd", "QLinearMul"):
        found[op] = probe(op, ["q", "s", "z", "q", "s", "z", "t", "u"], both, TensorProto.UINT8, MS)
    for op, more in (("QLinearSigmoid", {}), ("QLinearLeakyRelu", {"alpha": .1}), ("QLinearGlobalAveragePool", {}),
                     ("QLinearAveragePool", {"kernel_shape": [2, 2]})):
        found[op] = probe(op, ["q", "s", "z", "t", "u"], both, TensorProto.UINT8, MS, **more)
    found["QLinearConcat"] = probe("QLinearConcat", ["t", "u", "q", "s", "z", "q", "s", "z"], both, TensorProto.UINT8,
                                   MS, axis=1)
    return found


def _others() -> dict[str, onnx.ModelProto]:
    draw = np.random.default_rng(3)
    weights = {"w": draw.integers(-64, 64, (1, 16, 64)).astype(np.int8),
               "r": draw.integers(-64, 64, (1, 16, 64)).astype(np.int8), "b": np.zeros((1, 128), np.float32),
               "ws": np.full((1, 64), .01, np.float32), "wz": np.zeros((1, 64), np.int8)}
    lstm = probe("DynamicQuantizeLSTM", ["steps", "w", "r", "b", "", "", "", "", "ws", "wz", "ws", "wz"], weights,
                 TensorProto.FLOAT, MS, hidden_size=16)
    angles = {"cos": np.ones((8, 8), np.float32), "sin": np.zeros((8, 8), np.float32)}
    return {"DynamicQuantizeLSTM": lstm,
            "RotaryEmbedding": probe("RotaryEmbedding", ["heads", "positions", "cos", "sin"], angles,
                                     TensorProto.FLOAT, MS)}


def _codes() -> dict[str, onnx.ModelProto]:
    """Operators of ONNX that move or clamp uint8 codes."""
    made, long = TensorProto.UINT8, np.int64
    return {f"{m.graph.node[0].op_type} of uint8": m for m in (
        probe("Clip", ["q", "low", "high"], {"low": np.uint8(10), "high": np.uint8(200)}, made),
        probe("DepthToSpace", ["q"], {}, made, blocksize=2),
        probe("Expand", ["q", "n"], {"n": np.asarray([2, 8, 6, 6], long)}, made),
        probe("Flatten", ["q"], {}, made),
        probe("Gather", ["q", "n"], {"n": np.asarray([1, 0], long)}, made, axis=1),
        probe("MaxPool", ["q"], {}, made, kernel_shape=[2, 2]),
        probe("Pad", ["q", "n", "v"], {"n": np.asarray([0, 0, 1, 1, 0, 0, 1, 1], long), "v": np.uint8(7)}, made),
        probe("Reshape", ["q", "n"], {"n": np.asarray([1, -1], long)}, made),
        probe("Resize", ["q", "", "f"], {"f": np.asarray([1, 1, 2, 2], np.float32)}, made, mode="nearest"),
        probe("Slice", ["q", "a", "b"], {"a": np.asarray([0], long), "b": np.asarray([1], long)}, made),
        probe("SpaceToDepth", ["q"], {}, made, blocksize=2),
        probe("Squeeze", ["q", "n"], {"n": np.asarray([0], long)}, made),
        probe("Transpose", ["q"], {}, made, perm=[0, 2, 3, 1]),
        probe("Unsqueeze", ["q", "n"], {"n": np.asarray([0], long)}, made),
        probe("Where", ["c", "q", "q"], {"c": np.asarray(True)}, made))}


def _opsets() -> dict[str, onnx.ModelProto]:
    found = {f"opset {n}": probe("Relu", ["x"], {}, TensorProto.FLOAT, opset=n, ir=8) for n in range(13, 28)}
    return found | {f"IR version {n}": probe("Relu", ["x"], {}, TensorProto.FLOAT, ir=n) for n in range(8, 15)}


def probes() -> dict[str, onnx.ModelProto]:
    """Name -> a model that an onnxruntime may or may not run."""
    return {**_linear(), **_blocks(), **_joining(), **_others(), **_codes(), **_opsets()}


def _same(mine: Any, other: Any) -> bool:
    if isinstance(mine, str) or isinstance(other, str) or len(mine) != len(other):
        return False
    return bool(np.allclose(mine, other, rtol=CLOSE, atol=1.0 if np.abs(mine).max() > 5 else CLOSE))


@click.command(help=__doc__)
@click.argument("pythons", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print what each version makes of each probe.")
def main(pythons: tuple[str, ...], as_json: bool) -> None:
    """Try every probe in every environment."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {}
        for k, (name, model) in enumerate(probes().items()):
            paths[name] = str(Path(folder) / f"{k}.onnx")
            onnx.save(model, paths[name])
        np.savez(Path(folder) / "feeds.npz", **feeds())
        command = ["-c", RUN, str(Path(folder) / "feeds.npz"), *paths.values()]
        runs = [json.loads(subprocess.run([python, *command], capture_output=True, text=True, check=True).stdout)
                for python in (*pythons, sys.executable)]
    mine = runs[-1]
    table: dict[str, dict[str, str]] = {}
    for name, path in paths.items():
        table[name] = {run["version"]: "runs" if _same(mine[path], run[path]) else str(run[path])[:90] for run in runs}
    if as_json:
        print(json.dumps(table, indent=1))
        return
    for name, of in table.items():
        bad = [version for version, said in of.items() if said != "runs"]
        said = f"not {', '.join(bad)}" if bad else "all"
        print(f"{name:55} {said}  {of[bad[-1]] if bad else ''}")


if __name__ == "__main__":
    main()
