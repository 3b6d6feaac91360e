"""onnxq cache."""

from __future__ import annotations

import click

from onnxq.cli.options import debug_option, json_option
from onnxq.cli.output import print_json, print_text
from onnxq.errors import OutputError
from onnxq.report import terminal, wording


@click.command("cache", short_help="Show or clear the kernel times that were measured on this machine.")
@click.option("--kernels", is_flag=True, help="List each kernel with its candidates' times, too.")
@click.option("--clear", is_flag=True, help="Remove the times, so that they are measured again.")
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS",
              help="With --clear: only files that nothing was added to for so many days.")
@json_option
@debug_option
def show_cache(kernels: bool, clear: bool, older_than: float | None, as_json: bool) -> None:
    """Show the kernel times that compilations measured on this machine: a file for every processor, onnxruntime, number
    of threads and session options. A compilation measures what it finds no time for, and only that.

    \b
    Examples:
      onnxq cache
      onnxq cache --kernels
      onnxq cache --clear --older-than 30
    """
    from onnxq.runtime import timings

    if older_than is not None and not clear:
        raise click.UsageError("--older-than needs --clear; onnxq cache alone shows each file's age.")
    if kernels and clear:
        raise click.UsageError("--kernels and --clear exclude each other; list the kernels first.")
    folder = timings.default_folder()
    if not clear:
        found = {"folder": str(folder), "files": [stored.to_dict(kernels) for stored in timings.listed(folder)]}
        print_json(found) if as_json else print_text(terminal.cache(found))
        return
    try:
        removed = timings.clear(folder, older_than or 0.0)
    except OSError as e:
        raise OutputError(f"kernel times in {folder} can't be removed ({e.strerror}); make that folder writable, or "
                          "remove it as its owner") from None
    if as_json:
        print_json({"folder": str(folder), "removed": [str(path) for path in removed]})
    else:
        print_text(terminal.line(f"removed {wording.plural(len(removed), 'file')} from {folder}"))
