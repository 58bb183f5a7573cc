"""Shares of zeros per block: their mean is what was asked for, their differences are the formulas'."""

from __future__ import annotations

import pytest
import torch

from compressor.errors import UsageError
from compressor.pruning.allocation import linear, outlier_ratio, owl, uniform

SIZES = [100, 400, 50, 250]


def mean(shares: tuple[float, ...], weights: list[int]) -> float:
    """The share of zeros of the whole model."""
    return sum(share * size for share, size in zip(shares, weights, strict=True)) / sum(weights)


def test_allocation_uniform_gives_every_block_the_same() -> None:
    """No block bears more than another."""
    assert uniform(3, 0.7) == (0.7, 0.7, 0.7)


def test_allocation_linear_is_an_arithmetic_progression() -> None:
    """Equal differences around the mean, by hand: 0.7 ∓ 0.06 in steps of 0.04 (rounding of sums: 1e-12)."""
    assert linear(4, 0.7, 0.04) == pytest.approx([0.64, 0.68, 0.72, 0.76], abs=1e-12)
    assert linear(1, 0.7, 0.04) == pytest.approx([0.7])


def test_allocation_owl_keeps_more_where_more_outliers_are() -> None:
    """By hand: ratios 1, 2, 5 scale to a = 0, 0.04, 0.16, whose mean 0.2/3 is added to 0.7 - a (1e-12 as above)."""
    expected = [0.7 + 0.2 / 3 - a for a in (0, 0.04, 0.16)]
    assert owl([1, 2, 5], 0.7, 0.08) == pytest.approx(expected, abs=1e-12)
    assert owl([3, 3, 3], 0.7) == (0.7, 0.7, 0.7)


def test_allocation_counts_blocks_by_their_weights() -> None:
    """With blocks of different sizes, the whole model has the sparsity that was asked for."""
    for shares in (linear(4, 0.6, -0.1, SIZES), owl([4, 1, 9, 2], 0.6, 0.1, SIZES)):
        assert mean(shares, SIZES) == pytest.approx(0.6, abs=1e-12)
        assert all(0 < share < 1 for share in shares)


def test_allocation_refuses_shares_outside_zero_and_one() -> None:
    """A slope or a lambda that is too wide names the first block that it breaks."""
    with pytest.raises(UsageError, match=r"linear gives block 3 a sparsity of 1\.05") as caught:
        linear(4, 0.9, 0.1)
    assert caught.value.error_id == "E-ALLOCATION-RANGE"
    with pytest.raises(UsageError, match="owl gives block 1"):
        owl([0, 1], 0.05)


def test_outlier_ratio_counts_over_all_linears_of_a_block() -> None:
    """By hand: scores 1 x 7, 9 x 1 in one matrix and 2 x 2 in another have the mean 2; above 4 lies one of ten."""
    W = torch.ones(2, 4)
    W[1, 3] = -9.0
    other = torch.tensor([[0.5, 0.5]])
    assert outlier_ratio([(W, torch.ones(4)), (other, torch.full((2,), 4.0))], M=2) == pytest.approx(10)
    assert outlier_ratio([(W, torch.ones(4))], M=5) == 0


def test_outlier_ratio_reads_half_precision() -> None:
    """Float16 weights are scored in float32: 60000 x 2 does not overflow."""
    W = torch.tensor([[60000.0, 1.0, 1.0, 1.0]], dtype=torch.float16)
    assert outlier_ratio([(W, torch.full((4,), 2.0))], M=2) == 25
