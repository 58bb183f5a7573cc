"""The lowest scores of each group of N:M by ranks: equal to a stable sort, whatever the length and the chunks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.pruning import group_ranks
from compressor.pruning.group_ranks import LONGEST, lowest_of_groups, lowest_of_planes
from compressor.pruning.pruner import lowest_in_groups
from compressor.sparsity import SparsityPattern


def scores(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Scores of four values, (rows, columns): most groups hold ties."""
    return torch.randint(0, 4, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


def stable(S: Tensor, m: int, count: int) -> Tensor:
    """The first ``count`` of a stable sort of each group."""
    groups = S.reshape(-1, m)
    order = groups.argsort(dim=1, stable=True)[:, :count]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter(1, order, True).view(S.shape)


@pytest.mark.parametrize("m", [2, 3, 4, 5, 8, 16, LONGEST])
def test_groups_equal_a_stable_sort(m: int) -> None:
    """Every count from none to all, with many ties, in both memory orders."""
    S = scores(7, 13 * m)
    for count in (0, 1, m // 2, m):
        expected = stable(S, m, count)
        assert torch.equal(lowest_of_groups(S, m, count), expected)
        assert torch.equal(lowest_of_planes(S.view(-1, m).T, count).T.bool().reshape(S.shape), expected)
        assert torch.equal(lowest_of_groups(S.T.contiguous().T, m, count), expected)


@pytest.mark.parametrize("rows", [1, 2, 9, 40])
def test_groups_do_not_depend_on_the_chunks(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, the last one shorter, choose what one chunk chooses."""
    S = scores(rows, 8 * 11)
    whole = lowest_of_groups(S, 8, 4)
    monkeypatch.setattr(group_ranks, "_CHUNK", 100)
    assert torch.equal(lowest_of_groups(S, 8, 4), whole)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_groups_read_other_types(dtype: torch.dtype) -> None:
    """Half precision and float64 are ranked as they are; a parameter's gradient is no obstacle."""
    S = (scores(3, 16) + 1e-9).to(dtype).requires_grad_()
    assert torch.equal(lowest_of_groups(S, 4, 2), stable(S.detach(), 4, 2))


@pytest.mark.parametrize("text", ["2:4", "1:3", "40:64", "10:100"])
def test_groups_longer_than_the_ranks_reach_are_sorted(text: str) -> None:
    """Long groups are chosen by sorting, with the same result."""
    pattern = SparsityPattern.parse(text)
    assert pattern.n is not None
    assert pattern.m is not None
    S = scores(5, 3 * pattern.m)
    assert torch.equal(lowest_in_groups(S, pattern), stable(S, pattern.m, pattern.m - pattern.n))
