"""Write docs/*.md from --help, docstrings and the shipped recipes: python docs/generate.py [--check].

Nothing in these pages is written by hand, so nothing in them can be out of date; a test runs --check.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import inspect
import sys
from pathlib import Path

import click

import onnxq
from onnxq import errors, presets, recipe, schemes
from onnxq.aiming import facts
from onnxq.cli import cli
from onnxq.passes.canonicalize import canonicalize
from onnxq.passes.lower import lower
from onnxq.passes.pack import pack
from onnxq.passes.quantize import quantize
from onnxq.passes.transform import transform
from onnxq.passes.transform.prune import Prune
from onnxq.passes.transform.smooth import Smooth
from onnxq.report.targets import fact_rows
from onnxq.sparsity import Sparsity
from onnxq.targets import TARGETS

FOLDER = Path(__file__).resolve().parent
WIDTH = 100


def command_line() -> str:
    """Help of the group and of each command, as click prints it."""
    parts = ["# Command line", _help(cli, "onnxq")]
    for name, command in cli.commands.items():
        parts += [f"## onnxq {name}", _help(command, f"onnxq {name}")]
    return "\n\n".join(parts)


def _help(command: click.Command, name: str) -> str:
    context = click.Context(command, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    return f"```text\n{command.get_help(context)}\n```"


def python() -> str:
    """The public names with their signatures and docstrings."""
    parts = ["# Python", inspect.getdoc(onnxq) or ""]
    for name in onnxq.__all__:
        item = getattr(onnxq, name)
        if not callable(item):
            continue
        parts.append(f"## onnxq.{name}")
        if not inspect.isclass(item):
            signature = inspect.signature(item)
            lines = [f"    {str(p).replace(chr(39), '')}," for p in signature.parameters.values()]
            first = next(i for i, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY)
            lines.insert(first, "    *,")
            result = str(signature.return_annotation)
            parts.append("\n".join(["```python", f"onnxq.{name}(", *lines, f") -> {result}", "```"]))
        parts.append(inspect.getdoc(item) or "")
        if dataclasses.is_dataclass(item):
            parts.append(_fields(item))
    return "\n\n".join(parts)


def _fields(kind: type) -> str:
    rows = ["| field | type |", "|---|---|"]
    rows += [f"| {f.name} | {str(f.type).replace('|', chr(92) + '|')} |" for f in dataclasses.fields(kind)]
    return "\n".join(rows)


def passes() -> str:
    """Every pass in its order, by stage."""
    stages = {"canonicalize": canonicalize(), "transform": [Prune(), Smooth(), *transform()], "quantize": quantize(),
              "lower": lower("qoperator"), "pack": pack()}
    parts = ["# Passes", "In the order in which they run. `--dump DIR --dump-after NAME` writes the graph behind one."]
    for stage, members in stages.items():
        parts.append(f"## {stage}")
        for member in members:
            module = type(member).__module__.replace(".", "/") + ".py"
            parts += [f"### {member.name}", f"`{member}` in `{module}`", inspect.getdoc(type(member)) or ""]
    return "\n\n".join(parts)


def recipes() -> str:
    """The recipe's dataclasses and the schemes that ship."""
    parts = ["# Recipes and schemes", (inspect.getdoc(recipe) or ""), "## A full recipe, as --print-recipe shows it",
             f"```yaml\n{recipe.Recipe(schemes.scheme('w8a8')).to_yaml()}```"]
    for kind in (recipe.Recipe, schemes.Scheme, schemes.TensorSpec, recipe.Rule, recipe.Match, recipe.Layers,
                 recipe.Calibration, recipe.Preprocessing, recipe.Fallback, recipe.BudgetSpec, recipe.Bits,
                 Sparsity):
        parts += [f"## {kind.__name__}", inspect.getdoc(kind) or "", _fields(kind)]
    for name in schemes.scheme_names():
        parts += [f"## Scheme {name}", f"```yaml\n{schemes.scheme_text(name)}```"]
    for name in presets.preset_names():
        parts += [f"## Preset {name}", f"```yaml\n{presets.text(name)}```"]
    return "\n\n".join(parts)


def targets() -> str:
    """What each target file states."""
    parts = ["# Targets"]
    for name, target in TARGETS.items():
        found = facts(target)
        about = inspect.getdoc(importlib.import_module(f"onnxq.targets.{name.replace('-', '_')}")) or ""
        rows = ["| fact | |", "|---|---|", *(f"| {what} | {said} |" for what, said in fact_rows(found))]
        kernels = ["| operator | result | kernel |", "|---|---|---|", *(
            f"| {k['operator']} | {k['result']} | {k['kernel']} |" for k in found["kernels"])]
        parts += [f"## {name}", about, "\n".join(rows), *(["\n".join(kernels)] if found["kernels"] else [])]
    return "\n\n".join(parts)


def error_kinds() -> str:
    """Exceptions and exit statuses."""
    kinds = [k for _, k in inspect.getmembers(errors, inspect.isclass) if issubclass(k, errors.OnnxqError)]
    rows = ["| exception | exit status | meaning |", "|---|---|---|"]
    rows += [f"| {k.__name__} | {k.exit_code} | {' '.join((inspect.getdoc(k) or '').split())} |" for k in kinds]
    return "\n\n".join(["# Errors", inspect.getdoc(errors) or "", "\n".join(rows)])


PAGES = {"cli.md": command_line, "python.md": python, "passes.md": passes, "recipes.md": recipes,
         "targets.md": targets, "errors.md": error_kinds}


def main() -> int:
    """Write the pages, or with --check say which are out of date; 1 when any is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    check = parser.parse_args().check
    stale = []
    for name, build in PAGES.items():
        text = build().rstrip() + "\n"
        path = FOLDER / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if not check:
            path.write_text(text, encoding="utf-8")
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run python docs/generate.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
