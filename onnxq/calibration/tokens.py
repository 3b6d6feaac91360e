"""A file of token ids as DATA: rows for a language model, with each position's next token as its label."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from onnxq.calibration.dataset import Batch, Dataset
from onnxq.calibration.sources import Array, Column
from onnxq.calibration.text import LENGTH, inputs_of, row_length
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

KEY = "tokens"  # of the only array in an .npz


class Tokens(Dataset):
    """Rows of `length` tokens from an array of ids, for inputs known by their names (see onnxq.language).

    Ids [n] are one stream, cut into rows of length + 1; of ids [rows, n] each row gives its first length + 1. The
    first `length` are the inputs, of which none is padding and nothing comes before; the last `length` are the labels,
    int64 [rows, length], as perplexity wants them. `length` is the recipe's or the model's; else n - 1 of [rows, n],
    and 128 of a stream. Mapped files are read as they are needed.

    Raises DataError for a model with other inputs, for an array that holds no rows of that length or something else
    than ids, and, while iterating, for negative ids.
    """

    def __init__(self, name: str, column: Column, ports: Sequence[Port], how: Preprocessing) -> None:
        self.name, self._column = name, column
        self._inputs = inputs_of(ports)
        if column.dtype.kind not in "iu" or len(column.shape) not in (1, 2):
            raise DataError(f"{column.where} is {column.dtype} {list(column.shape)} and token ids are integers, "
                            "[tokens] or [rows, tokens]; save them so, or write an .npz with an array per input")
        count, self._stream = column.shape[-1], len(column.shape) == 1
        self._length = row_length(self._inputs, how) or (LENGTH if self._stream else max(count - 1, 1))
        width = self._length + 1
        stored = (count // width if self._stream else column.shape[0]) if count >= width else 0
        step = self._inputs.rows or 1
        self.rows = stored // step * step
        if not self.rows:
            wanted = f"{step} rows" if step > 1 else "a row"
            raise DataError(f"{column.where} of {list(column.shape)} does not fill {wanted} of {self._length} tokens "
                            "and their next; give more tokens, or set a smaller length under data: in the recipe")
        made = "the ids are one stream, cut into rows of" if self._stream else "each row gives its first"
        self.notes = (f"{made} {self._length} tokens, labelled with the next; data: in the recipe changes that",)
        if stored > self.rows:
            self.notes += (f"{stored - self.rows} of {stored} rows of {name} left out: they fill no batch of {step}",)

    @property
    def labels(self) -> Array | None:
        """[rows, length], in the file's own type; read from the disk as they are looked at, where it can be mapped."""
        ids, rows, width = self._column.view(), self.rows or 0, self._length + 1
        whole = ids[:rows * width].reshape(rows, width) if self._stream else ids[:rows, :width]
        return whole[:, 1:]

    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]:
        step, width, rows = self._inputs.rows or batch, self._length + 1, self.rows or 0
        last = rows if samples is None else min(rows, samples)
        if self._inputs.rows is not None:
            last = last // step * step
        if not last:
            raise DataError(f"the first {samples} rows of {self.name} fill no batch of the model; ask for more samples")
        with ExitStack() as stack:
            read = self._column.open(stack)
            for first in range(0, last, step):
                count = min(step, last - first)
                ids = read(count * width).reshape(count, width) if self._stream else read(count)[:, :width]
                yield self._batch(ids.astype(np.int64), first)

    def _batch(self, ids: Array, first: int) -> Batch:
        if ids.min() < 0:
            raise DataError(f"{self._column.where} holds negative ids in the rows from {first} on; leave padding out, "
                            "or write an .npz with an array per input")
        return Batch(self._inputs.prefill(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:]), len(ids), first)
