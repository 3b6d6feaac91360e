"""Which nodes a recipe's rules and globs name."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator

from onnxq.errors import UsageError
from onnxq.graph import Graph, Node, is_constant
from onnxq.recipe import Recipe, Rule, expand_braces, matches
from onnxq.schemes import FLOAT, Scheme
from onnxq.schemes import scheme as named_scheme

# what rewrites of the float graph append to a weight's name
_SUFFIXES = (".absorbed", ".bn", ".folded", ".kn", ".pruned", ".scaled", ".smoothed", ".split")

_NUMBER, _WORD_AND_NUMBER = re.compile(r"(?:^|/)(\d+)(?=/)"), re.compile(r"(?:^|/)[A-Za-z_]+(\d+)(?=/)")


def names_of(graph: Graph, node: Node) -> list[str]:
    """Every name by which a user may call a node: its own, its weights', its outputs', its scope path."""
    names = [node.name, *(t.name for t in node.outputs if t.name)]
    for tensor in node.inputs:
        if tensor.name and is_constant(tensor):
            names += [tensor.name, *_stripped(tensor.name)]
    scope = graph.scope(node)
    return [*names, scope] if scope else names


def _stripped(name: str) -> Iterator[str]:
    while name.endswith(_SUFFIXES):
        name = name[:name.rindex(".")]
        yield name


def verdicts(graph: Graph, recipe: Recipe) -> dict[str, str]:
    """Node name -> why a rule or `keep_float` leaves it float.

    Raises UsageError when a glob of `keep_float` or of a rule matches nothing, with near matches.
    """
    kept = {name: rule.reason or "kept float by a rule of the recipe" for name, rule in named(graph, recipe).items()
            if rule.scheme == FLOAT.name}
    unmatched = dict.fromkeys(recipe.fallback.keep_float, "--keep-float")
    unmatched |= {rule.match.name: f"rules[{k}].match.name:" for k, rule in enumerate(recipe.rules)
                  if rule.match.name is not None and not rule.optional}
    asked, known = dict[str, str](), list[str]()
    for node, holder in graph.walk():  # those in bodies are float anyway, but may be named
        names = names_of(holder, node)
        known += names
        for glob in recipe.fallback.keep_float:
            if matches(glob, names):
                asked.setdefault(node.name, f"kept float as asked ({glob})")
        for glob in [g for g in unmatched if matches(g, names)]:
            del unmatched[glob]
    if unmatched:
        glob, where = next(iter(unmatched.items()))
        bare = expand_braces(glob)[0].strip("*").replace(".", "/")
        plain = {name.replace(".", "/"): name for name in known}
        near = [plain[n] for n in difflib.get_close_matches(bare, plain, 3, 0.5)] or sorted(set(known))[:3]
        raise UsageError(f"{where} {glob!r} matches no node; near: {', '.join(near)}")
    return kept | asked


def schemes(graph: Graph, recipe: Recipe) -> dict[str, Scheme]:
    """Node name -> the scheme that the first rule that matches gives it, else the recipe's; bodies included."""
    ruled = named(graph, recipe)
    known = {name: recipe.scheme if name == recipe.scheme.name else named_scheme(name)
             for name in {rule.scheme for rule in ruled.values()}}
    return {node.name: known[ruled[node.name].scheme] if node.name in ruled else recipe.scheme
            for node, _ in graph.walk()}


def named(graph: Graph, recipe: Recipe) -> dict[str, Rule]:
    """Node name -> the first rule that matches it, for nodes that any rule is for; bodies included."""
    every = [(node, names_of(holder, node)) for node, holder in graph.walk()] if recipe.rules else []
    found: dict[str, Rule] = {}
    for rule in recipe.rules:
        fits = [(node, names) for node, names in every if rule.match.op in (None, node.op)
                and (rule.match.name is None or matches(rule.match.name, names))]
        numbers = {node.name: layer_number(names) for node, names in fits}
        count = 1 + max((n for n in numbers.values() if n is not None), default=-1)
        for node, _ in fits:
            number, layers = numbers[node.name], rule.match.layers
            if layers is None or (number is not None and layers.holds(number, count)):
                found.setdefault(node.name, rule)
    return found


def layer_number(names: Iterable[str]) -> int | None:
    """The number of the layer that a node is in: of the first name that has one before its last part, as in
    model.layers.3.mlp, encoder/layer/3/output, blk.3.attn_v or l3.wq; None where no name has."""
    paths = [name.replace(".", "/") for name in names]
    for pattern in (_NUMBER, _WORD_AND_NUMBER):
        for path in paths:
            found = pattern.search(path)
            if found is not None:
                return int(found[1])
    return None
