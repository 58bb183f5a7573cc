"""What a run tells although nothing failed."""

from __future__ import annotations

import numpy as np

from compressor.delivery import shortfalls
from compressor.reporting import count_masks, share_of_zeros


def test_shortfalls_name_a_repair_that_made_it_worse() -> None:
    """A recovered model that is worse than the pruned one is told, a better one is not."""
    (told,) = shortfalls({"pruned": 20.0, "recovered": 25.0}, None, 0.5)
    assert "from 20.00 to 25.00" in told
    assert shortfalls({"pruned": 20.0, "recovered": 15.0}, None, 0.5) == []


def test_shortfalls_name_a_share_that_was_rounded_down() -> None:
    """Seven zeros of ten weights are 70 %; six of ten are not, and the reason is given."""
    sparsity = share_of_zeros(count_masks({"w": np.arange(10) >= 6}).values())
    (told,) = shortfalls({}, 0.7, sparsity)
    assert told.startswith("60.00 % of the pruned weights are zero, not 70 %")
    assert shortfalls({}, 0.6, sparsity) == []


def test_share_of_zeros_weighs_masks_by_their_size() -> None:
    """A small matrix without any weight left does not outweigh a large one that is whole; no mask, no zeros."""
    counts = count_masks({"a": np.zeros((2, 5), bool), "b": np.ones((3, 10), bool)})
    assert [(count.shape, count.kept) for count in counts.values()] == [((2, 5), 0), ((3, 10), 30)]
    assert share_of_zeros(counts.values()) == 0.25
    assert share_of_zeros([]) == 0.0
