"""The section `sparsity` of a recipe: how many weights become 0, and which."""

from __future__ import annotations

from dataclasses import dataclass

from onnxq.errors import RecipeError
from onnxq.numerics.sparsity import Pattern, Wanted

SPARSEGPT, WANDA, MAGNITUDE = "sparsegpt", "wanda", "magnitude"
PRUNINGS = (SPARSEGPT, WANDA, MAGNITUDE)
UNIFORM, BUDGET = "uniform", "budget"


@dataclass(frozen=True)
class Sparsity:
    """Weights of linear layers and convolutions that become 0. Those whose results are the model's outputs are spared.

    share: of zeros in each weight, such as 50% (None or 0: that of the pattern, or nothing is pruned). pattern: N:M,
    such as 2:4: of every M inputs in a row N stay, for each output; M divides the inputs of a layer or the channels of
    a convolution, or it is spared. method: sparsegpt (what costs the results least, the other weights making up for
    it), wanda (the smallest weights times the size of their inputs) or magnitude (the smallest weights, without data).
    shares: uniform (each weight has the same share of zeros) or budget (all together have it: each gets up to 15 points
    more or less, by what its zeros cost the layer's result). embeddings: whether tables of embeddings are pruned, too,
    by magnitude. channels: the share, such as 25%, of the channels between two layers that are taken out with all that
    makes and reads them, the rest making up for them; heads: that of the heads of each attention.
    """

    share: str | None = None
    method: str = SPARSEGPT
    pattern: str | None = None
    shares: str = UNIFORM
    embeddings: bool = False
    channels: str | None = None
    heads: str | None = None

    def __post_init__(self) -> None:
        """Raises RecipeError naming the key that can't be used."""
        if self.method not in PRUNINGS:
            raise RecipeError(f"sparsity.method: {self.method!r} is not known; use {', '.join(PRUNINGS)}")
        _ = self.channels_share, self.heads_share
        if self.shares not in (UNIFORM, BUDGET):
            raise RecipeError(f"sparsity.shares: {self.shares!r} is not known; use {UNIFORM} or {BUDGET}")
        if self.shares == BUDGET and (self.pattern is not None or self.method == MAGNITUDE):
            raise RecipeError("sparsity.shares: a budget needs a share, not a pattern, and sparsegpt or wanda, which "
                              f"look at what zeros cost; leave it {UNIFORM}, or change these")
        share = _share(self.share) if self.share is not None else 0.0
        if self.pattern is None:
            return
        try:
            pattern = Pattern.parse(self.pattern)
        except ValueError as e:
            raise RecipeError(f"sparsity.pattern: {e}") from None
        if share and abs(share - pattern.share) > 1e-9:
            raise RecipeError(f"sparsity.share: {self.share} is not what the pattern {pattern} makes, "
                              f"{pattern.share:.4g}; leave one of the two out")

    @property
    def wanted(self) -> Wanted | None:
        """The share of zeros in each weight, or the pattern; None where nothing is pruned."""
        if self.pattern is not None:
            return Pattern.parse(self.pattern)
        return (_share(self.share) or None) if self.share is not None else None

    @property
    def channels_share(self) -> float:
        """The share of channels that are taken out; 0 for none."""
        return _share(self.channels, "channels") if self.channels is not None else 0.0

    @property
    def heads_share(self) -> float:
        """The share of heads that are taken out; 0 for none."""
        return _share(self.heads, "heads") if self.heads is not None else 0.0

    @property
    def needs_data(self) -> bool:
        """Whether the method looks at what layers read."""
        return self.wanted is not None and self.method != MAGNITUDE


def _share(text: str, key: str = "share") -> float:
    """0.5 of '50%' or '0.5'. Raises RecipeError."""
    try:
        found = float(text.strip().removesuffix("%")) / (100 if text.strip().endswith("%") else 1)
    except ValueError:
        found = -1.0
    if not 0 <= found < 1:
        raise RecipeError(f"sparsity.{key}: {text!r} is no share of {'zeros' if key == 'share' else key}; write e.g. "
                          "50% or 0.5")
    return found


DENSE = Sparsity()  # nothing is pruned
