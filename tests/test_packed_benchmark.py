"""The benchmark of packed models: what it measures of which model, and that it finds outputs that differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from packing_support import examples, reader
from packing_support import packed as pair

from benchmarks import packed

QUICK = ("--rounds", "1", "--block-seconds", "0.01")


def test_a_packed_model_beside_the_dense_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, small, _ = pair(examples()["exceptions"], tmp_path)
    assert packed.main([str(dense), str(small), "--json", str(tmp_path / "found.json"), *QUICK]) == 0
    [row] = json.loads((tmp_path / "found.json").read_text())["packed"]
    assert row["equal"]
    assert row["bytes"] == small.stat().st_size
    assert row["size_ratio"] == small.stat().st_size / dense.stat().st_size
    for load in (row["dense"], row["packed"]):
        assert 0 < load["empty_bytes"] <= load["peak_bytes"]
        assert load["seconds"] > 0
    assert row["load_ratio"] == row["packed"]["seconds"] / row["dense"]["seconds"]
    assert row["low"] <= row["latency"] <= row["high"]
    shown = capsys.readouterr().out
    assert "packed.onnx" in shown
    assert "equal" in shown


def test_medians_of_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models by turns, in reverse order every second round."""
    called: list[str] = []

    class Done:
        def __init__(self, model: str) -> None:
            called.append(model)
            number = float(len(called))
            self.stdout = json.dumps({"seconds": number, "processor_seconds": 0, "empty_bytes": 1, "peak_bytes": 2})

    monkeypatch.setattr(packed.subprocess, "run", lambda call, **_: Done(call[3]))
    a, b = packed.loads((Path("a"), Path("b")), 3, 1)
    assert called == ["a", "b", "b", "a", "a", "b"]
    assert (a.seconds, b.seconds) == (4.0, 3.0)


def test_outputs_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = []
    for k in range(2):
        paths.append(tmp_path / f"{k}.onnx")
        onnx.save(reader(examples()["exceptions"].weight + np.int8(k)), paths[-1])
    assert packed.main([*map(str, paths), *QUICK]) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["one.onnx"], ["a.onnx", "b.onnx", "--json", "nowhere/x.json"]])
def test_wrong_usage(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        packed.main(arguments)
    assert caught.value.code == 2
    assert capsys.readouterr().err
