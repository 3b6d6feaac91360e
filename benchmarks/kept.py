"""The float model's answers, computed by the first who scores against them and read by those who come later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np

from benchmarks.models import Array
from benchmarks.scoring import Runnable


class Kept:
    """A model whose answers stand in a file, in the order of the runs; everyone must run it on the same feeds.

    The model is opened, and the file written, where there is none yet. A file is complete or not there: it gets its
    name when the context is left without an error.
    """

    def __init__(self, path: Path, model: Callable[[], Runnable]) -> None:
        self._path, self._part = path, path.with_suffix(".part")
        self._model = None if path.exists() else model()
        self._file = path.open("rb") if self._model is None else self._part.open("wb")

    def __enter__(self) -> Kept:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._file.close()
        if self._model is not None and kind is None:
            self._part.rename(self._path)

    def run(self, feed: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """The outputs, which must be named, of the model on the feed."""
        assert outputs is not None
        if self._model is None:
            return {name: np.load(self._file) for name in outputs}
        found = self._model.run(feed, outputs)
        for name in outputs:
            np.save(self._file, found[name])
        return found
