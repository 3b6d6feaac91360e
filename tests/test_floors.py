"""The floors: who may import what, read from the source; and that files and functions stay readable."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import onnxq

ROOT = Path(onnxq.__file__).parent
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 50
STANDARD = frozenset(sys.stdlib_module_names)

# libraries that one room alone may import
OWNERS = {"onnx": "graph", "onnx_graphsurgeon": "graph", "google": "graph", "onnxruntime": "runtime",
          "click": "cli", "rich": "report"}
# what a room may import of the others, errors and its own apart; None: rooms that may use everything below the CLI
ROOMS: dict[str, set[str] | None] = {
    "errors": set(),
    "ports": set(),
    "language": {"ports"},
    "version": set(),
    "plain": set(),
    "plugins": set(),
    "progress": set(),
    "sizes": set(),
    "spool": set(),
    "numerics": set(),
    "targets": set(),
    "schemes": {"numerics", "plain"},
    "sparsity": {"numerics"},
    "bits": {"schemes", "sizes"},
    "recipe": {"bits", "plain", "schemes", "sizes", "sparsity"},
    "presets": {"recipe", "schemes"},
    "graph": {"numerics", "ports"},
    "plan": {"numerics"},
    "passes": {"graph", "numerics", "plan", "recipe", "schemes", "spool", "targets"},
    "runtime": {"graph", "numerics", "plan", "ports", "recipe", "schemes", "targets", "plugins"},
    "calibration": {"graph", "language", "numerics", "ports", "recipe", "schemes", "runtime", "plugins"},
    "planner": {"calibration", "graph", "language", "numerics", "passes", "plain", "plan", "ports", "progress",
                "recipe", "runtime", "schemes", "sizes", "sparsity", "spool", "targets", "version"},
}
TOPS = {"cli", "__main__"}  # nobody imports these


def sources() -> list[Path]:
    """The modules; a program that is copied into what is exported is none."""
    return sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT / "exporting" / "smoke")


def where(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room(path: Path) -> str:
    """`graph` for graph/load.py, `errors` for errors.py."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, full name) of every import in a file, inside functions too; relative ones by a leading dot."""
    found = []
    for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(item, ast.Import):
            found += [(item.lineno, alias.name) for alias in item.names]
        elif isinstance(item, ast.ImportFrom):
            module = "." * item.level + (item.module or "")
            # `from onnxq import numerics` imports onnxq.numerics
            found += [(item.lineno, f"{module}.{a.name}" if module == "onnxq" else module) for a in item.names]
    return sorted(set(found))


def offenders(allowed: dict[str, set[str] | None]) -> list[str]:
    wrong = []
    for path in sources():
        here = room(path)
        for line, name in imports(path):
            parts = name.split(".")
            if parts[0] != "onnxq" or len(parts) == 1:
                continue
            there, may = parts[1], allowed.get(here)
            if may is not None and there not in {here, "errors", *may}:
                wrong.append(f"{where(path)}:{line} imports {name}")
    return wrong


def test_rooms_import_only_what_stands_below() -> None:
    assert offenders(ROOMS) == []


def test_every_room_is_known() -> None:
    """A new room has to be given its floor here."""
    above = {"__init__", "aiming", "analysis", "bench", "compiler", "explanation", "exporting", "generation",
             "inspection", "notices", "packing", "placement", "planning", "proof", "report", "request", "search",
             "settling", "streaming", "sweep", "verification", "verifier", *TOPS}
    assert {room(p) for p in sources()} <= {*ROOMS, *above}


def test_nobody_imports_the_command_line() -> None:
    wrong = [f"{where(path)}:{line}" for path in sources() for line, name in imports(path)
             if name.split(".")[:2] in [["onnxq", top] for top in TOPS] and room(path) not in TOPS]
    assert wrong == []


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_have_one_importer(library: str) -> None:
    wrong = [f"{where(path)}:{line} imports {name}" for path in sources() for line, name in imports(path)
             if name.split(".")[0] == library and room(path) != OWNERS[library]]
    assert wrong == []


def test_numerics_is_numpy_alone() -> None:
    known = {*STANDARD, "numpy", "onnxq"}
    wrong = [f"{where(path)}:{line} imports {name}" for path in sources() if room(path) in ("numerics", "targets")
             for line, name in imports(path) if name.split(".")[0] not in known]
    assert wrong == []


def test_targets_are_data() -> None:
    wrong = [f"{where(path)}:{line} imports {name}" for path in sources() if room(path) == "targets"
             for line, name in imports(path)
             if name.split(".")[0] not in ("__future__", "dataclasses") and not name.startswith("onnxq.targets")]
    assert wrong == []


def test_heavy_libraries_are_nowhere() -> None:
    wrong = [f"{where(path)}:{line} imports {name}" for path in sources() for line, name in imports(path)
             if name.split(".")[0] in ("torch", "tensorflow", "transformers", "requests", "pandas", "scipy")]
    assert wrong == []


def test_imports_are_absolute() -> None:
    assert [f"{where(p)}:{line}" for p in sources() for line, name in imports(p) if name.startswith(".")] == []


def test_files_are_short() -> None:
    sizes = {where(p): len(p.read_text(encoding="utf-8").splitlines()) for p in sources()}
    assert {name: lines for name, lines in sizes.items() if lines > MOST_LINES} == {}


def test_functions_are_short() -> None:
    long = {}
    for path in sources():
        for item in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.end_lineno is not None:
                lines = item.end_lineno - item.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    long[f"{where(path)}:{item.lineno} {item.name}"] = lines
    assert long == {}


def test_the_reader_of_imports_reads_all_forms(tmp_path: Path) -> None:
    """The checks above are worth what `imports` finds."""
    (tmp_path / "m.py").write_text(
        "import onnx.helper as h, numpy\nfrom onnxq import numerics, graph\nfrom onnxq.plan import Plan\n"
        "def f():\n    from . import x\n    if True:\n        import google.protobuf\n")
    assert imports(tmp_path / "m.py") == [
        (1, "numpy"), (1, "onnx.helper"), (2, "onnxq.graph"), (2, "onnxq.numerics"), (3, "onnxq.plan"), (5, "."),
        (7, "google.protobuf")]
