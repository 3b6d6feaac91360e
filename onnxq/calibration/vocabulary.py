"""A tokenizer.json, read by the package `tokenizers`, which not everybody has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from onnxq.errors import DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def load_tokenizer(path: Path, what: str, remedy: str) -> Tokenizer:
    """The tokenizer that `what` needs. Raises DataError for a lack of the package, a missing file (with a `remedy`) and
    one that can't be read."""
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"{what} needs the package tokenizers ({error}); pip install 'onnxq[text]'") from None
    if not path.is_file():
        raise DataError(f"there is no tokenizer {path}; {remedy}")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises plain Exception
        raise DataError(f"tokenizer {path} can't be read ({error}); give the tokenizer.json that came with the model"
                        ) from error
