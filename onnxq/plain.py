"""Dataclasses <-> plain data: what YAML and JSON hold."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from typing import Any, Union

import yaml

from onnxq.errors import RecipeError


class StrictLoader(yaml.SafeLoader):
    """YAML that refuses a key given twice, of which it would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[typing.Hashable, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise RecipeError(f"{key}: given twice; keep one")
        return super().construct_mapping(node, deep)


def plain(value: Any) -> Any:
    """A dataclass as dictionaries and lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple):
        return [plain(v) for v in value]
    return value


def build(kind: Any, value: Any, path: str) -> Any:
    """`value` (plain data) as `kind`. Raises RecipeError with the path of what does not fit."""
    where = path or "recipe"
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _dataclass(kind, value, path)
    origin = typing.get_origin(kind)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return build(next(a for a in typing.get_args(kind) if a is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where}: a list is wanted, not {value!r}")
        return tuple(build(typing.get_args(kind)[0], v, f"{path}[{k}]") for k, v in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise RecipeError(f"{where}: {kind.__name__} is wanted, not {value!r}")
    return value


def _dataclass(kind: type, value: Any, path: str) -> Any:
    if isinstance(value, kind):
        return value
    if not isinstance(value, dict):
        raise RecipeError(f"{path or 'recipe'}: a mapping is wanted, not {value!r}")
    hints = typing.get_type_hints(kind)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, 1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise RecipeError(f"{path + '.' if path else ''}{key}: there is no such key; {remedy}")
    missing = [f.name for f in dataclasses.fields(kind)
               if f.name not in value and f.default is dataclasses.MISSING]
    if missing:
        raise RecipeError(f"{path + '.' if path else ''}{missing[0]}: missing; add it")
    return kind(**{k: build(hints[k], v, f"{path}.{k}" if path else k) for k, v in value.items()})
