"""A quantizing compiler for ONNX models that measures what it makes.

`compile` makes a quantized model and a Report, `analyze` tells which layers int8 hurts most, `verify` compares any
compiled model with its float original, `bench` times one model or two, `inspect` tells what is in one and `explain` the
story of one node; a `Recipe` says what to do, a `Plan` what was decided. Nothing else here is public.
"""

from onnxq.analysis import analyze
from onnxq.bench import bench
from onnxq.compiler import compile
from onnxq.explanation.explain import explain
from onnxq.inspection import inspect
from onnxq.plan import Plan
from onnxq.recipe import Recipe
from onnxq.report.report import Report
from onnxq.verifier import verify
from onnxq.version import VERSION as __version__

__all__ = ["Plan", "Recipe", "Report", "__version__", "analyze", "bench", "compile", "explain", "inspect", "verify"]
