"""The linter and the type checker find nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("call", [("ruff", "check", "."), ("mypy",)], ids=["ruff", "mypy"])
def test_checker_finds_nothing(call: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-m", *call], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
