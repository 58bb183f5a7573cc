"""Patterns and counts: what they accept, what they refuse, and that the decimal shares count exactly."""

from __future__ import annotations

from decimal import Decimal

import pytest
import torch

from compressor.errors import UsageError
from compressor.sparsity import SparsityPattern, count_zeros, holds_n_m, pruned_count


def test_pattern_reads_n_m() -> None:
    """2:4 keeps two of four, which is half zeros, and prints as it was written."""
    pattern = SparsityPattern.parse(" 2:4 ")
    assert (pattern.n, pattern.m, pattern.sparsity) == (2, 4, 0.5)
    assert pattern.is_n_m
    assert str(pattern) == "2:4"


@pytest.mark.parametrize("text", ["2", "2:", "a:4", "2:4:8", "-2:4", "2.0:4", ""])
def test_pattern_refuses_other_syntax(text: str) -> None:
    """Anything but two whole numbers around a colon is a usage error."""
    with pytest.raises(UsageError) as caught:
        SparsityPattern.parse(text)
    assert caught.value.error_id == "E-PATTERN-SYNTAX"


@pytest.mark.parametrize("text", ["0:4", "4:4", "5:4", "0:0"])
def test_pattern_refuses_groups_that_keep_all_or_nothing(text: str) -> None:
    """N:M needs 0 < N < M."""
    with pytest.raises(UsageError) as caught:
        SparsityPattern.parse(text)
    assert caught.value.error_id == "E-PATTERN-RANGE"


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5, float("nan"), float("inf")])
def test_unstructured_refuses_shares_outside_the_open_interval(sparsity: float) -> None:
    """A share of zeros lies strictly between 0 and 1."""
    with pytest.raises(UsageError) as caught:
        SparsityPattern.unstructured(sparsity)
    assert caught.value.error_id == "E-SPARSITY-RANGE"


def test_unstructured_prints_its_share() -> None:
    """An unstructured pattern has no groups and prints as a number."""
    pattern = SparsityPattern.unstructured(0.7)
    assert not pattern.is_n_m
    assert str(pattern) == "0.7"


@pytest.mark.parametrize("share", ["0.1", "0.29", "0.3", "0.55", "0.57", "0.7", "0.9", "0.99"])
def test_pruned_count_is_the_exact_decimal_floor(share: str) -> None:
    """floor(n * s) as with pencil and paper, where the binary product may fall just below a whole number."""
    for numel in (1, 7, 10, 64, 100, 4096, 11008, 45_088_768):
        assert pruned_count(numel, float(share)) == int(numel * Decimal(share))


def test_count_zeros_counts_both_zeros() -> None:
    """Negative zero is a zero too."""
    assert count_zeros(torch.tensor([0.0, -0.0, 1.0, float("nan")])) == 2


def test_holds_n_m_looks_at_every_group() -> None:
    """One group that keeps too many breaks the pattern; so do inputs that M does not divide."""
    mask = torch.tensor([[True, True, False, False, True, False, True, False]])
    assert holds_n_m(mask, 2, 4)
    assert not holds_n_m(mask, 1, 4)
    mask[0, 1:3] = torch.tensor([True, True])
    assert not holds_n_m(mask, 2, 4)
    assert not holds_n_m(mask[:, :6], 2, 4)
