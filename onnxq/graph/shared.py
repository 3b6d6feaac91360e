"""One computation behind several constants: the codes, the scales and the zero points of one weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from onnxq.graph.tensors import Array


class Shared:
    """Keeps one result at a time: that of the last computation, until each of its parts was taken.

    Parts that are read one after the other, as saving does, cost one computation; any other order costs more of them,
    never more memory.
    """

    def __init__(self) -> None:
        self._held: object = None  # the computation whose parts these are
        self._parts: Sequence[Array] = ()
        self._waiting: set[int] = set()

    def parts(self, compute: Callable[[], Sequence[Array]], count: int) -> tuple[Callable[[], Array], ...]:
        """`count` functions for `Graph.computed`, one for each array that `compute` gives, in their order."""
        identity = object()

        def part(index: int) -> Array:
            if self._held is not identity:
                self.forget()  # before the next result exists
                self._parts, self._held, self._waiting = compute(), identity, set(range(count))
            found = self._parts[index]
            self._waiting.discard(index)
            if not self._waiting:
                self.forget()
            return found

        return tuple(partial(part, index) for index in range(count))

    def forget(self) -> None:
        """Drop what is held."""
        self._held, self._parts, self._waiting = None, (), set()
