"""The models that the table is made of, each with its data and how it is fed and scored.

Three sources: the project's own models/ (models/manifest.yaml), every complete folder of a directory of models
(model.onnx, calib.npz, eval.npz, meta.json), and the networks of benchmarks/light.py, made on the spot.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from benchmarks import light

Array = npt.NDArray[Any]

ROOT = Path(__file__).resolve().parent.parent
OWN_MODELS = ROOT / "models"
SHARED_MODELS = ROOT.parent / "shared" / "models"
FILES = ("model.onnx", "calib.npz", "eval.npz", "meta.json")
LABELS = "labels"
LEADING = "leading"


@dataclass(frozen=True)
class Case:
    """A float model, its calibration and evaluation data, and how to feed and score it.

    `stored` says of each input how an array `a` of the data is cut: "batch" is a[i:j] (axis 0 is the input's own),
    "leading" is a[i] (samples along an axis in front). `max_batch` is None where the batch is dynamic. `recurrent` maps
    state inputs to the state outputs that they get next, within each [first, last) of `sequences`. `agreement` says
    what is compared with the float model's outputs when `metric` is "agreement"; `border` is what PSNR leaves out.
    """

    name: str
    model: Path
    calib: Path
    evaluation: Path
    metric: str
    scored: tuple[str, ...]
    stored: dict[str, str]
    higher_is_better: bool = True
    max_batch: int | None = None
    agreement: str = ""
    border: int = 0
    recurrent: dict[str, str] = field(default_factory=dict)
    sequences: tuple[tuple[int, int], ...] = ()

    @property
    def scored_by(self) -> str:
        """The metric by name, or "agreement: what"."""
        return f"agreement: {self.agreement}" if self.agreement else self.metric

    def feed(self, data: Mapping[str, Array], start: int, stop: int, inputs: Iterable[str] | None = None,
             ) -> dict[str, Array]:
        """Rows start to stop - 1 of some inputs (all by default); just row `start` of one that is stored "leading"."""
        return {name: np.asarray(data[name][start]) if self.stored[name] == LEADING else data[name][start:stop]
                for name in (self.stored if inputs is None else inputs)}

    def batch(self, wanted: int) -> int:
        """Rows to feed at once: as many as wanted, or what the model fixes."""
        return 1 if LEADING in self.stored.values() else self.max_batch or wanted

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Case:
        """The inverse of to_dict."""
        paths = {k: Path(data[k]) for k in ("model", "calib", "evaluation")}
        pairs = tuple((int(a), int(b)) for a, b in data["sequences"])
        return cls(**{**data, **paths, "scored": tuple(data["scored"]), "sequences": pairs})


def find(shared: Path | None, only: Sequence[str], scratch: Path, lights: Iterable[str] = (light.IN_TABLE,),
         ) -> list[Case]:
    """All cases, or those named in `only`; light networks are written to `scratch`, which must exist.

    Of those, only `lights` are found unless named: they say little beside one another that a table should show.

    Raises ValueError for a name that there is not and for a directory that there is not.
    """
    if shared is not None and not shared.is_dir():
        raise ValueError(f"there is no folder {shared}")
    cases = [*own(), *(folder_cases(shared) if shared is not None else [])]
    names = [*(c.name for c in cases), *light.NAMES]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise ValueError(f"there is no model {', '.join(unknown)}; there are {', '.join(names)}")
    cases = [c for c in cases if not only or c.name in only]
    return cases + [_light(name, scratch) for name in light.NAMES if name in (only or lights)]


def _light(name: str, scratch: Path) -> Case:
    folder = scratch / name
    folder.mkdir()
    light.write(name, folder)
    return from_folder(folder)


def own() -> list[Case]:
    """The trained models of this repository, as models/manifest.yaml lists them."""
    manifest = yaml.safe_load((OWN_MODELS / "manifest.yaml").read_text(encoding="utf-8"))
    found = []
    for name, entry in manifest["models"].items():
        files = {kind: OWN_MODELS / path for kind, path in entry["files"].items()}
        found.append(Case(name, files["model"], files["calibration"], files["evaluation"], entry["metric"],
                          (entry["output"],), dict.fromkeys(entry["inputs"], "batch")))
    return found


def folder_cases(directory: Path) -> list[Case]:
    """A case for each folder of `directory` that holds all four files, by name."""
    return [from_folder(folder) for folder in sorted(directory.iterdir())
            if all((folder / name).is_file() for name in FILES)]


def from_folder(folder: Path) -> Case:
    """The case of a folder with model.onnx, calib.npz, eval.npz and meta.json."""
    folder = folder.resolve()  # the steps run in other working directories
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    border = re.search(r"(\d+) border pixels left out", meta["metric_definition"])
    return Case(
        meta["name"], folder / "model.onnx", folder / "calib.npz", folder / "eval.npz", meta["metric"],
        tuple(meta["scored_outputs"]), {name: spec["stored"] for name, spec in meta["inputs"].items()},
        meta["higher_is_better"], meta["max_batch"], meta.get("agreement", ""), int(border[1]) if border else 0,
        meta.get("recurrent", {}), tuple((int(a), int(b)) for a, b in meta.get("sequences", [])))


def read(path: Path) -> dict[str, Array]:
    """All arrays of an .npz file."""
    with np.load(path) as archive:
        return {name: archive[name] for name in archive.files}
