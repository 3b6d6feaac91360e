"""Image files as Pillow reads them: formats, orientation, modes, damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from onnxq.errors import DataError
from onnxq.recipe import Preprocessing

pytest.importorskip("PIL", reason="Pillow is not installed; pip install 'onnxq[images]'")
from image_support import Array, codes, pixels, port, read, write
from PIL import Image


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.swapaxes(0, 1)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: a[::-1, ::-1].swapaxes(0, 1)),
        (8, lambda a: np.rot90(a)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_exif_orientation(
    tmp_path: Path, orientation: int, upright: Callable[[Array], Array], suffix: str
) -> None:
    blocks = np.kron(np.array([[10, 90, 170], [50, 130, 250]], np.uint8), np.ones((16, 16), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(blocks).convert("RGB").save(tmp_path / f"a.{suffix}", exif=exif, quality=100)
    found = codes(tmp_path, port("N", None, None, 1))[..., 0]
    wanted = upright(blocks)
    assert found.shape == wanted.shape
    assert np.abs(found[8::16, 8::16] - wanted[8::16, 8::16]).max() <= 6  # codecs lose a little


def test_every_suffix_and_lossless_format(tmp_path: Path) -> None:
    image = pixels(6, 5, 3)
    for name in ("a.png", "b.BMP", "c.webp"):
        Image.fromarray(image).save(tmp_path / name, lossless=True)
    smooth = np.repeat(np.arange(0, 250, 50, dtype=np.uint8)[None, :, None], 6, 0).repeat(3, 2)
    for name in ("d.jpg", "e.JPEG"):
        Image.fromarray(smooth).save(tmp_path / name, quality=100)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._a.png").write_bytes(b"nor this")
    write(tmp_path, **{".thumbnails__a": image})
    rows = np.concatenate(read(tmp_path, port("N", 6, 5, 3), Preprocessing(scale=1.0), batch=2))
    assert len(rows) == 5
    np.testing.assert_array_equal(rows[:3], np.stack([image] * 3))
    assert np.abs(rows[3:] - smooth).max() <= 4


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path: Path) -> None:
    values = np.array([[0, 128, 129, 256, 257], [1000, 32768, 40000, 65407, 65535]], np.uint16)
    write(tmp_path, a=Image.fromarray(values))
    wanted = np.rint(values / 65535 * 255)
    np.testing.assert_array_equal(codes(tmp_path, port("N", 1, 2, 5))[0], wanted)
    np.testing.assert_array_equal(codes(tmp_path, port("N", 3, 2, 5)), np.stack([wanted] * 3))


def palette(*, transparency: bytes | None = None) -> Image.Image:
    image = Image.fromarray(np.array([[0, 1, 2], [2, 1, 0]], np.uint8)).convert("P")
    image.putdata([0, 1, 2, 2, 1, 0])
    image.putpalette([250, 10, 20, 30, 240, 40, 50, 60, 230])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def test_modes_become_the_same_pixels(tmp_path: Path) -> None:
    colors = np.array([[250, 10, 20], [30, 240, 40], [50, 60, 230]], np.uint8)
    wanted = colors[np.array([[0, 1, 2], [2, 1, 0]])]
    alpha = np.dstack([wanted, np.array([[0, 128, 255], [1, 2, 3]], np.uint8)])
    write(tmp_path, a=palette(), b=palette(transparency=b"\x00\x80\xff"), c=alpha, d=wanted)
    rows = read(tmp_path, port("N", 2, 3, 3), Preprocessing(scale=1.0))[0]
    np.testing.assert_array_equal(rows, np.stack([wanted] * 4))


def test_bilevel_and_grey_with_alpha(tmp_path: Path) -> None:
    grey = np.array([[0, 255, 255], [255, 0, 0]], np.uint8)
    write(tmp_path, a=Image.fromarray(grey).convert("1"), b=np.dstack([grey, 255 - grey]))
    rows = read(tmp_path, port("N", 1, 2, 3), Preprocessing(scale=1.0))[0]
    np.testing.assert_array_equal(rows[:, 0], np.stack([grey] * 2))


def test_damaged_images_are_named(tmp_path: Path) -> None:
    write(tmp_path, good=pixels(32, 32, 3), sub__bad=pixels(32, 32, 3))
    path = tmp_path / "sub" / "bad.png"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2], whole[:20], b"GIF89a" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"image sub/bad\.png can't be read .*; copy it again"):
            read(tmp_path, port("N", 3, 8, 8))


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "webp"])
def test_any_flipped_byte_gives_feeds_or_a_data_error(tmp_path: Path, suffix: str) -> None:
    path, rng = tmp_path / f"a.{suffix}", np.random.default_rng(0)
    Image.fromarray(pixels(8, 8, 3)).save(path)
    whole = path.read_bytes()
    refused = 0
    for _ in range(150):
        data = bytearray(whole)
        data[rng.integers(len(data))] = rng.integers(256)
        path.write_bytes(data)
        try:
            assert read(tmp_path, port("N", 3, 8, 8))[0].shape == (1, 3, 8, 8)
        except DataError:
            refused += 1
    assert refused > 0


def test_files_of_another_format_are_not_read_whatever_their_name(tmp_path: Path) -> None:
    Image.fromarray(pixels(4, 4, 3)).save(tmp_path / "a.png", format="TIFF")
    with pytest.raises(DataError, match=r"image a\.png can't be read"):
        read(tmp_path, port("N", 3, 4, 4))
