"""DATA as a folder of images: decoding, preprocessing, labels, batches, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from onnxq.calibration.readers import open_data
from onnxq.errors import DataError
from onnxq.ports import Port
from onnxq.recipe import Preprocessing

pytest.importorskip("PIL", reason="Pillow is not installed; pip install 'onnxq[images]'")
from image_support import F32, U8, Array, codes, pixels, port, read, write

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


# ------------------------------------------------------------------ values


def test_pixels_of_the_right_size_are_only_normalized(tmp_path: Path) -> None:
    image = pixels(2, 3, 3)
    write(tmp_path, a=image)
    (plain,) = read(tmp_path, port("N", 3, 2, 3))
    assert (plain.shape, plain.dtype, plain.flags.c_contiguous) == ((1, 3, 2, 3), F32, True)
    np.testing.assert_allclose(plain[0], image.transpose(2, 0, 1) / 255, rtol=1e-6)
    (normal,) = read(tmp_path, port("N", 3, 2, 3), Preprocessing(**IMAGENET))
    wanted = (image / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    np.testing.assert_allclose(normal[0], wanted.transpose(2, 0, 1), rtol=1e-5, atol=1e-6)
    (shifted,) = read(tmp_path, port("N", 3, 2, 3), Preprocessing(scale=1.0, mean=(127.0,), std=(128.0,)))
    np.testing.assert_array_equal(shifted[0], ((image.astype(np.float32) - 127) / 128).transpose(2, 0, 1))


def test_color_and_layout(tmp_path: Path) -> None:
    image = pixels(5, 4, 3)
    write(tmp_path, a=image)
    np.testing.assert_array_equal(codes(tmp_path, port("N", 5, 4, 3)), image)  # the channels' axis shows the layout
    np.testing.assert_array_equal(codes(tmp_path, port("N", 5, 4, 3), color="bgr"), image[..., ::-1])
    np.testing.assert_array_equal(codes(tmp_path, port("N", None, None, None), layout="nhwc"), image)
    np.testing.assert_array_equal(codes(tmp_path, port("N", None, None, None)), image.transpose(2, 0, 1))
    luma = image @ np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, full range
    for to, how in ((port("N", 1, 5, 4), {}), (port("N", 1, 5, 4), {"color": "y"}), (port("N", 5, 4, 1), {})):
        found = codes(tmp_path, to, **how).reshape(5, 4)
        assert np.abs(found - luma).max() <= 1
        assert (found == np.rint(found)).all()


def test_dtypes_of_the_input(tmp_path: Path) -> None:
    image = pixels(2, 2, 3)
    write(tmp_path, a=image)
    (half,) = read(tmp_path, port("N", 3, 2, 2, dtype=np.dtype(np.float16)))
    np.testing.assert_array_equal(half[0], (image * np.float32(1 / 255)).transpose(2, 0, 1).astype(np.float16))
    (raw,) = read(tmp_path, port("N", 2, 2, 3, dtype=U8), Preprocessing(**IMAGENET))
    np.testing.assert_array_equal(raw[0], image, strict=True)


@pytest.mark.parametrize("size", [(3, 5), (11, 7), (7, 9), (20, 31)])
def test_nearest_takes_the_pixel_under_each_centre(tmp_path: Path, size: tuple[int, int]) -> None:
    image = pixels(7, 9, 3)
    write(tmp_path, a=image)
    rows, columns = (np.floor((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, (7, 9), strict=True))
    found = codes(tmp_path, port("N", *size, 3), interpolation="nearest", layout="nhwc")
    np.testing.assert_array_equal(found, image[rows][:, columns])


def triangle(x: Array) -> Array:
    return np.maximum(0, 1 - np.abs(x))


def cubic(x: Array) -> Array:
    x = np.abs(x)
    a = -0.5
    inner, outer = ((a + 2) * x - (a + 3)) * x * x + 1, (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def antialiased(image: Array, axis: int, size: int, kernel: Callable[[Array], Array]) -> Array:
    """Resampling by a kernel that widens with the scale, as torchvision's Resize(antialias=True), in codes."""
    scale = image.shape[axis] / size
    centres = (np.arange(size) + 0.5) * scale
    weights = kernel((np.arange(image.shape[axis]) + 0.5 - centres[:, None]) / max(scale, 1))
    weights /= weights.sum(axis=1, keepdims=True)
    moved = np.tensordot(weights, image, axes=(1, axis))
    return np.clip(np.rint(np.moveaxis(moved, 0, axis)), 0, 255)


@pytest.mark.parametrize("size", [(8, 8), (5, 21), (40, 50), (24, 10)])
@pytest.mark.parametrize(("interpolation", "kernel"), [("bilinear", triangle), ("bicubic", cubic)])
def test_resampling_follows_the_antialiased_reference(
    tmp_path: Path, size: tuple[int, int], interpolation: str, kernel: Callable[[Array], Array]
) -> None:
    image = pixels(24, 31, 3)
    write(tmp_path, a=image)
    wanted = antialiased(antialiased(image, 1, size[1], kernel), 0, size[0], kernel)
    # The kernel reaches as many pixels as its support, at the edge of which two roundings may differ by one code.
    found = codes(tmp_path, port("N", *size, 3), interpolation=interpolation)
    assert np.abs(found - wanted).max() <= 1
    assert np.mean(found != wanted) < 0.05


@pytest.mark.parametrize(("shape", "scaled"), [((30, 47), (16, 25)), ((47, 30), (25, 16)), ((16, 21), (16, 21))])
def test_shorter_side_then_centre_crop(tmp_path: Path, shape: tuple[int, int], scaled: tuple[int, int]) -> None:
    """The usual evaluation of classifiers: Resize(16), CenterCrop(12); 25 is floor(16 * 47 / 30)."""
    image = pixels(*shape, 3)
    write(tmp_path, a=image)
    resized = antialiased(antialiased(image, 1, scaled[1], triangle), 0, scaled[0], triangle)
    top, left = (round((side - 12) / 2) for side in scaled)
    wanted = resized[top : top + 12, left : left + 12]
    for how in ({"resize": (16,), "crop": (12, 12)}, {"resize": (16,)}):  # the input's size is the crop by default
        assert np.abs(codes(tmp_path, port("N", 12, 12, 3), **how) - wanted).max() <= 1
    np.testing.assert_array_equal(
        codes(tmp_path, port("N", None, None, 3), crop=(12, 12)),
        image[round((shape[0] - 12) / 2) :, round((shape[1] - 12) / 2) :][:12, :12],
    )
    free = codes(tmp_path, port("N", None, None, 3), resize=(16,))
    assert free.shape == (*scaled, 3)


# ------------------------------------------------------------------ rows, batches, labels


def test_rows_come_in_the_order_of_their_paths_in_batches(tmp_path: Path) -> None:
    names = ["b", "a__z", "a", "c__deep__x", "a__b"]
    write(tmp_path, **{name: np.full((2, 2), k, np.uint8) for k, name in enumerate(names)})
    data = open_data(tmp_path, [port("N", 1, 2, 2)], how=Preprocessing(scale=1.0))
    assert (data.name, data.rows, data.labels, data.random) == (tmp_path.name, 5, None, False)
    for _ in range(2):
        batches = list(data.batches(batch=2))
        assert [(b.rows, b.first_row, b.labels) for b in batches] == [(2, 0, None), (2, 2, None), (1, 4, None)]
        seen = [names[int(v)] for b in batches for v in b.feed["x"][:, 0, 0, 0]]
        assert seen == ["a__b", "a__z", "a", "b", "c__deep__x"]  # a/ comes before a.png
    assert [b.rows for b in data.batches(batch=2, samples=3)] == [2, 1]


def test_sub_folders_are_labels(tmp_path: Path) -> None:
    write(tmp_path, **{f"{name}__{k}": pixels(2, 2) for name in ("dog", "ant", "cat") for k in range(2)})
    (tmp_path / "cow").mkdir()
    (tmp_path / ".cache").mkdir()
    data = open_data(tmp_path, [port(4, 1, 2, 2)])
    assert data.labels is not None
    assert (data.rows, data.labels.dtype, data.labels.tolist()) == (4, np.int64, [0, 0, 1, 1])
    assert [b.labels.tolist() for b in data.batches() if b.labels is not None] == [[0, 0, 1, 1]]
    said = "labels are the places of the 4 sub-folders in their order: 0 = ant, 1 = cat, 2 = cow, 3 = dog"
    assert said in data.notes
    assert any(n.startswith("2 of 6 images") for n in data.notes)
    assert all("sub-folders" not in n for n in open_data(tmp_path / "dog", [port("N", 1, 2, 2)]).notes)
    whole = open_data(tmp_path, [port("N", 1, 2, 2)])
    assert whole.labels is not None
    assert whole.labels.tolist() == [0, 0, 1, 1, 3, 3]


@pytest.mark.parametrize("names", [["a__1", "a__2"], ["a__1", "b__1", "c"], ["a__1", "b__deep__1"]])
def test_other_folders_give_no_labels(tmp_path: Path, names: list[str]) -> None:
    write(tmp_path, **{name: pixels(2, 2) for name in names})
    data = open_data(tmp_path, [port("N", 1, 2, 2)])
    assert data.labels is None
    assert len(data.notes) == 1


def test_what_was_done_is_said(tmp_path: Path) -> None:
    write(tmp_path, a=pixels(4, 4, 3))
    notes = open_data(tmp_path, [port("N", 3, 2, 2)], how=Preprocessing(**IMAGENET, resize=(3,))).notes
    assert notes == (
        "images are rgb, resized to [3] (bilinear), cropped to [2, 2], (pixel * 0.00392157 - [0.485, 0.456, 0.406]) / "
        "[0.229, 0.224, 0.225], nchw; data: in the recipe changes that",
    )
    notes = open_data(tmp_path, [port("N", None, None, 3, dtype=U8)]).notes
    assert "rgb, in their own size, pixels as they are, nhwc" in notes[0]


def test_fixed_batches(tmp_path: Path) -> None:
    write(tmp_path, **{f"i{k:02d}": np.full((2, 2), k, np.uint8) for k in range(11)})
    data = open_data(tmp_path, [port(4, 1, 2, 2)])
    assert data.rows == 8
    assert [b.rows for b in data.batches(batch=3)] == [4, 4]
    assert [b.rows for b in data.batches(samples=7)] == [4]
    with pytest.raises(DataError, match=r"the first 3 images .* fill no batch"):
        list(data.batches(samples=3))
    with pytest.raises(DataError, match="has 11 images and the model takes exactly 12"):
        open_data(tmp_path, [port(12, 1, 2, 2)])


def test_own_sizes_are_fed_one_by_one(tmp_path: Path) -> None:
    shapes = [(4, 6), (4, 6), (3, 9)]
    write(tmp_path, **{f"i{k}": pixels(*shape, seed=k) for k, shape in enumerate(shapes)})
    rows = read(tmp_path, port("N", 1, "H", "W"), Preprocessing(scale=1.0))
    assert [row.shape for row in rows] == [(1, 1, *shape) for shape in shapes]
    for k, (row, shape) in enumerate(zip(rows, shapes, strict=True)):
        np.testing.assert_array_equal(row[0, 0], pixels(*shape, seed=k))
    assert [r.shape for r in read(tmp_path, port(1, 1, "H", "W"), Preprocessing(resize=(3,)))] == [
        (1, 1, 3, 4), (1, 1, 3, 4), (1, 1, 3, 9)]  # fmt: skip
    assert [r.shape for r in read(tmp_path, port("N", 1, "H", "W"), Preprocessing(resize=(3, 5)))] == [(3, 1, 3, 5)]
    with pytest.raises(DataError, match=r"takes 2 images at once, which then need one size; set resize"):
        open_data(tmp_path, [port(2, 1, "H", "W")])
    with pytest.raises(DataError, match=r"i2\.png becomes float32 \[1, 3, 9\] and input 'x' wants float32 \[1, 4, W\]"):
        read(tmp_path, port("N", 1, 4, "W"))


def test_memory_stays_flat(tmp_path: Path) -> None:
    """A pass over 48 images of 0.75 MB as float32 holds two batches of two, and the images of one in the making."""
    write(tmp_path, **{f"i{k:02d}": np.full((4, 4, 3), k, np.uint8) for k in range(48)})
    tracemalloc.start()
    try:
        rows = sum(b.rows for b in open_data(tmp_path, [port("N", 3, 256, 256)]).batches(batch=2))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert rows == 48
    assert peak < 9 << 20


# ------------------------------------------------------------------ refused


def test_images_beside_arrays(tmp_path: Path) -> None:
    write(tmp_path, a=pixels(2, 2))
    np.savez(tmp_path / "b.npz", x=np.zeros((1, 1, 2, 2), np.float32))
    with pytest.raises(DataError, match="has both arrays and images; leave one kind in it"):
        open_data(tmp_path, [port("N", 1, 2, 2)])
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.npz").rename(tmp_path / "sub" / "b.npz")
    with pytest.raises(DataError, match=r"has images and also arrays .sub/b\.npz.; leave one kind in it"):
        open_data(tmp_path, [port("N", 1, 2, 2)])


def test_images_below_a_folder_of_arrays_are_no_data(tmp_path: Path) -> None:
    write(tmp_path, plots__a=pixels(2, 2))
    np.savez(tmp_path / "b.npz", x=np.ones((1, 1, 2, 2), np.float32))
    np.testing.assert_array_equal(read(tmp_path, port("N", 1, 2, 2))[0], np.ones((1, 1, 2, 2)))


@pytest.mark.parametrize(
    ("ports", "message"),
    [
        ([Port("x", F32, ("N", 3, 8, 8)), Port("y", F32, ("N", 2))], r"takes x float32 .*, y float32 \[N, 2\]; write"),
        ([Port("x", F32, ("N", 3))], "images fill one float or uint8 input of four axes"),
        ([Port("x", F32, None)], "four axes"),
        ([Port("x", np.dtype(np.int64), ("N", 3, 8, 8))], "four axes"),
        ([Port("x", None, ("N", 3, 8, 8))], "four axes"),
        ([Port("x", F32, ("N", 4, 8, 8))], "takes 4 channels in layout nchw and rgb images have 3"),
    ],
)
def test_models_that_take_something_else(tmp_path: Path, ports: list[Port], message: str) -> None:
    write(tmp_path, a=pixels(8, 8))
    with pytest.raises(DataError, match=message):
        open_data(tmp_path, ports)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"color": "gray"}, "takes 3 channels in layout nchw and gray images have 1; set color"),
        ({"layout": "nhwc"}, "takes 9 channels in layout nhwc and rgb images have 3"),
        ({"mean": (1.0, 2.0)}, r"data\.mean in the recipe has 2 values and rgb images have 3 channels"),
        ({"std": (1.0,) * 4}, r"data\.std in the recipe has 4 values"),
        ({"resize": (9, 8)}, r"takes images of \[8, 9\] and the recipe makes them \[9, 8\]; correct resize and crop"),
        ({"resize": (8, 9), "crop": (4, 4)}, r"makes them \[4, 4\]"),
        ({"crop": (8, 9)}, r"image a\.png is \[8, 8\] where \[8, 9\] are to be cropped; set resize"),
    ],
)
def test_settings_that_do_not_fit(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    write(tmp_path, a=pixels(8, 8))
    with pytest.raises(DataError, match=message):
        read(tmp_path, port("N", 3, 8, 9), Preprocessing(**how))


def test_without_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, a=pixels(2, 2))
    for name in [name for name in sys.modules if name.split(".")[0] == "PIL"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs Pillow .*; pip install 'onnxq\[images\]'"):
        open_data(tmp_path, [port("N", 1, 2, 2)])


def test_extras_are_imported_only_for_use(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((1, 2), np.float32))
    code = (
        "import sys, numpy, onnxq\n"
        "from onnxq.calibration.readers import open_data\n"
        "from onnxq.ports import Port\n"
        f"open_data({str(tmp_path / 'a.npz')!r}, [Port('x', numpy.dtype('float32'), ('N', 2))])\n"
        "sys.exit(bool({'PIL', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
