"""How long work tells of itself: the library says what it does, the caller decides whether anyone sees it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Hears of stages in order. A stage's length may come after its start, and steps may skip numbers."""

    def stage(self, name: str) -> None:
        """A stage begins, and with it the one before it ends."""

    def total(self, steps: int | None) -> None:
        """The stage's length in steps; None while it is not known."""

    def step(self, done: int) -> None:
        """Steps done so far in this stage, counted from its start."""


class Silent:
    """The Progress that shows nothing, for use as a library."""

    def stage(self, name: str) -> None:
        """Ignored."""

    def total(self, steps: int | None) -> None:
        """Ignored."""

    def step(self, done: int) -> None:
        """Ignored."""
