"""GPTQ that was interrupted goes on where it ended."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from onnxq import compiler
from onnxq.planner import block_rounding

MODEL = Path(__file__).parents[2] / "models" / "decoder"
DONE = 3  # steps, before the interruption


def compiled(output: Path) -> bytes:
    compiler.compile(MODEL / "model.onnx", output, scheme="w4a16", calib=MODEL / "calib.npz", samples=16,
                     measure=False, threads=1)
    return output.read_bytes()


def test_an_interrupted_compilation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step, output, taken = block_rounding._step, tmp_path / "model.onnx", 0
    stop_after: int | None = None

    def counted(*args: Any) -> None:
        nonlocal taken
        if taken == stop_after:
            raise KeyboardInterrupt
        taken += 1
        step(*args)

    monkeypatch.setattr(block_rounding, "_step", counted)
    whole, steps = compiled(tmp_path / "whole.onnx"), taken
    assert not list(tmp_path.glob("*.partial"))
    taken, stop_after = 0, DONE
    with pytest.raises(KeyboardInterrupt):
        compiled(output)
    assert not output.exists()
    assert (tmp_path / "model.onnx.partial").is_dir()
    taken, stop_after = 0, None
    assert compiled(output) == whole
    assert taken == steps - DONE
    assert not (tmp_path / "model.onnx.partial").exists()
