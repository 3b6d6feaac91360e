"""Presets: recipes that ship under a name, for what a scheme alone can't say.

They are YAML files in `onnxq/recipes/presets/`.
"""

from __future__ import annotations

import difflib
from importlib import resources

from onnxq import schemes
from onnxq.errors import UsageError
from onnxq.recipe import Recipe, parse


def preset_names() -> list[str]:
    """Names of the presets that ship with onnxq."""
    folder = resources.files("onnxq").joinpath("recipes", "presets")
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def names() -> list[str]:
    """Those of schemes, then those of presets: what --scheme takes."""
    return [*schemes.scheme_names(), *preset_names()]


def text(name: str) -> str:
    """The YAML of a scheme, or of a preset: a whole recipe. Raises UsageError for an unknown name."""
    if name in preset_names():
        return resources.files("onnxq").joinpath("recipes", "presets", f"{name}.yaml").read_text(encoding="utf-8")
    return schemes.scheme_text(name)


def named(name: str) -> Recipe:
    """A preset, or the recipe that is a scheme alone. Raises UsageError with near matches for an unknown name."""
    if name in preset_names():
        return parse(text(name))
    near = difflib.get_close_matches(name, preset_names(), 1, 0.5)
    if near and name not in (*schemes.scheme_names(), schemes.FLOAT.name):
        raise UsageError(f"there is no scheme {name!r}; known: {near[0]} (onnxq schemes lists them)")
    return Recipe(schemes.scheme(name))
