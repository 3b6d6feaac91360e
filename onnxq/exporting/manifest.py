"""manifest.json: what is in an exported folder, for programs in any language.

Files are named relative to the folder, so that it can be moved. A tensor's file holds its values one after the other,
the last axis fastest, little-endian, without anything before them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from onnxq.errors import ModelError
from onnxq.ports import Port

NAME = "manifest.json"
VERSION = 1
_PIECE = 1 << 20  # bytes that are read at once

# types that have values of whole bytes in every language; ONNX's names for numpy's
DTYPES = ("bool", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32",
          "uint64")


@dataclass(frozen=True)
class Described:
    """An input or output as the model declares it: free axes by their names, or None."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]


@dataclass(frozen=True)
class Stored:
    """A tensor of the sample; `tolerance` is by how much what a runtime gives may differ from it, at the most."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    tolerance: float = 0.0


@dataclass(frozen=True)
class Model:
    """A file to run: `data` holds its external weights; `config` are onnxruntime's session configuration entries, and
    `provider_options` those of the provider. `details` says how it was made, in the words of its format.
    """

    file: str
    format: str
    provider: str
    config: Mapping[str, str] = field(default_factory=dict)
    provider_options: Mapping[str, str] = field(default_factory=dict)
    data: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All of manifest.json.

    `target` is what the models are for, `threads` 0 the runtime's own choice. `measured` is what a verification said of
    accuracy and speed, None where nothing was measured; `recipe` and `plan` are what onnxq left in the model. `files`
    are the SHA-256 of every file.
    """

    name: str
    kind: str
    target: str
    models: tuple[Model, ...]
    threads: int
    inputs: tuple[Described, ...]
    outputs: tuple[Described, ...]
    sample_source: str
    sample_inputs: tuple[Stored, ...]
    sample_outputs: tuple[Stored, ...]
    preprocessing: Mapping[str, Any] | None = None
    recipe: Mapping[str, Any] | None = None
    plan: str | None = None
    measured: Mapping[str, Any] | None = None
    made_with: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write it into a folder, with the checksums of all files there."""
        data = asdict(self)
        sample = {key: data.pop(f"sample_{key}") for key in ("source", "inputs", "outputs")}
        for tensor in sample["inputs"]:
            del tensor["tolerance"]
        data["files"] = {name: checksum(folder / name) for name in sorted(_all_files(folder)) if name != NAME}
        text = json.dumps({"onnxq_bundle": VERSION, **data, "sample": sample}, indent=1)
        (folder / NAME).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest:
    """The manifest of an exported folder. Raises ModelError for a folder without one, or one that can't be used."""
    path = folder / NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{folder} holds no {NAME} that can be read ({e.strerror}); name a folder that onnxq export "
                         "wrote") from None
    except ValueError:
        raise ModelError(f"{path} is no JSON; export the model again") from None
    if not isinstance(data, dict) or data.pop("onnxq_bundle", None) != VERSION:
        raise ModelError(f"{path} is of another version than {VERSION}, or not onnxq's; export the model again with "
                         "this onnxq")
    try:
        found = _built(data)
    except (AttributeError, KeyError, TypeError) as e:
        raise ModelError(f"{path} is not as onnxq writes it ({e}); export the model again") from None
    for name in (*found.files, *(m.file for m in found.models),
                 *(t.file for t in (*found.sample_inputs, *found.sample_outputs))):
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
            raise ModelError(f"{path} names {name!r}, which lies outside of the folder; export the model again")
        if name not in found.files:
            raise ModelError(f"{path} has no checksum of {name!r}; export the model again")
    return found


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare checksums. Raises ModelError that names each file which is missing or was altered."""
    wrong = []
    for name, wanted in manifest.files.items():
        try:
            found = checksum(folder / name)
        except OSError:
            wrong.append(f"{name} is missing")
            continue
        if found != wanted:
            wrong.append(f"{name} was altered")
    if wrong:
        raise ModelError(f"{folder}: {', '.join(wrong)} since the export; copy the folder again, or export the model "
                         "again")


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def described(port: Port) -> Described:
    """A port in the manifest's words. Raises ModelError for a type that a sample can't be stored in."""
    if port.dtype is None or port.bfloat16 or port.dtype.name not in DTYPES:
        raise ModelError(f"{port.name!r} is {port}, and exported samples hold numbers of whole bytes only; make it "
                         "float32 or an integer before the export")
    return Described(port.name, port.dtype.name, port.shape or ())


def _all_files(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]


def _built(data: dict[str, Any]) -> Manifest:
    sample = data.pop("sample")
    return Manifest(
        models=tuple(Model(**{**m, "data": tuple(m["data"])}) for m in data.pop("models")),
        inputs=_described(data.pop("inputs")), outputs=_described(data.pop("outputs")),
        sample_source=sample["source"], sample_inputs=_stored(sample["inputs"]),
        sample_outputs=_stored(sample["outputs"]), **data)


def _described(rows: list[dict[str, Any]]) -> tuple[Described, ...]:
    return tuple(Described(**{**row, "shape": tuple(row["shape"])}) for row in rows)


def _stored(rows: list[dict[str, Any]]) -> tuple[Stored, ...]:
    return tuple(Stored(**{**row, "shape": tuple(row["shape"])}) for row in rows)
