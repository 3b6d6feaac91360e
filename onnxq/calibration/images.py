"""A folder of images as DATA: decoded by Pillow and preprocessed as the recipe says, a batch at a time.

The steps and their rounding are those of torchvision's transforms on PIL images (Resize with antialiasing, CenterCrop,
ToTensor, Normalize), so that a recipe can repeat what a model was trained with.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxq.calibration.dataset import Batch, Dataset
from onnxq.calibration.layout import Feed, cast, describe
from onnxq.calibration.sources import Array
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # Pillow's readers for them, and no other: one of them starts a program
_CHANNELS = {"rgb": 3, "bgr": 3, "gray": 1, "y": 1}
_SHOWN = 5  # labels that a note spells out


def find(folder: Path) -> list[Path]:
    """The image files of a folder and its sub-folders, sorted by their paths; hidden files and folders don't count.

    Raises DataError for a folder that can't be read, and for one that holds arrays beside its images.
    """
    files, arrays = [], []
    for parent, folders, names in os.walk(folder, onerror=_unreadable, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = [Path(parent, name) for name in names if not name.startswith(".")]
        files += [path for path in paths if path.suffix.lower() in SUFFIXES]
        arrays += [path for path in paths if path.suffix.lower() in (".npy", ".npz")]
    if files and arrays:
        other = min(arrays).relative_to(folder).as_posix()
        raise DataError(f"folder {folder} has images and also arrays ({other}); leave one kind in it")
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


class Images(Dataset):
    """Images as rows of the model's only input, float or uint8 of rank 4.

    They are decoded upright (EXIF orientation) in 8 bits, with 16-bit grey scaled by 255 / 65535 and transparency
    dropped, and then follow `how` (see recipe.Preprocessing); a uint8 input takes the pixels as they are, without
    scale, mean and std. Images that keep sizes of their own are fed one by one. Labels are int64 [rows] where all
    images lie in sub-folders, one level deep, two of them at least: the place of theirs among the sorted sub-folders
    (as in torchvision's ImageFolder). Raises DataError for a model that takes something else, for settings that don't
    fit it, for a lack of Pillow, and, while iterating, for an image that can't be decoded or does not fit, by its name.
    """

    def __init__(self, folder: Path, files: Sequence[Path], ports: Sequence[Port], how: Preprocessing) -> None:
        _require_pillow()
        self.name = folder.resolve().name
        self._folder, self._files = folder, files
        self._steps = _steps(ports, how)
        fixed = (self._steps.port.shape or (None,))[0]
        step = fixed if isinstance(fixed, int) else None
        if self._steps.size is None and step not in (None, 1):
            raise DataError(f"the model takes {step} images at once, which then need one size; set resize: [H, W] "
                            "under data: in the recipe")
        self._step = 1 if self._steps.size is None else step
        self.rows = len(files) // (step or 1) * (step or 1)
        if not self.rows:
            raise DataError(f"{self.name} has {len(files)} images and the model takes exactly {step} at once; give as "
                            "many")
        self.notes = (str(self._steps),)
        self._labels = self._find_labels()
        if self.rows < len(files):
            self.notes += (f"{len(files) - self.rows} of {len(files)} images of {self.name} left out: they fill no "
                           f"batch of {step}",)

    @property
    def labels(self) -> Array | None:
        """int64 [rows], or None."""
        return self._labels

    def _find_labels(self) -> Array | None:
        paths = [file.relative_to(self._folder) for file in self._files]
        if any(len(path.parts) != 2 for path in paths):
            return None
        classes = sorted(entry.name for entry in self._folder.iterdir()
                         if entry.is_dir() and not entry.name.startswith("."))
        if len(classes) < 2:
            return None
        shown = ", ".join(f"{k} = {name}" for k, name in enumerate(classes[:_SHOWN]))
        more = ", ..." if len(classes) > _SHOWN else ""
        self.notes += (f"labels are the places of the {len(classes)} sub-folders in their order: {shown}{more}",)
        places = {name: k for k, name in enumerate(classes)}
        return np.array([places[path.parts[0]] for path in paths], np.int64)[: self.rows]

    def _pass(self, batch: int, samples: int | None) -> Iterator[Batch]:
        size = self._step or batch
        rows = min(self.rows or 0, samples or len(self._files)) // (self._step or 1) * (self._step or 1)
        if not rows:
            raise DataError(f"the first {samples} images of {self.name} fill no batch of the model; ask for more "
                            "samples")
        for first in range(0, rows, size):
            files = self._files[first : min(first + size, rows)]
            labels = None if self._labels is None else self._labels[first : first + len(files)]
            yield Batch(self._feed(files), labels, len(files), first)

    def _feed(self, files: Sequence[Path]) -> Feed:
        rows = [self._steps.row(file, file.relative_to(self._folder).as_posix()) for file in files]
        port = self._steps.port
        return {port.name: cast(np.stack(rows), port)}


@dataclass(frozen=True)
class _Steps:
    """The preprocessing of one image, settled for an input; `size` is (H, W) of every row, None where they differ."""

    port: Port
    how: Preprocessing
    color: str
    layout: str
    resize: tuple[int, ...] | None
    crop: tuple[int, ...] | None
    size: tuple[int, ...] | None

    def __str__(self) -> str:
        sized = f"resized to {list(self.resize)} ({self.how.interpolation})" if self.resize else "in their own size"
        cut = f", cropped to {list(self.crop)}" if self.crop else ""
        numbers = "pixels as they are" if self._keeps_pixels else (
            f"(pixel * {self.how.scale:.6g} - {_short(self.how.mean)}) / {_short(self.how.std)}")
        return f"images are {self.color}, {sized}{cut}, {numbers}, {self.layout}; data: in the recipe changes that"

    @property
    def _keeps_pixels(self) -> bool:
        return self.port.dtype == np.uint8

    def row(self, path: Path, where: str) -> Array:
        """[C, H, W] or [H, W, C], float32 or uint8. Raises DataError naming the image `where`."""
        image = _resized(_decoded(path, where, self.color), self.resize, self.how.interpolation)
        if self.crop is not None:
            image = _cropped(image, self.crop, where)
        pixels = np.asarray(image)
        pixels = pixels[..., np.newaxis] if pixels.ndim == 2 else pixels
        if self.color == "bgr":
            pixels = pixels[..., ::-1]
        if not self._keeps_pixels:
            mean, std = np.array(self.how.mean, np.float32), np.array(self.how.std, np.float32)
            pixels = (pixels * np.float32(self.how.scale) - mean) / std
        row = np.ascontiguousarray(pixels.transpose(2, 0, 1) if self.layout == "nchw" else pixels)
        wanted = (self.port.shape or ())[1:]
        if any(isinstance(dim, int) and dim != size for dim, size in zip(wanted, row.shape, strict=True)):
            raise DataError(f"{where} becomes {describe(row.dtype, row.shape)} and input '{self.port.name}' wants "
                            f"{describe(self.port.dtype, wanted)}; set resize: [H, W] under data: in the recipe")
        return row


def _steps(ports: Sequence[Port], how: Preprocessing) -> _Steps:
    port = _image_port(ports)
    dims = (port.shape or ())[1:]
    layout = how.layout or ("nhwc" if dims[0] not in (1, 3) and dims[2] in (1, 3) else "nchw")
    channels, height, width = dims if layout == "nchw" else (dims[2], dims[0], dims[1])
    color = how.color or ("gray" if channels == 1 else "rgb")
    if isinstance(channels, int) and channels != _CHANNELS[color]:
        raise DataError(f"input '{port.name}' takes {channels} channels in layout {layout} and {color} images have "
                        f"{_CHANNELS[color]}; set color and layout under data: in the recipe, or write an .npz")
    for key, values in (("mean", how.mean), ("std", how.std)):
        if len(values) not in (1, _CHANNELS[color]):
            raise DataError(f"data.{key} in the recipe has {len(values)} values and {color} images have "
                            f"{_CHANNELS[color]} channels; give one value, or one per channel")
    resize, crop = how.resize, how.crop
    if isinstance(height, int) and isinstance(width, int):
        if resize is None and crop is None:
            resize = (height, width)
        elif crop is None and resize is not None and len(resize) == 1:
            crop = (height, width)
    size = crop or (resize if resize is not None and len(resize) == 2 else None)
    if size is not None and any(isinstance(d, int) and d != s for d, s in zip((height, width), size, strict=True)):
        raise DataError(f"input '{port.name}' takes images of {describe(None, (height, width))[2:]} and the recipe "
                        f"makes them {list(size)}; correct resize and crop under data:")
    return _Steps(port, how, color, layout, resize, crop, size)


def _image_port(ports: Sequence[Port]) -> Port:
    port = ports[0]
    fits = port.shape is not None and len(port.shape) == 4 and port.dtype is not None and (
        port.dtype.kind == "f" or port.dtype == np.uint8)
    if len(ports) == 1 and fits:
        return port
    found = ", ".join(f"{p.name} {p}" for p in ports)
    raise DataError(f"images fill one float or uint8 input of four axes and the model takes {found}; write an .npz "
                    "with an array per input")


def _decoded(path: Path, where: str, color: str) -> Image.Image:
    """The image upright, in mode RGB, or L for one channel. Raises DataError."""
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as file:
            warnings.simplefilter("ignore")  # of odd metadata, large images, palettes with transparency
            image: Image.Image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I"):  # 16 bits of grey, which convert() would clip to 8
                image = Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8))
            image = image.convert("RGB")
    except Exception as error:  # damaged files make Pillow's decoders raise almost anything
        raise DataError(f"image {where} can't be read ({error or type(error).__name__}); copy it again or take it out "
                        "of the folder") from error
    if color == "gray":
        return image.convert("L")  # ITU-R 601 luma
    return image.convert("YCbCr").getchannel("Y") if color == "y" else image


def _resized(image: Image.Image, resize: tuple[int, ...] | None, interpolation: str) -> Image.Image:
    """To [H, W], or to a shorter side with the longer one rounded down (torchvision.transforms.Resize)."""
    from PIL.Image import Resampling

    if resize is None:
        return image
    width, height = image.size
    if len(resize) == 2:
        size = (resize[1], resize[0])
    else:
        side = resize[0]
        size = (side, side * height // width) if width <= height else (side * width // height, side)
    return image if size == image.size else image.resize(size, Resampling[interpolation.upper()])


def _cropped(image: Image.Image, crop: tuple[int, ...], where: str) -> Image.Image:
    """The centre; half pixels round to even (torchvision.transforms.CenterCrop, which would also pad)."""
    width, height = image.size
    if height < crop[0] or width < crop[1]:
        raise DataError(f"image {where} is {[height, width]} where {list(crop)} are to be cropped; set resize under "
                        "data: in the recipe")
    top, left = round((height - crop[0]) / 2), round((width - crop[1]) / 2)
    return image.crop((left, top, left + crop[1], top + crop[0]))


def _short(values: tuple[float, ...]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else str(list(values))


def _require_pillow() -> None:
    try:
        import PIL.Image  # noqa: F401
    except ImportError as error:
        raise DataError(f"a folder of images needs Pillow ({error}); pip install 'onnxq[images]'") from None


def _unreadable(error: OSError) -> None:
    raise DataError(f"folder {error.filename} can't be read ({error.strerror}); check its permissions") from error
