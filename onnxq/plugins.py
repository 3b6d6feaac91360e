"""MODULE:FUNCTION on the command line."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable
from typing import Any

_FORM = re.compile(r"[^\W\d][\w.]*:[^\W\d][\w.]*")


def is_reference(text: str) -> bool:
    """Whether the text has the form MODULE:FUNCTION."""
    return _FORM.fullmatch(text) is not None


def load(text: str, error: type[Exception]) -> Callable[..., Any]:
    """The function that MODULE:FUNCTION names; the working directory comes first while its module is imported.

    Raises `error` with a remedy when the module or the function is not there, or when importing it fails.
    """
    module_name, _, name = text.partition(":")
    here = os.getcwd()
    importlib.invalidate_caches()  # the module may have been written since the process started
    sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as e:
        raise error(f"module {module_name!r} of {text!r} can't be imported ({type(e).__name__}: {e}); "
                    "run from the folder that holds it, or install it") from e
    finally:
        if here in sys.path:  # the module may have taken it out
            sys.path.remove(here)
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        raise error(f"module {module_name!r} has no function {name!r}; check the name behind the colon")
    return found  # type: ignore[no-any-return]
