"""DATA on the command line, as a stream of feeds for a model.

DATA is an .npz file, a folder of .npz, of .npy or of image files, a text file, a file of token ids, `module:function`,
or the word `random`.
Nothing is ever made up: random data come only when asked for by that word. NaN is not looked for here.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import plugins
from onnxq.calibration import images, text, tokens
from onnxq.calibration.dataset import Batch, Dataset
from onnxq.calibration.layout import (
    LABELS,
    Feed,
    cast,
    check_dtype,
    check_feed_shape,
    check_keys,
    lay_out,
    sections,
)
from onnxq.calibration.sources import Array, Column, Random, npy_column, npz_columns, one_row
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

__all__ = ["Batch", "Dataset", "open_data"]

_AS_THE_MODEL_SUGGESTS = Preprocessing()
_RANDOM_ROWS = 16
_RANDOM_SIZE = 64  # of a dynamic axis that is not the batch
_KINDS = (
    "an .npz file, a folder of .npz, .npy or image files, a .txt or .jsonl text, an .npy of token ids, module:function "
    "or the word random"
)


def open_data(
    spec: str | os.PathLike[str] | Callable[[], Iterable[Feed]] | Iterable[Feed],
    ports: Sequence[Port],
    *,
    seed: int = 0,
    how: Preprocessing = _AS_THE_MODEL_SUGGESTS,
) -> Dataset:
    """The data set that `spec` names, fitted to the model's inputs; headers are read, data are not.

    - `.npz`: an array per input; labels under `labels`.
    - folder: of such .npz files (a file may also be one feed as it is), their rows in the order of the names; or of
      `NAME.npy` per input; or of images, in sub-folders too, made into rows as `how` says (see images.Images).
    - `.txt`, `.jsonl`: tokenized into rows as `how` says (see text.Text).
    - `.npy`, or `.npz` with `tokens` alone: ids for a language model, labelled with the next ones (see tokens.Tokens).
    - `module:function`, a function or an iterable: a dictionary per feed, with `labels` at will. A function is called
      anew for each pass.
    - `random`: 16 rows (more where the model's fixed batch is larger) made from `seed`: dynamic axes are 64, integers 0
      or 1, masks 1. A folder of that name is `./random`.

    Rows lie along axis 0; an array with one axis more than its input holds samples that are fed one by one. Integers
    widen and floats round to the input's dtype. Raises DataError for whatever does not fit the model or can't be read.
    """
    if not ports:
        raise DataError("the model takes no inputs, so that there is nothing to feed; compile it without data")
    if isinstance(spec, (str, os.PathLike)):
        return _open_named(spec, ports, seed, how)
    if callable(spec):
        name = f"{getattr(spec, '__module__', '')}:{getattr(spec, '__qualname__', type(spec).__name__)}"
        return _Feeds(name, spec, ports)
    if isinstance(spec, Iterable) and not isinstance(spec, Mapping):
        return _Feeds(f"{type(spec).__name__} of feeds", spec, ports)
    raise DataError(f"DATA is {_KINDS}, or in Python a function or iterable of feeds, not a {type(spec).__name__}")


class _Arrays(Dataset):
    """Rows of stored or drawn arrays; `files` is (where, columns) in order."""

    def __init__(
        self,
        name: str,
        files: Iterable[tuple[str, dict[str, Column]]],
        ports: Sequence[Port],
        folder: bool = False,
    ) -> None:
        self.name = name
        names = {port.name for port in ports}
        parts, self._label_columns = [], []
        for where, columns in files:
            label = None if LABELS in names else columns.pop(LABELS, None)
            parts.append(lay_out(where, columns, ports, one_feed=folder))
            if label is not None:
                self._label_columns.append(label if label.shape else one_row(label))
        if 0 < len(self._label_columns) < len(parts):
            raise DataError(f"only some files of {name} have {LABELS}; give them to each file or to none")
        self._sections = sections(parts, ports)
        self._stored = sum(section.rows for section in self._sections)
        self.rows = sum(section.usable for section in self._sections)
        self._check_batches()
        self._check_labels()
        self._labels: Array | None = None

    def _check_batches(self) -> None:
        dropped = self._stored - (self.rows or 0)
        if not dropped:
            return
        sizes = sorted({section.step for section in self._sections if section.step})
        batch = " or ".join(map(str, sizes))
        if not self.rows:
            raise DataError(
                f"{self.name} has {self._stored} rows and the model takes exactly {batch} at once; give as many"
            )
        self.notes = (f"{dropped} of {self._stored} rows of {self.name} left out: they fill no batch of {batch}",)

    def _check_labels(self) -> None:
        """The metric knows how labels belong to rows; here their number has only to divide that of the rows."""
        shapes = {column.shape[1:] for column in self._label_columns}
        if len(shapes) > 1:
            raise DataError(f"the files of {self.name} have {LABELS} of unequal shapes; give them all the same shape")
        count = sum(column.shape[0] for column in self._label_columns)
        if self._label_columns and (not count or self._stored % count):
            raise DataError(
                f"{self.name} has {count} {LABELS} for {self._stored} rows; give one per row, or one per group of rows"
            )
        if self._label_columns and count != self._stored and self._stored != self.rows:
            raise DataError(
                f"{self.name} has {count} {LABELS} for {self._stored} rows, not all of which fill the model's fixed "
                "batch; give a number of rows that does"
            )

    @property
    def labels(self) -> Array | None:
        """Read when first asked for; without those of rows that were left out."""
        if self._labels is None and self._label_columns:
            labels = np.concatenate([column.load() for column in self._label_columns])
            if self._stored != self.rows:
                keep, start = [], 0
                for section in self._sections:
                    keep.append(labels[start : start + section.usable])
                    start += section.rows
                labels = np.concatenate(keep)
            self._labels = labels
        return self._labels

    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]:
        labels = self.labels
        if labels is not None and len(labels) != self.rows:
            labels = None
        first = 0
        for section in self._sections:
            left = section.usable if samples is None else min(section.usable, samples - first)
            if section.step:
                left = left // section.step * section.step
            for feed, rows in section.feeds(section.step or batch, left):
                yield Batch(feed, None if labels is None else labels[first : first + rows], rows, first)
                first += rows
            if samples is not None and left < section.usable:
                break
        if not first:
            raise DataError(f"the first {samples} rows of {self.name} fill no batch of the model; ask for more samples")


class _Feeds(Dataset):
    """Ready feeds from a function that is called for each pass, or from an iterable."""

    def __init__(self, name: str, source: Callable[[], Iterable[Feed]] | Iterable[Feed], ports: Sequence[Port]) -> None:
        self.name = name
        self._source = source
        self._ports = ports
        self._spent = False

    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]:
        feeds = self._start()
        first = number = 0
        while samples is None or first < samples:
            try:
                given = next(feeds)
            except StopIteration:
                break
            except Exception as error:
                raise DataError(
                    f"{self.name} failed at feed {number} ({type(error).__name__}: {error}); "
                    "correct the code that makes the feeds"
                ) from error
            made = self._batch(f"feed {number} of {self.name}", given, first)
            yield made
            first, number = first + made.rows, number + 1
        if not first:
            raise DataError(f"{self.name} gave no feeds; let it give at least one")

    def _start(self) -> Iterator[Any]:
        try:
            source = self._source() if callable(self._source) else self._source
            feeds = iter(source)
        except Exception as error:
            raise DataError(
                f"{self.name} gives no feeds ({type(error).__name__}: {error}); make it a function without arguments "
                "that yields one dictionary {input name: array} per feed"
            ) from error
        if feeds is self._source:
            if self._spent:
                raise DataError(f"{self.name} can be read only once and was; pass a function that makes it, or a list")
            self._spent = True
        return feeds

    def _batch(self, where: str, given: Any, first: int) -> Batch:
        if not isinstance(given, dict):
            raise DataError(f"{where} is a {type(given).__name__}; give a dictionary {{input name: array}} per feed")
        check_keys(where, given, self._ports)
        feed = {}
        for port in self._ports:
            key = f"{where}, key '{port.name}',"
            array = _as_array(key, given[port.name])
            check_dtype(key, array.dtype, array.shape, port)
            check_feed_shape(key, array, port)
            feed[port.name] = cast(array, port)
        counts = {array.shape[:1] for array in feed.values()}
        common = counts.pop() if len(counts) == 1 else ()
        rows = common[0] if common else 1
        if not rows:
            raise DataError(f"{where} has no rows; give at least one")
        labels = None
        if given.get(LABELS) is not None and LABELS not in feed:
            labels = np.atleast_1d(_as_array(f"{where}, key '{LABELS}',", given[LABELS]))
            if not len(labels) or rows % len(labels):
                raise DataError(f"{where} has {len(labels)} {LABELS} for {rows} rows; give one per row")
        return Batch(feed, labels, rows, first)


def _open_named(spec: str | os.PathLike[str], ports: Sequence[Port], seed: int, how: Preprocessing) -> Dataset:
    if spec == "random":
        data = _Arrays("random (asked for)", [("random data", _random_columns(ports, seed))], ports)
        data.random = True
        return data
    given = os.fspath(spec)
    path = Path(given)
    exists = given != "" and path.exists()  # Path("") is the working directory
    if exists and path.is_dir():
        return _open_folder(path, ports, how)
    if exists and path.suffix.lower() == ".npz":
        columns = npz_columns(path)
        if list(columns) == [tokens.KEY] and tokens.KEY not in {port.name for port in ports}:
            return tokens.Tokens(path.name, columns[tokens.KEY], ports, how)
        return _Arrays(path.name, [(path.name, columns)], ports)
    if exists and path.suffix.lower() == ".npy":
        return tokens.Tokens(path.name, npy_column(path), ports, how)
    if exists and path.suffix.lower() in text.SUFFIXES:
        return text.Text(path, ports, how)
    if not exists and plugins.is_reference(given):
        return _Feeds(given, plugins.load(given, DataError), ports)
    missing = "" if exists else ", which is missing"
    raise DataError(f"DATA is {_KINDS}, not '{given}'{missing}; check the path or write the data with numpy.savez")


def _open_folder(path: Path, ports: Sequence[Port], how: Preprocessing) -> Dataset:
    name = path.resolve().name
    try:
        files = sorted(file for file in path.iterdir() if not file.name.startswith("."))
    except OSError as error:
        raise DataError(f"folder {path} can't be read ({error}); check its permissions") from error
    archives = [file for file in files if file.suffix.lower() == ".npz"]
    arrays = [file for file in files if file.suffix.lower() == ".npy"]
    if archives and arrays:
        raise DataError(f"folder {path} has both .npz and .npy files; leave one kind in it")
    if (archives or arrays) and any(file.suffix.lower() in images.SUFFIXES for file in files):
        raise DataError(f"folder {path} has both arrays and images; leave one kind in it")
    if archives:
        return _Arrays(name, ((file.name, npz_columns(file)) for file in archives), ports, folder=True)
    if arrays:
        return _Arrays(name, [(name, {file.stem: npy_column(file) for file in arrays})], ports)
    pictures = images.find(path)
    if pictures:
        return images.Images(path, pictures, ports, how)
    raise DataError(f"folder {path} has no .npz, .npy or image files; give a folder that does, or a file")


def _random_columns(ports: Sequence[Port], seed: int) -> dict[str, Column]:
    """Rows are cut along axis 0 where that is each input's batch axis; else each gets a leading sample axis."""
    for port in ports:
        if port.shape is None or port.dtype is None or port.dtype.kind not in "fiub":
            raise DataError(f"random data can't be made for input '{port.name}' of unknown rank or dtype; give an .npz")
    shapes = [port.shape or () for port in ports]
    firsts = {shape[0] for shape in shapes if shape}
    fixed = {size for size in firsts if isinstance(size, int)}
    batch_names = {size for size in firsts if isinstance(size, str)}
    cut = all(shapes) and len(fixed) < 2 and not any(dim in batch_names for shape in shapes for dim in shape[1:])
    step = max({1, *fixed}) if cut else 1
    rows = math.ceil(_RANDOM_ROWS / step) * step
    columns: dict[str, Column] = {}
    for number, (port, shape) in enumerate(zip(ports, shapes, strict=True)):
        row = shape[1:] if cut else tuple(1 if axis == 0 and dim is None else dim for axis, dim in enumerate(shape))
        sizes = (dim if isinstance(dim, int) else 1 if dim in batch_names else _free_size(dim) for dim in row)
        dtype = port.dtype or np.dtype(np.float32)
        columns[port.name] = Random(
            f"random '{port.name}'", dtype, (rows, *sizes), (seed, number), "mask" in port.name.lower()
        )
    return columns


def _free_size(dim: str | None) -> int:
    """A free axis gets a common size; that of a key/value cache is empty, as in the first call of a generation."""
    return 0 if dim is not None and dim.lower().startswith("past") else _RANDOM_SIZE


def _as_array(where: str, value: Any) -> Array:
    try:
        return np.asarray(value, order="C")
    except Exception as error:
        raise DataError(f"{where} is no array ({error}); give a numeric array") from error
