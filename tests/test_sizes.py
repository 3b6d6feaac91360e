"""Sizes as text."""

from __future__ import annotations

import pytest

from onnxq import sizes
from onnxq.errors import UsageError


@pytest.mark.parametrize(("given", "count"), [
    ("40MB", 40_000_000), ("1.5 GB", 1_500_000_000), ("512MiB", 512 * 2**20), ("1024", 1024), (" 3 kb ", 3000),
    ("7B", 7), ("2.GiB", 2 * 2**30)])
def test_read(given: str, count: int) -> None:
    assert sizes.parse(given) == count


@pytest.mark.parametrize("given", ["", "MB", "-1MB", "0", "0.0001 B", "40 Mb/s", "4e3", "forty"])
def test_what_is_no_size_is_refused(given: str) -> None:
    with pytest.raises(UsageError, match=r"write e\.g\. 40MB"):
        sizes.parse(given)


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (999, "999 B"), (519_300, "519.3 kB"), (999_950, "1.0 MB"),
                                              (4_580_000_000, "4.58 GB")])
def test_shown(count: int, shown: str) -> None:
    assert sizes.text(count) == shown
