"""What a run tells although nothing failed."""

from __future__ import annotations

import numpy as np

from compressor.delivery import shortfalls


def test_shortfalls_name_a_repair_that_made_it_worse() -> None:
    """A recovered model that is worse than the pruned one is told, a better one is not."""
    (told,) = shortfalls({"pruned": 20.0, "recovered": 25.0}, None, {})
    assert "from 20.00 to 25.00" in told
    assert shortfalls({"pruned": 20.0, "recovered": 15.0}, None, {}) == []


def test_shortfalls_name_a_share_that_was_rounded_down() -> None:
    """Seven zeros of ten rows of one are 70 %; six of ten are not, and the reason is given."""
    mask = np.array([False] * 6 + [True] * 4)
    (told,) = shortfalls({}, 0.7, {"w": mask})
    assert told.startswith("60.00 % of the pruned weights are zero, not 70 %")
    assert shortfalls({}, 0.6, {"w": mask}) == []
