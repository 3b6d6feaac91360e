"""The section `bits` of a recipe: formats of weights within a budget."""

from __future__ import annotations

import math
from dataclasses import dataclass

from onnxq import sizes
from onnxq.errors import RecipeError, UsageError
from onnxq.schemes import BLOCK_SIZES, weight_only_names


@dataclass(frozen=True)
class Bits:
    """Formats chosen for each weight, so that all of them fit a budget at the least damage.

    target: bits per weight of those in blocks, as they are stored: codes, scales and zero points. max_size: of the
    whole file, such as 40MB. Without either every weight has the scheme's format. choices: weight-only schemes to
    choose among (none: the recipe's own and the named ones of more bits); block_sizes: with which blocks each.
    What a rule names keeps the rule's scheme. Of w8a8-sparse, widths of codes are chosen instead.
    """

    target: float | None = None
    max_size: str | None = None
    choices: tuple[str, ...] = ()
    block_sizes: tuple[int, ...] = (32, 64, 128)

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        if self.target is not None and not 0 < self.target < math.inf:
            raise RecipeError(f"bits.target: {self.target:g} bits hold no weight; give a number above 0, such as 4.5")
        check_size("bits.max_size", self.max_size)
        for k, name in enumerate(self.choices):
            if name not in weight_only_names():
                raise RecipeError(f"bits.choices[{k}]: {name!r} is no scheme of weights in blocks; use some of "
                                  f"{', '.join(weight_only_names())}")
        for k, size in enumerate(self.block_sizes):
            if size not in BLOCK_SIZES:
                raise RecipeError(f"bits.block_sizes[{k}]: {size} has no kernel here; use some of "
                                  f"{', '.join(map(str, BLOCK_SIZES))}")
        if not self.block_sizes:
            raise RecipeError("bits.block_sizes: empty; name at least one, such as 32")

    @property
    def are_chosen(self) -> bool:
        """Whether there is a budget to choose by."""
        return self.target is not None or self.max_size is not None

    @property
    def most_bytes(self) -> int | None:
        """Those of the whole file, if they are limited."""
        return sizes.parse(self.max_size) if self.max_size is not None else None


def check_size(key: str, text: str | None) -> int | None:
    """Bytes that the text of a key says, None where it has none. Raises RecipeError naming the key."""
    try:
        return None if text is None else sizes.parse(text)
    except UsageError as e:
        raise RecipeError(f"{key}: {e}") from None


ALIKE = Bits()  # all weights have the scheme's format
