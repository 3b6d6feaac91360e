"""A language model whose next token can be reckoned in the head, in the forms that exporters give language models."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from conftest import body, make_model, node, value
from onnx import TensorProto

VOCABULARY = 11
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64


def following(prompt: Sequence[int], count: int) -> list[int]:
    """What the model goes on with: (the sum of all tokens + the last one's position) mod 11, again and again."""
    seen = list(prompt)
    for _ in range(count):
        seen.append((sum(seen) + len(seen) - 1) % VOCABULARY)
    return seen[len(prompt):]


def summing(past: str | None = "past_key_values.0.key", present: str = "present.0.key", *, mask: bool = True,
            positions: bool = True, dtype: int = FLOAT, merged: bool = False, rows: Any = "batch",
            length: Any = "sequence", last: bool = False) -> onnx.ModelProto:
    """input_ids [rows, length] -> logits [rows, length, 11], one at `following`'s next token, else zero.

    The cache holds the tokens themselves, [rows, 1, past, 1], so that a wrong past, mask or position changes what
    follows. `merged` takes the past in a branch of an If alone; `last` scores the last token alone.
    """
    inputs: dict[str, Any] = {"input_ids": (INT64, [rows, length])}
    total = "total" if past is not None else length
    nodes = [node("Cast", "input_ids", "tokens", to=dtype), node("Unsqueeze", "tokens ends", "new")]
    if past is None:
        nodes.append(node("Identity", "new", "seen"))
    else:
        inputs[past] = (dtype, [rows, 1, "past", 1])
        joined = node("Concat", f"{past} new", "both" if merged else "seen", axis=2)
        if merged:
            inputs["use_cache_branch"] = (TensorProto.BOOL, [1])
            nodes.append(node("If", "use_cache_branch", "seen", then_branch=_branch(joined, dtype, "with_past"),
                              else_branch=_branch(node("Identity", "new", "both"), dtype, "without_past")))
        else:
            nodes.append(joined)
        nodes.append(node("Identity", "seen", present))
    nodes.append(node("Cast", "seen", "numbers", to=FLOAT))
    if mask:
        inputs["attention_mask"] = (INT64, [rows, total])
        nodes += [node("Cast", "attention_mask", "real", to=FLOAT), node("Unsqueeze", "real ends", "factors"),
                  node("Mul", "numbers factors", "counted")]
    else:
        nodes.append(node("Identity", "numbers", "counted"))
    nodes += [node("CumSum", "counted two", "sums"), node("Shape", "input_ids", "count", start=1, end=2),
              node("Neg", "count", "from"), node("Slice", "sums from end two_of", "those"),
              node("Squeeze", "those ends", "flat"), node("Cast", "flat", "whole", to=INT64)]
    if positions:
        inputs["position_ids"] = (INT64, [rows, length])
        nodes.append(node("Add", "whole position_ids", "moved"))
    else:
        nodes.append(node("Identity", "whole", "moved"))
    nodes += [node("Mod", "moved size", "next"), node("OneHot", "next size values", "all")]
    nodes.append(node("Gather", "all last", "logits", axis=1) if last else node("Identity", "all", "logits"))
    outputs: dict[str, Any] = {"logits": [rows, 1 if last else length, VOCABULARY]}
    if past is not None:
        outputs[present] = (dtype, [rows, 1, "total", 1])
    stored = {"ends": np.array([1, 3]), "two": np.array(2), "two_of": np.array([2]), "end": np.array([1 << 60]),
              "size": np.array(VOCABULARY), "values": np.array([0, 1], np.float32), "last": np.array([-1])}
    return make_model(nodes, inputs, outputs, stored)


def _branch(only: onnx.NodeProto, dtype: int, name: str) -> onnx.GraphProto:
    graph = body([only], {"both": None}, name)
    graph.output[0].CopyFrom(value("both", None, dtype))
    return graph


def saved(model: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, folder / name)
    return folder / name
