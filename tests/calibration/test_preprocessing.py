"""The recipe's `data`: its YAML, what it refuses, and that compile hands it on."""

from __future__ import annotations

from pathlib import Path

import pytest

from onnxq.compiler import compile
from onnxq.errors import DataError, RecipeError
from onnxq.recipe import Preprocessing, Recipe, parse
from onnxq.schemes import scheme

MODELS = Path(__file__).resolve().parents[2] / "models"


def test_preprocessing_reads_back_from_yaml() -> None:
    how = Preprocessing(
        (256,), (224, 224), "bgr", 1.0, (1.0, 2.0, 3.0), (4.0,), "nhwc", "bicubic", "tokenizer.json", 64, "lines"
    )
    for data in (Preprocessing(), how):
        recipe = Recipe(scheme("w8a8"), data=data)
        assert parse(recipe.to_yaml()) == recipe
    written = parse("{scheme: w8a8, data: {resize: [8], mean: [1, 2, 3]}}").data
    assert written == Preprocessing((8,), mean=(1.0, 2.0, 3.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{color: pink}", r"data\.color: 'pink' is not known; use rgb, bgr, gray, y"),
        ("{layout: chw}", r"data\.layout: 'chw'"),
        ("{interpolation: lanczos}", r"data\.interpolation"),
        ("{mode: words}", r"data\.mode: 'words' is not known; use lines, stream"),
        ("{resize: []}", r"data\.resize: \[\] is no size"),
        ("{resize: [1, 2, 3]}", r"data\.resize"),
        ("{resize: [0]}", r"data\.resize"),
        ("{resize: 8}", r"data\.resize: a list is wanted"),
        ("{crop: [8]}", r"data\.crop: \[8\] is no size; give \[H, W\]"),
        ("{length: 0}", r"data\.length: 0"),
        ("{std: [1, 0, 1]}", r"data\.std: .* give finite numbers other than 0"),
        ("{mean: []}", r"data\.mean"),
        ("{scale: .nan}", r"data\.scale"),
        ("{size: 3}", r"data\.size: there is no such key"),
    ],
)
def test_recipes_that_are_refused(data: str, message: str) -> None:
    with pytest.raises(RecipeError, match=f"^{message}"):
        parse(f"{{scheme: w8a8, data: {data}}}")


def test_compile_hands_the_recipe_to_the_reader(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed; pip install 'onnxq[images]'")
    image.new("L", (8, 8)).save(tmp_path / "a.png")
    recipe = Recipe(scheme("w8a8"), data=Preprocessing(mean=(1.0, 2.0)))
    with pytest.raises(DataError, match=r"data\.mean in the recipe has 2 values"):
        compile(MODELS / "digits_cnn" / "model.onnx", tmp_path / "out.onnx", recipe=recipe, calib=tmp_path)
