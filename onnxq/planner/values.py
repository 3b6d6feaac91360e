"""Real values of a float model's tensors, to time and check its kernels on."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy.typing as npt

from onnxq.graph import Graph, save
from onnxq.runtime.session import Session, SessionOptions

Array = npt.NDArray[Any]
Feed = Mapping[str, Array]

AT_ONCE = 24  # tensors of the float model that are held at once


@dataclass
class Read:
    """What a part of the model reads, per feed, and (elements over all feeds, rank) of tensors by name."""

    feeds: list[dict[str, Array]]
    sizes: dict[str, tuple[int, int]]


class Values(AbstractContextManager["Values"]):
    """Tensors of the float model for given feeds, fetched a few at a time from one session."""

    def __init__(self, graph: Graph, feeds: Sequence[Feed], options: SessionOptions, wanted: Collection[str]) -> None:
        self.graph, self.feeds, self.options, self.wanted = graph, feeds, options, wanted
        self.inputs = {t.name for t in graph.inputs}
        self.held: dict[str, list[Array]] = {}

    def __enter__(self) -> Values:
        self.folder = tempfile.TemporaryDirectory(prefix="onnxq-")
        path = Path(self.folder.name) / "values.onnx"
        save(self.graph, path, extra_outputs=sorted(set(self.wanted) - self.inputs))
        self.session = Session(path, SessionOptions(threads=self.options.threads))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.folder.cleanup()

    def of(self, read: Sequence[str], measured: Sequence[str]) -> Read:
        """What a unit reads, per feed, and the size of each tensor in `measured`."""
        wanted = dict.fromkeys([*read, *measured])
        missing = [name for name in wanted if name not in self.held and name not in self.inputs]
        if missing:
            if len(self.held) + len(missing) > AT_ONCE:
                self.held = {name: self.held[name] for name in wanted if name in self.held}
            runs = [self.session.run(feed, missing) for feed in self.feeds]
            self.held |= {name: [run[name] for run in runs] for name in missing}
        arrays = {name: self.held.get(name) or [feed[name] for feed in self.feeds] for name in wanted}
        feeds = [{name: arrays[name][k] for name in read} for k in range(len(self.feeds))]
        return Read(feeds, {name: (sum(a.size for a in arrays[name]), arrays[name][0].ndim) for name in measured})
