"""MODULE:FUNCTION on the command line."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

_FORM = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def is_reference(text: str) -> bool:
    """Whether the text has the form MODULE:FUNCTION."""
    return _FORM.fullmatch(text) is not None


def load(text: str, error: type[Exception]) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names; the current folder is searched, too.

    Raises `error` with a remedy when the module or the function is not there, or when importing it fails.
    """
    module_name, _, name = text.partition(":")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as e:
        raise error(f"{text}: module {module_name!r} can't be imported ({type(e).__name__}: {e}); "
                    "run in its folder or install it") from e
    finally:
        if added:
            sys.path.remove(here)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise error(f"{text}: module {module_name!r} has no function {name!r}; check the name behind the colon")
    return found  # type: ignore[no-any-return]
