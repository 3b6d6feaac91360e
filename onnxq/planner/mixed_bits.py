"""Bits and blocks of each weight, chosen so that all fit a size at the least damage.

Source: the sizes of llama.cpp's mixed k-quants, which give the layers that matter more bits by their place in the
model; here it is measured which ones do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from onnxq import sizes
from onnxq.errors import GraphError, UsageError
from onnxq.graph import Graph, raise_opset
from onnxq.numerics.allocation import Option, allocate, least
from onnxq.numerics.dtypes import by_name
from onnxq.passes.pack.codes import OPSETS
from onnxq.planner import bit_costs, weight_only
from onnxq.planner.bit_costs import Costs, Seeing, Weight
from onnxq.planner.outline import Chosen, Outline
from onnxq.planner.rules import named
from onnxq.progress import Progress
from onnxq.recipe import Recipe
from onnxq.schemes import Scheme, TensorSpec, in_blocks, weight_only_names
from onnxq.schemes import scheme as named_scheme
from onnxq.targets import Target


class MixedBits:
    """The formats of one graph's weights under a budget; what was measured of them is known to the next choice."""

    def __init__(self, graph: Graph, found: Outline, recipe: Recipe, target: Target, kernels: bool) -> None:
        """`found` is the outline with the recipe's own formats; `kernels` tells whether any reads blocks as such."""
        self.graph, self.recipe, self.target, self.kernels = graph, recipe, target, kernels
        self.widths: dict[int, int] = {8: 8}  # bits of a code -> those that it takes where it is decoded at load
        self.schemes = options(recipe)
        self.fixed: dict[str, TensorSpec] = {}
        self.weights: list[Weight] = []
        self.costs: Costs | None = None
        self.notice = ""
        ruled = named(graph, recipe)
        formats = tuple(spec for scheme in self.schemes if (spec := scheme.weights) is not None)
        self.readers = {name: tuple(reading) for name, reading in weight_only.readers(graph).items()
                        if name in found.formats}
        for name, reading in self.readers.items():
            if any(node.name in ruled or node.op == "Conv" for _, node in reading):
                self.fixed[name] = found.formats[name]
            else:
                self.weights.append(Weight(name, reading, formats))

    def check(self, refused: Mapping[str, str], file_bytes: int) -> None:
        """Raise UsageError for a budget that can't be met; arguments as for `choose`."""
        items = [[Option(size, 0.0) for size in sizes_of] for sizes_of in self._sizes(refused)]
        self._budget(items, refused, file_bytes)

    def measure(self, by: Seeing | None, progress: Progress) -> None:
        """Find what each format costs each weight."""
        self.costs = bit_costs.measure(self.graph, self.weights, by, progress)

    def choose(self, refused: Mapping[str, str], file_bytes: int) -> dict[str, Chosen]:
        """Node -> the scheme of its weight, for weights that no rule names.

        `refused` are nodes whose weights are decoded instead of read by a kernel; `file_bytes` those of the file with
        the recipe's own formats and `refused`. Raises UsageError for a budget that can't be met.
        """
        assert self.costs is not None
        items = [[Option(size, damage) for size, damage in zip(sizes_of, self.costs.damages[one.name], strict=True)]
                 for one, sizes_of in zip(self.weights, self._sizes(refused), strict=True)]
        budget = self._budget(items, refused, file_bytes)
        taken = allocate(items, budget)
        found: dict[str, Chosen] = {}
        for one, options_of, k in zip(self.weights, items, taken, strict=True):
            chosen = Chosen(self.schemes[k], self._reason(one, options_of, k))
            found |= {node.name: chosen for _, node in one.readers}
        self.notice = self._summary(items, taken, refused)
        return found

    # -------------------------------------------------------------- sizes

    def _sizes(self, refused: Mapping[str, str]) -> list[list[int]]:
        return [[self._bytes(one, spec, refused) for spec in one.formats] for one in self.weights]

    def _bytes(self, weight: Weight, spec: TensorSpec, refused: Mapping[str, str]) -> int:
        """Stored bytes: once for kernels, once for what is decoded, if there are readers of both kinds."""
        forms = {self.kernels and node.name not in refused
                 and weight_only.no_kernel(node, spec, self.target) is None for _, node in weight.readers}
        width = 0 if all(forms) else self._width(by_name(spec.dtype).bits)
        named = self._named(weight, spec, all(forms)) if self.recipe.bits.max_size else 0
        return named + sum(weight_only.stored_bytes(weight.shape, weight.axis, spec, form, 0 if form else width)
                           for form in forms)

    @staticmethod
    def _named(weight: Weight, spec: TensorSpec, kernels: bool) -> int:
        """Bytes of a file that formats differ by beside those of weights: what names zero points, and what cuts off the
        rest of a last block that is decoded."""
        assert spec.block_size is not None
        zeros = 0 if spec.symmetric else 1 if kernels else 4
        cut = 0 if kernels or weight.shape[weight.axis] % spec.block_size == 0 else 8
        return (zeros + cut) * (64 + 3 * len(weight.name))

    def _width(self, bits: int) -> int:
        """Bits that a code takes where it is decoded at load: its own, if the graph can have the opset for that."""
        if bits not in self.widths:
            try:
                raise_opset(self.graph.copy(), OPSETS[bits])
                self.widths[bits] = bits
            except GraphError:
                self.widths[bits] = 8
        return self.widths[bits]

    def _fixed_bytes(self, refused: Mapping[str, str]) -> int:
        return sum(self._bytes(Weight(name, self.readers[name], ()), spec, refused)
                   for name, spec in self.fixed.items())

    def _count(self) -> int:
        """Weights in blocks, those that rules name included."""
        return sum(rows * columns for name in self.readers
                   for rows, columns in [Weight(name, self.readers[name], ()).shape])

    def _budget(self, items: Sequence[Sequence[Option]], refused: Mapping[str, str], file_bytes: int) -> int:
        """Bytes that the weights may take that no rule names."""
        bits, spec, lowest = self.recipe.bits, self.recipe.scheme.weights, least(items)
        assert spec is not None
        budgets = []
        if bits.target is not None:
            fixed = self._fixed_bytes(refused)
            budgets.append(int(bits.target * self._count() / 8) - fixed)
            if budgets[-1] < lowest:
                reached = 8 * (lowest + fixed) / max(self._count(), 1)
                raise UsageError(f"--target-bits {bits.target:g} can't be met: {self._least_by()} reach {reached:.2f} "
                                 "bits per weight; ask for more, or allow fewer bits or larger blocks by bits.choices "
                                 "and bits.block_sizes of a recipe")
        if bits.most_bytes is not None:
            rest = file_bytes - sum(self._bytes(one, spec, refused) for one in self.weights)
            budgets.append(bits.most_bytes - rest)
            if budgets[-1] < lowest:
                raise UsageError(f"--max-size {bits.max_size} can't be met: {self._least_by()} make a file of "
                                 f"{sizes.text(rest + lowest)}; allow that, or fewer bits or larger blocks by "
                                 "bits.choices and bits.block_sizes of a recipe")
        return min(budgets)

    def _least_by(self) -> str:
        return f"the smallest formats, down to {described(min(self._formats(), key=weight_only.bits))},"

    def _formats(self) -> list[TensorSpec]:
        return [scheme.weights for scheme in self.schemes if scheme.weights is not None]

    # -------------------------------------------------------------- words

    def _reason(self, weight: Weight, options_of: Sequence[Option], k: int) -> str:
        assert self.costs is not None
        smallest = min(range(len(options_of)), key=lambda i: (options_of[i].size, options_of[i].damage))
        costs = f"it costs {options_of[k].damage:.2g} {self.costs.unit}"
        if k == smallest:
            return f"chosen within {self._asked()}, where {costs}"
        return (f"chosen within {self._asked()}, where {costs} and {described(weight.formats[smallest])} would "
                f"{options_of[smallest].damage:.2g}")

    def _asked(self) -> str:
        bits = self.recipe.bits
        size = bits.max_size or ""
        return " and ".join(said for said in (f"{bits.target:g} bits per weight" if bits.target is not None else "",
                                              f"{size} bytes" if size.isdecimal() else size) if said)

    def _summary(self, items: Sequence[Sequence[Option]], taken: Sequence[int], refused: Mapping[str, str]) -> str:
        assert self.costs is not None
        counts = Counter(described(one.formats[k]) for one, k in zip(self.weights, taken, strict=True))
        used = sum(options_of[k].size for options_of, k in zip(items, taken, strict=True))
        total = sum(options_of[k].damage for options_of, k in zip(items, taken, strict=True))
        mean = 8 * (used + self._fixed_bytes(refused)) / max(self._count(), 1)
        words = ", ".join(f"{count} of {what}" for what, count in counts.most_common())
        return (f"formats of weights were chosen within {self._asked()}: {words}; {mean:.2f} bits per weight, which "
                f"cost {total:.2g} {self.costs.unit} by estimate")


def options(recipe: Recipe) -> list[Scheme]:
    """The schemes that are chosen from, each with each size of blocks."""
    own = recipe.scheme
    assert own.weights is not None
    width = by_name(own.weights.dtype).bits
    wider = [scheme for scheme in map(named_scheme, weight_only_names())
             if scheme.weights is not None and by_name(scheme.weights.dtype).bits > width]
    chosen = [own if name == own.name else named_scheme(name) for name in recipe.bits.choices] or [own, *wider]
    return list(dict.fromkeys(in_blocks(scheme, size) for scheme in chosen for size in recipe.bits.block_sizes))


def described(spec: TensorSpec) -> str:
    """'uint4 in blocks of 32'."""
    return f"{spec.dtype} in blocks of {spec.block_size}"
