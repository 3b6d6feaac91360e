"""Lines and tables as text for a terminal or a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_FILE_WIDTH = 200  # where there is no terminal, only tables of very long names are folded


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Plain columns; cells are text and never markup, and fold rather than vanish."""
    made = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold")
    for title in titles:
        made.add_column(title, overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made


def line(console: Console, said: str = "", style: str = "") -> None:
    """One line, folded nowhere."""
    console.print(Text(said, style=style), soft_wrap=True)


def text(draw: Callable[[Console], None], err: bool = False) -> str:
    """What `draw` prints, with colours if the stream that it goes to shows them (rich heeds NO_COLOR)."""
    stream = sys.stderr if err else sys.stdout
    seen = stream.isatty()
    # into a buffer: writing, and what can go wrong with it, is the command line's
    buffer = io.StringIO()
    draw(Console(file=buffer, force_terminal=seen, legacy_windows=False,
                 width=Console(file=stream).width if seen else _FILE_WIDTH))
    # rich pads a table's last column
    return "\n".join(row.rstrip() for row in buffer.getvalue().rstrip("\n").split("\n"))
