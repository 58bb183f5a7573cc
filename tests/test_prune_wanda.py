"""Wanda: scores, granularity, groups, and what happens without calibration tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning import PRUNERS
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern, pruned_count
from compressor.statistics import ColumnNorms

RECIPE = PruningRecipe(method="wanda")


def problem(out: int = 6, width: int = 20, seed: int = 0) -> tuple[Tensor, Tensor, ColumnNorms]:
    """Weights (out, width), inputs (40, width) of very different column lengths, their statistic."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator)
    X = torch.randn(40, width, generator=generator) * torch.logspace(-1, 1, width)
    statistic = ColumnNorms(width)
    statistic.add(X)
    return W, X, statistic


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_wanda_equals_a_sort_of_each_row(sparsity: float) -> None:
    """Each row loses its floor(in * s) lowest |w| * ||x||, found here one row at a time."""
    W, X, statistic = problem()
    pruned = PRUNERS["wanda"].prune(W, statistic, SparsityPattern.unstructured(sparsity), RECIPE)
    for w, kept in zip(W, pruned.mask, strict=True):
        score = [abs(float(w[j])) * float(X[:, j].norm()) for j in range(len(w))]
        lowest = sorted(range(len(w)), key=score.__getitem__)[: pruned_count(len(w), sparsity)]
        assert sorted((~kept).nonzero().flatten().tolist()) == sorted(lowest)


def test_wanda_keeps_n_of_each_m() -> None:
    """2:4 keeps the two highest scores of each group of four inputs."""
    W, _, statistic = problem()
    pruned = PRUNERS["wanda"].prune(W, statistic, SparsityPattern.n_m(2, 4), RECIPE)
    S = (W.abs() * statistic.norms).view(-1, 4)
    assert torch.equal(
        pruned.mask.view(-1, 4), torch.zeros_like(S, dtype=torch.bool).scatter(1, S.topk(2).indices, True)
    )


def test_wanda_is_exact_among_ties() -> None:
    """Inputs that are all zero give scores that are all zero; each row still loses exactly floor(in * s)."""
    W, _, _ = problem()
    statistic = ColumnNorms(20)
    statistic.add(torch.zeros(3, 20))
    pruned = PRUNERS["wanda"].prune(W, statistic, SparsityPattern.unstructured(0.7), RECIPE)
    assert (~pruned.mask).sum(1).tolist() == [14] * 6


def test_wanda_ignores_the_scale_of_a_row_and_of_the_inputs() -> None:
    """Scores are compared within a row, so a row's scale and the number of tokens change nothing."""
    W, X, statistic = problem()
    twice = ColumnNorms(20)
    twice.add(2 * X)
    pattern = SparsityPattern.unstructured(0.5)
    pruned = PRUNERS["wanda"].prune(W, statistic, pattern, RECIPE)
    scaled = PRUNERS["wanda"].prune(
        W * torch.tensor([[1.0], [8], [0.5], [4], [2], [16]]), twice, pattern, RECIPE
    )
    assert torch.equal(pruned.mask, scaled.mask)


def test_wanda_repeats_bit_for_bit() -> None:
    """Two runs on equal inputs give equal masks and weights."""
    runs = []
    for _ in range(2):
        W, _, statistic = problem()
        runs.append(PRUNERS["wanda"].prune(W, statistic, SparsityPattern.unstructured(0.5), RECIPE))
    assert torch.equal(runs[0].mask, runs[1].mask)
    assert torch.equal(runs[0].weight, runs[1].weight)


def test_wanda_beats_magnitude_on_uneven_inputs() -> None:
    """Where column lengths differ, the output changes less than with magnitude at the same share."""
    W, X, statistic = problem(32, 64)
    pattern = SparsityPattern.unstructured(0.5)
    errors = {
        name: (X @ (W - PRUNERS[name].prune(W, statistic, pattern, RECIPE).weight).T).square().mean().item()
        for name in ("wanda", "magnitude")
    }
    assert errors["wanda"] < errors["magnitude"]


def test_wanda_without_tokens_takes_magnitude_and_says_so() -> None:
    """An expert that no token reached is pruned by magnitude, with a note for the user."""
    W, _, _ = problem()
    pattern = SparsityPattern.unstructured(0.5)
    pruned = PRUNERS["wanda"].prune(W, ColumnNorms(20), pattern, RECIPE)
    assert torch.equal(pruned.mask, PRUNERS["magnitude"].prune(W, None, pattern, RECIPE).mask)
    assert pruned.note is not None
    assert "no calibration token" in pruned.note


def test_wanda_refuses_non_finite_inputs_and_weights() -> None:
    """NaN in the statistic or in the weights is an error that names the matrix."""
    W, X, statistic = problem()
    pattern = SparsityPattern.unstructured(0.5)
    with pytest.raises(InputRefused, match=r"block\.q"):
        PRUNERS["wanda"].prune(W * float("nan"), statistic, pattern, RECIPE, name="block.q")
    statistic.add(X * float("nan"))
    with pytest.raises(InputRefused, match=r"block\.q") as caught:
        PRUNERS["wanda"].prune(W, statistic, pattern, RECIPE, name="block.q")
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"
