"""The command line: parses, calls, prints. Results go to stdout; errors, notices and progress to stderr."""

from onnxq.cli.analyze import analyze_model
from onnxq.cli.cache import show_cache
from onnxq.cli.check import check_model
from onnxq.cli.compile import compile_model
from onnxq.cli.export import export_model
from onnxq.cli.generate import generate_text
from onnxq.cli.group import cli, main
from onnxq.cli.models import bench_models, explain_node, inspect_model, verify_models
from onnxq.cli.pack import pack_model, unpack_model
from onnxq.cli.schemes import list_schemes
from onnxq.cli.sweep import sweep_model
from onnxq.cli.targets import list_targets

for _command in (compile_model, analyze_model, sweep_model, verify_models, bench_models, check_model, pack_model,
                 unpack_model, export_model, generate_text, inspect_model,
                 explain_node, list_schemes, list_targets, show_cache):
    cli.add_command(_command)

__all__ = ["cli", "main"]
