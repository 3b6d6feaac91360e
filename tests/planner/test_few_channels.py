"""By how many channels a Conv is padded."""

from __future__ import annotations

import pytest
from lowering_support import CPU

from onnxq.planner.few_channels import missing
from onnxq.targets import WITHOUT_VNNI


@pytest.mark.parametrize(("filters", "wanted"), [
    ([16, 3, 3, 3], 1), ([16, 2, 3, 3], 2), ([16, 3, 1, 9], 1), ([16, 3, 2, 5], 0), ([16, 3, 7, 7], 0),
    ([16, 1, 3, 3], 0), ([16, 4, 3, 3], 0), ([16, 5, 3, 3], 0), ([16, 3, 9], 0), ([16, 3, 2, 2, 2], 0),
], ids=str)
def test_two_and_three_become_four_in_small_windows(filters: list[int], wanted: int) -> None:
    assert missing(filters, WITHOUT_VNNI) == wanted
    assert missing(filters, CPU) == 0
