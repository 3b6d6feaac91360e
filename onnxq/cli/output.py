"""Calling the library, and what its results look like on stdout and stderr."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from onnxq.errors import OutputError
from onnxq.report import exported, plot, terminal
from onnxq.report.report import Report

T = TypeVar("T")

STDOUT = "-"  # the name of a file that stands for it
FATE = "onnxq.fate"  # key of click's context: what became of the output


def with_progress(function: Callable[..., T], quiet: bool, *args: Any, **options: Any) -> T:
    """Call into the library; what code of the user's prints meanwhile goes to stderr: stdout is for the result."""
    with contextlib.redirect_stdout(sys.stderr), terminal.progress(quiet) as progress:
        return function(*args, **options, progress=progress)


def show(report: Report, as_json: bool, quiet: bool, last: str, folder: Path | None = None) -> None:
    """Print a report and save it to `folder`; `last` is the last line. Exits with 1 when a check failed."""
    for_people = not (as_json or quiet)
    if for_people:
        print_text(terminal.summary(report, details=str(folder / "report.json") if folder else "--json") + "\n\n")
    if folder is not None:
        report.save(folder)
    if as_json:
        print_json(report.to_dict())
    for notice in report.verdict.notices if not quiet else ():
        say(f"Note: {notice}", "yellow")
    for failure in report.verdict.failures:
        say(f"Failed: {failure}", "red")
    if for_people:
        if folder is not None:
            print_text(terminal.line(f"report in {folder / 'report.html'}"))
        if last:
            print_text(terminal.line(last, "green"))
    elif last and not report.ok:
        say(f"{last} all the same")
    click.get_current_context().exit(0 if report.ok else 1)


def show_export(found: dict[str, Any], as_json: bool, quiet: bool, last: str) -> None:
    """Print what became of an exported folder; `last` is the last line. Exits with 1 when an output is wrong."""
    for_people = not (as_json or quiet)
    if as_json:
        print_json(found)
    elif for_people:
        print_text(exported.text(found))
    for notice in found["notices"] if not quiet else ():
        say(f"Note: {notice}", "yellow")
    for failure in found["failures"]:
        say(f"Failed: {failure}", "red")
    if for_people and last:
        print_text(terminal.line(last, "green"))
    click.get_current_context().exit(0 if found["ok"] else 1)


def check_folder(folder: Path) -> None:
    """Refuse a folder that can't be made or written before minutes of work go into what belongs there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputError(f"the report can't be written to {folder}; choose another --report folder")


def check_file(option: str, path: Path) -> None:
    """Refuse a file that can't be written before minutes of work go into what belongs there."""
    folder = path.absolute().parent
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise OutputError(f"{path} can't be written; name another file for {option}")


def check_files(json_file: str | None, plot_file: str | None) -> None:
    """The same of what --json and --plot name, and refuse a plot of another kind than there are."""
    if plot_file is not None:
        plot.check(Path(plot_file))
    for name, file in (("--plot", plot_file), ("--json", json_file)):
        if file not in (None, STDOUT):
            check_file(name, Path(str(file)))


def show_figures(found: dict[str, Any], shown: Callable[[], str], draw: Callable[[dict[str, Any], str], None],
                 json_file: str | None, plot_file: str | None, quiet: bool) -> None:
    """Print figures as `shown`, or as JSON, and write the files that were asked for; `draw` writes the plot."""
    if json_file == STDOUT:
        print_json(found)
    elif not quiet:
        print_text(shown())
    for notice in found["notices"] if not quiet else ():
        say(f"Note: {notice}", "yellow")
    written = []
    if json_file not in (None, STDOUT):
        try:
            Path(str(json_file)).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        except OSError as e:
            raise OutputError(f"{json_file} can't be written ({e.strerror}); name another file for --json") from None
        written.append(str(json_file))
    if plot_file is not None:
        draw(found, plot_file)
        written.append(plot_file)
    if written and json_file != STDOUT and not quiet:
        print_text(terminal.line(f"wrote {' and '.join(written)}", "green"))


def print_json(data: Any) -> None:
    print_text(json.dumps(data, indent=1))


def print_text(text: str) -> None:
    """Text on stdout, its line end added if it has none."""
    print_piece(text.removesuffix("\n") + "\n")


def print_piece(text: str) -> None:
    """Text on stdout, at once and as it is."""
    try:
        click.echo(text, nl=False, color=True)  # rich has decided on colours
    except BrokenPipeError:
        raise
    except OSError as e:
        forget_output()
        raise OutputError(f"standard output can't be written ({e.strerror}); free some space or send it elsewhere"
                          ) from None


def say(text: str, style: str = "") -> None:
    click.echo(terminal.line(text, style, err=True), err=True, color=True)


def forget_output() -> None:
    """Drop what stdout still holds: Python would try again, and complain, when it ends."""
    with contextlib.suppress(OSError, ValueError):  # a stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
