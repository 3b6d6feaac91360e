"""Which nodes a recipe's rules and globs name."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from onnxq.errors import UsageError
from onnxq.graph import Graph, Node, is_constant
from onnxq.recipe import Recipe, expand_braces, matches
from onnxq.schemes import FLOAT, Scheme
from onnxq.schemes import scheme as named_scheme

# what rewrites of the float graph append to a weight's name
_SUFFIXES = (".absorbed", ".bn", ".folded", ".kn", ".scaled", ".smoothed", ".split")


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
    kept: dict[str, str] = {}
    unmatched = dict.fromkeys(recipe.fallback.keep_float, "--keep-float")
    unmatched |= {rule.match.name: f"rules[{k}].match.name:" for k, rule in enumerate(recipe.rules)
                  if rule.match.name is not None}
    known: list[str] = []
    for node, holder in graph.walk():  # those in bodies are float anyway, but may be named
        names = names_of(holder, node)
        known += names
        for glob in recipe.fallback.keep_float:
            if matches(glob, names):
                kept.setdefault(node.name, f"kept float as asked ({glob})")
        for glob in [g for g in unmatched if matches(g, names)]:
            del unmatched[glob]
        for rule in recipe.rules:
            if (rule.match.op in (None, node.op)) and (rule.match.name is None or matches(rule.match.name, names)):
                if rule.scheme == FLOAT.name:
                    kept.setdefault(node.name, rule.reason or "kept float by a rule of the recipe")
                break
    if unmatched:
        glob, where = next(iter(unmatched.items()))
        bare = expand_braces(glob)[0].strip("*").replace(".", "/")
        plain = {name.replace(".", "/"): name for name in known}
        near = [plain[n] for n in difflib.get_close_matches(bare, plain, 3, 0.5)] or sorted(set(known))[:3]
        raise UsageError(f"{where} {glob!r} matches no node; near: {', '.join(near)}")
    return kept


def schemes(graph: Graph, recipe: Recipe) -> dict[str, Scheme]:
    """Node name -> the scheme that the first rule that matches gives it, else the recipe's; bodies included."""
    ruled = named(graph, recipe)
    return {node.name: ruled.get(node.name, recipe.scheme) for node, _ in graph.walk()}


def named(graph: Graph, recipe: Recipe) -> dict[str, Scheme]:
    """Node name -> the scheme of the first rule that matches it, for nodes that any rule is for."""
    found: dict[str, Scheme] = {}
    for node, holder in graph.walk():
        names = names_of(holder, node)
        name = next((r.scheme for r in recipe.rules if r.match.op in (None, node.op)
                     and (r.match.name is None or matches(r.match.name, names))), None)
        if name is not None:
            found[node.name] = recipe.scheme if name == recipe.scheme.name else named_scheme(name)
    return found
