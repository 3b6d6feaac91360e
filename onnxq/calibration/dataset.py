"""What every kind of DATA is read into: batches of feeds for a model, as often as they are asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

from onnxq.calibration.layout import Feed
from onnxq.calibration.sources import Array
from onnxq.errors import UsageError

BATCH = 8  # rows per batch unless the caller, the model or the layout says otherwise


@dataclass(frozen=True, eq=False)
class Batch:
    """One feed, with the labels of its rows where there is one label per row.

    `first_row` counts the rows delivered before it; a single sample that is fed as it is counts as one row.
    """

    feed: Feed
    labels: Array | None
    rows: int
    first_row: int


class Dataset(ABC):
    """Feeds for a model, as often as they are asked for.

    `name` is what a report calls it; `rows` counts what `batches` delivers in all and is None where only a whole pass
    tells, as for a generator; `notes` are sentences for the report, e.g. that rows were dropped.
    """

    name: str
    random: bool = False
    rows: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def labels(self) -> Array | None:
        """All labels, [rows, ...] or fewer (one per pair of rows), or None; a generator's come in its batches."""
        return None

    def batches(self, batch: int | None = None, samples: int | None = None) -> Iterator[Batch]:
        """A new pass over the data: the first `samples` rows in order (all by default), `batch` rows to a feed.

        `batch` gives way to what the model or the data fix: axis 0 of an input, a leading sample axis, a generator's
        own feeds. A generator's feed is never cut: it stops with the one that reaches `samples`. Raises UsageError for
        a number below 1, and DataError, while iterating, for data that turn out unreadable or unfit.
        """
        for name, value in (("batch", batch), ("samples", samples)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}; give a number of at least 1")
        return self._pass(batch or BATCH, samples)

    @abstractmethod
    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]: ...
