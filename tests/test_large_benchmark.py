"""The benchmark of large models: the decoder that it writes, and what it says of a process that it watches."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import run
from onnx import numpy_helper

sys.path.append(str(Path(__file__).parents[1]))  # the package stands beside the tests and is not installed

from benchmarks import decoder, large

TINY = decoder.Shape(layers=2, hidden=48, feed_forward=80, heads=6, shared=2, vocabulary=50)
SMALL = decoder.Shape(layers=1, hidden=256, feed_forward=512, heads=8, shared=2, vocabulary=300)


# ------------------------------------------------------------------ the decoder


def weights_of(path: Path) -> dict[str, Any]:
    return {t.name: numpy_helper.to_array(t).astype(np.float64) for t in onnx.load(path).graph.initializer}


def by_hand(tokens: Any, weights: dict[str, Any], shape: decoder.Shape) -> Any:
    """Logits of one row of tokens in float64, head by head and token by token."""
    each = shape.hidden // shape.heads

    def norm(x: Any, name: str) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"]

    x = weights["embedding"][tokens]
    for layer in range(shape.layers):
        w = {k.split(".")[-1]: v for k, v in weights.items() if k.startswith(f"layers.{layer}.")}
        n = norm(x, f"layers.{layer}.norm1")
        q, k, v = (n @ w[f"{part}_proj"] for part in "qkv")
        mixed = np.zeros_like(q)
        for head in range(shape.heads):
            own = slice(head * each, (head + 1) * each)
            group = head // (shape.heads // shape.shared)
            of = slice(group * each, (group + 1) * each)
            for at in range(len(tokens)):
                scores = np.exp(k[:at + 1, of] @ q[at, own] / np.sqrt(each))
                mixed[at, own] = scores / scores.sum() @ v[:at + 1, of]
        x = x + mixed @ w["o_proj"]
        n = norm(x, f"layers.{layer}.norm2")
        gate = n @ w["gate_proj"]
        x = x + (gate / (1 + np.exp(-gate)) * (n @ w["up_proj"])) @ w["down_proj"]
    return norm(x, "norm") @ weights["lm_head"]


def test_the_decoder_is_what_it_says(tmp_path: Path) -> None:
    path = decoder.write(tmp_path / "made", TINY)
    onnx.checker.check_model(str(path), full_check=True)
    weights = weights_of(path)
    tokens = decoder.token_ids(2, 7, TINY)
    logits = run(path, {"input_ids": tokens})["logits"]
    for row, found in zip(tokens, logits, strict=True):
        # float32 beside float64: a few hundred products summed, relative to the largest logit
        np.testing.assert_allclose(found, by_hand(row, weights, TINY), rtol=0, atol=1e-5 * np.abs(logits).max())


def test_its_weights(tmp_path: Path) -> None:
    path = decoder.write(tmp_path / "a", SMALL)
    weights = weights_of(path)
    sizes = dict(SMALL.weights())
    assert {k: weights[k].shape for k in sizes} == sizes
    assert SMALL.count() == sum(weights[k].size for k in sizes)
    for name, shape in sizes.items():
        # the standard error of a deviation is 1 / sqrt(2 n) of it; five of them
        error = 5 / np.sqrt(2 * weights[name].size)
        assert weights[name].std() * np.sqrt(shape[0]) == pytest.approx(1, rel=error), name
    proto = onnx.load(path, load_external_data=False)
    assert path.stat().st_size < 100_000
    offsets = [int(e.value) for t in proto.graph.initializer for e in t.external_data if e.key == "offset"]
    assert len(offsets) == len(sizes)
    assert all(offset % 4096 == 0 for offset in offsets)
    again, other = decoder.write(tmp_path / "b", SMALL), decoder.write(tmp_path / "c", SMALL, seed=1)
    data = [p.with_name(decoder.DATA).read_bytes() for p in (path, again, other)]
    assert data[0] == data[1]
    assert data[0] != data[2]


def test_pieces_of_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decoder.write(tmp_path / "a", SMALL).with_name(decoder.DATA).stat().st_size
    monkeypatch.setattr(decoder, "_CHUNK", 1000)
    path = decoder.write(tmp_path / "b", SMALL)
    assert path.with_name(decoder.DATA).stat().st_size == whole
    assert abs(weights_of(path)["lm_head"]).min(axis=0).min() > 0, "no hole was left"


@pytest.mark.parametrize("gigabytes", [2.0, 12.0, 30.0])
def test_the_size_that_was_asked_for(gigabytes: float) -> None:
    shape = decoder.of_size(gigabytes)
    each = 4 * (decoder.Shape(layers=2).count() - decoder.Shape(layers=1).count())
    assert gigabytes * 1e9 - each < 4 * shape.count() <= gigabytes * 1e9


def test_one_layer_at_least() -> None:
    assert decoder.of_size(0.001).layers == 1


# ------------------------------------------------------------------ measuring


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return decoder.write(tmp_path_factory.mktemp("decoder"), SMALL)


def test_the_floor(small: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    found = large.measure(small, output, None)
    assert found.weights == SMALL.count() - sum(n for n in (256 * 64,) * 2), "keys and values are too small to count"
    assert list(found.stages) == ["load", "edit", "save"]
    assert 0 < sum(found.stages.values()) < found.seconds
    assert found.cpu_seconds > 0
    if sys.platform == "linux":
        assert found.peak_bytes > found.mapped_bytes > 0
    assert found.weights // 2 < found.output_bytes < found.weights
    tokens = decoder.token_ids(1, 5, SMALL)
    rounded, exact = (run(p, {"input_ids": tokens})["logits"] for p in (output, small))
    assert np.abs(rounded - exact).max() > 0
    correlation = float(np.corrcoef(rounded.ravel(), exact.ravel())[0, 1])
    assert correlation > 0.8, "4 bits, half a standard deviation apart"


def test_the_floor_rounds_every_weight(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "_BLOCK", 10_000)
    monkeypatch.setattr(large, "_PIECE", 999)
    assert list(large.write_floor(small, tmp_path / "out.onnx")) == ["load", "edit", "save"]
    saved = {t.name: t for t in onnx.load(tmp_path / "out.onnx").graph.initializer}
    for name, weight in weights_of(small).items():
        if weight.size >= 1 << 16:
            factor = np.float32(2 / (weight.shape[0] ** -0.5))
            wanted = np.clip(np.rint(weight.astype(np.float32) * factor), -8, 7)
            np.testing.assert_array_equal(numpy_helper.to_array(saved[f"{name}.q"]).astype(np.float32), wanted)


def test_a_compilation(tmp_path: Path) -> None:
    model = Path(__file__).parents[1] / "models" / "digits_cnn" / "model.onnx"
    found = large.measure(model, tmp_path / "out.onnx", ["--scheme", "w8a8-dynamic", "--no-measure"])
    assert {"load", "save"} <= found.stages.keys()
    assert sum(found.stages.values()) < found.seconds
    assert (tmp_path / "out.onnx").exists()


def test_a_compilation_that_fails(tmp_path: Path) -> None:
    model = Path(__file__).parents[1] / "models" / "digits_cnn" / "model.onnx"
    with pytest.raises(RuntimeError, match="no scheme 'none-such'"):
        large.measure(model, tmp_path / "out.onnx", ["--scheme", "none-such"])


def test_speed_and_bounds() -> None:
    found = large.Run(weights=1_200_000_000, seconds=20.0, cpu_seconds=30.0, stages={"load": 1.0, "save": 18.5},
                      peak_bytes=1_999_000_000, mapped_bytes=500_000_000, output_bytes=700_000_000)
    assert (found.speed, found.held) == (60e6, True)
    text = large.described(found)
    assert "1200 M weights in 20.0 s: 60 M weights/s; 30.0 s on the processors" in text
    assert "peak 1999 MB, of it mapped 500 MB; written 700 MB" in text
    assert "load 1.0, save 18.5" in text
    assert "held" in text
    for name, worse in (("seconds", 20.1), ("peak_bytes", 2_000_000_000)):
        missed = large.Run(**{**vars(found), name: worse})
        assert not missed.held
        assert "MISSED" in large.described(missed)


def test_from_the_command_line(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                               capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(decoder, "of_size", lambda gigabytes: TINY)
    assert large.main(["--make", str(tmp_path / "made")]) == 0
    assert (tmp_path / "made" / "model.onnx").exists()
    assert f"{TINY.count() / 1e6:.0f} M weights" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        large.main([])
    capsys.readouterr()
    monkeypatch.setattr(large, "LEAST_SPEED", 0.0)
    monkeypatch.setattr(large, "MOST_BYTES", 1e12)
    assert large.main([str(small), "--floor", "--cold", "--json", str(tmp_path / "found.json")]) == 0
    told = json.loads((tmp_path / "found.json").read_text())
    assert (told["held"], list(told["stages"])) == (True, ["load", "edit", "save"])
    assert "M weights/s" in capsys.readouterr().out
    assert [p.name for p in sorted(small.parent.iterdir())] == ["model.onnx", decoder.DATA], "what was written is gone"
    monkeypatch.setattr(large, "LEAST_SPEED", 1e18)
    assert large.main([str(small), "--floor"]) == 1
