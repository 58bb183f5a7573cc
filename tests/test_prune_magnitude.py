"""Magnitude pruning, and the choice of the lowest scores that all pruners share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning import PRUNERS, check_pattern
from compressor.pruning.pruner import lowest
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern, holds_n_m, pruned_count

RECIPE = PruningRecipe(method="magnitude")


def matrix(out: int = 6, width: int = 16, seed: int = 0) -> Tensor:
    """A random weight matrix, (out, width)."""
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [5, 64, 65, 200])
def test_lowest_equals_a_stable_sort(width: int) -> None:
    """The fast choice equals the first entries of a stable sort, with many ties (scores of 5 values)."""
    S = torch.randint(0, 5, (7, width), generator=torch.Generator().manual_seed(width)).float()
    for count in (0, 1, width // 2, width - 1, width):
        order = S.argsort(dim=1, stable=True)[:, :count]
        expected = torch.zeros_like(S, dtype=torch.bool).scatter(1, order, True)
        assert torch.equal(lowest(S, count), expected)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_magnitude_equals_a_sort_of_the_whole_matrix(sparsity: float) -> None:
    """One threshold for the matrix: the floor(n * s) smallest of all, wherever they stand."""
    W = matrix()
    pruned = PRUNERS["magnitude"].prune(W, None, SparsityPattern.unstructured(sparsity), RECIPE)
    count = pruned_count(W.numel(), sparsity)
    smallest = sorted(range(W.numel()), key=lambda i: abs(W.flatten()[i].item()))[:count]
    assert sorted((~pruned.mask.flatten()).nonzero().flatten().tolist()) == sorted(smallest)
    assert torch.equal(pruned.weight, torch.where(pruned.mask, W, 0.0))


def test_magnitude_meets_the_share_exactly_among_ties() -> None:
    """A constant matrix has only ties; the first floor(n * s) weights go."""
    pruned = PRUNERS["magnitude"].prune(
        torch.full((3, 7), -2.0), None, SparsityPattern.unstructured(0.5), RECIPE
    )
    assert pruned.mask.flatten().tolist() == [False] * 10 + [True] * 11


@pytest.mark.parametrize("text", ["2:4", "1:4", "3:4", "4:8", "1:16"])
def test_magnitude_keeps_n_of_each_m(text: str) -> None:
    """Each group keeps its n largest weights."""
    W, pattern = matrix(), SparsityPattern.parse(text)
    assert pattern.n is not None
    assert pattern.m is not None
    pruned = PRUNERS["magnitude"].prune(W, None, pattern, RECIPE)
    kept = pruned.mask.view(-1, pattern.m)
    largest = W.abs().view(-1, pattern.m).topk(pattern.n).indices
    assert torch.equal(kept, torch.zeros_like(kept).scatter(1, largest, True))
    assert holds_n_m(pruned.mask, pattern.n, pattern.m)


def test_magnitude_leaves_its_input_and_no_negative_zero() -> None:
    """The given matrix stays; pruned places hold +0.0 bit for bit."""
    W = matrix()
    before = W.clone()
    pruned = PRUNERS["magnitude"].prune(W, None, SparsityPattern.unstructured(0.5), RECIPE)
    assert torch.equal(W, before)
    assert not pruned.weight[~pruned.mask].signbit().any()


def test_magnitude_reads_half_precision_and_transposed_weights() -> None:
    """A float16 view with another memory order gives the mask of its float32 copy."""
    W = matrix(16, 6).half().T
    pattern = SparsityPattern.unstructured(0.5)
    pruned = PRUNERS["magnitude"].prune(W, None, pattern, RECIPE)
    plain = PRUNERS["magnitude"].prune(W.float().contiguous(), None, pattern, RECIPE)
    assert torch.equal(pruned.mask, plain.mask)
    assert pruned.weight.dtype == torch.float32


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_magnitude_refuses_non_finite_weights(bad: float) -> None:
    """NaN or infinity among the weights is an error that names the matrix."""
    W = matrix()
    W[2, 3] = bad
    with pytest.raises(InputRefused, match=r"layers\.0\.up") as caught:
        PRUNERS["magnitude"].prune(W, None, SparsityPattern.unstructured(0.5), RECIPE, name="layers.0.up")
    assert caught.value.error_id == "E-WEIGHT-NONFINITE"


def test_pattern_that_does_not_divide_is_refused_with_the_way_out() -> None:
    """2:4 over 30 inputs names the matrix, the width and the option that excludes it."""
    pattern = SparsityPattern.n_m(2, 4)
    check_pattern("model.layers.0.mlp.up_proj.weight", 32, pattern)
    with pytest.raises(InputRefused, match=r"divisible by 4, got 30 \(model.layers.0.mlp.up_proj") as caught:
        check_pattern("model.layers.0.mlp.up_proj.weight", 30, pattern)
    assert caught.value.error_id == "E-PATTERN-DIVIDES"
    assert "--ignore model.layers.0.mlp.up_proj" in caught.value.remedy
