"""ADMM pruning and ALPS: exact counts, the least squares of their masks, and errors below Wanda's and SparseGPT's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused, UsageError
from compressor.least_squares import solve_rows
from compressor.pruning import PRUNERS
from compressor.pruning.admm import alternate, gradual_choice, scaled_gram
from compressor.pruning.pruner import Pruned
from compressor.recipe import PruningRecipe
from compressor.recipe_file import read_overrides
from compressor.sparsity import SparsityPattern, holds_n_m, pruned_count
from compressor.statistics import ColumnNorms, Gram

HALF = SparsityPattern.unstructured(0.5)
METHODS = ["admm", "alps"]


def problem(out: int = 12, width: int = 24, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (out, width) and correlated inputs (tokens, width) of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + 0.3 * torch.eye(width)
    X = torch.randn(tokens, width, generator=generator) @ mix * torch.logspace(-0.5, 0.5, width)
    return W, X


def prune(method: str, W: Tensor, X: Tensor, pattern: SparsityPattern = HALF, **settings: object) -> Pruned:
    """``W`` pruned by ``method`` with these settings."""
    statistic = ColumnNorms(X.shape[1]) if method == "wanda" else Gram(X.shape[1])
    statistic.add(X)
    recipe = PruningRecipe.model_validate({"method": method, **settings})
    return PRUNERS[method].prune(W, statistic, pattern, recipe)


def error(W: Tensor, X: Tensor, pruned: Pruned) -> float:
    """Mean squared change of the layer's outputs."""
    return float((X @ (W - pruned.weight).T).square().mean())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9])
def test_admm_meets_the_share_exactly(method: str, sparsity: float) -> None:
    """floor(out * in * s) zeros in the whole matrix, and none beside the mask."""
    W, X = problem()
    pruned = prune(method, W, X, SparsityPattern.unstructured(sparsity))
    assert int((~pruned.mask).sum()) == pruned_count(W.numel(), sparsity)
    assert torch.equal(pruned.weight != 0, pruned.mask)
    assert not pruned.weight[~pruned.mask].signbit().any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "3:4", "2:3"])
def test_admm_keeps_n_of_each_m(method: str, text: str) -> None:
    """Every group keeps exactly n."""
    W, X = problem()
    pattern = SparsityPattern.parse(text)
    assert pattern.n is not None
    assert pattern.m is not None
    pruned = prune(method, W, X, pattern)
    assert holds_n_m(pruned.mask, pattern.n, pattern.m)
    assert int(pruned.mask.sum()) == W.numel() * pattern.n // pattern.m


def test_admm_goes_to_the_least_squares_of_a_fixed_mask() -> None:
    """Many iterations on a mask that stays end within 1e-4 of its damped least squares."""
    W, X = problem()
    A, lengths = scaled_gram(X.T @ X)
    A.diagonal().add_(0.1)
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    scaled, inverse = W * lengths, torch.linalg.inv(A + torch.eye(24))
    V, _ = alternate(scaled, A, inverse, 1.0, 500, lambda total, iteration: mask)
    expected = solve_rows(A.double(), (scaled @ A).double(), mask)
    torch.testing.assert_close(V.double(), expected, rtol=0, atol=1e-4)


def test_admm_prunes_a_little_more_in_each_iteration() -> None:
    """The pruned shares follow s - s (1 - t/k)^3, end at s in iteration k, and the mask stays from then on."""
    W, _ = problem()
    choose = gradual_choice(SparsityPattern.unstructured(0.7), 5, torch.zeros(24, dtype=torch.bool))
    masks = [choose(W + iteration, iteration) for iteration in range(8)]
    shares = [0.7 - 0.7 * (1 - t / 5) ** 3 for t in (1, 2, 3, 4, 5)]
    assert [int((~mask).sum()) for mask in masks[:5]] == [pruned_count(W.numel(), share) for share in shares]
    assert all(mask is masks[4] for mask in masks[5:])


def test_admm_prunes_groups_little_by_little_too() -> None:
    """On the way to 2:4 no group has lost more than two, some fewer."""
    W, _ = problem()
    choose = gradual_choice(SparsityPattern.n_m(2, 4), 3, torch.zeros(24, dtype=torch.bool))
    lost = [(~choose(W, iteration)).view(-1, 4).sum(1) for iteration in range(3)]
    assert [int(each.max()) for each in lost] == [2, 2, 2]
    assert [int(each.sum()) for each in lost] == [
        pruned_count(288, 0.5 - 0.5 * (1 - t / 3) ** 3) for t in (1, 2, 3)
    ]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", [HALF, SparsityPattern.unstructured(0.7), SparsityPattern.n_m(2, 4)])
def test_admm_beats_wanda_and_sparsegpt_on_correlated_inputs(method: str, pattern: SparsityPattern) -> None:
    """At equal sparsity the layer's error is below 0.6 of Wanda's and 0.8 of SparseGPT's."""
    W, X = problem(64, 96, 800)
    found = error(W, X, prune(method, W, X, pattern))
    assert found < 0.6 * error(W, X, prune("wanda", W, X, pattern))
    assert found < 0.8 * error(W, X, prune("sparsegpt", W, X, pattern))


@pytest.mark.parametrize("method", METHODS)
def test_admm_mask_alone_keeps_the_original_weights(method: str) -> None:
    """Without the update the mask is the same and kept weights are the dense ones."""
    W, X = problem()
    pruned = prune(method, W, X, update_weights=False)
    assert torch.equal(pruned.mask, prune(method, W, X).mask)
    assert torch.equal(pruned.weight, torch.where(pruned.mask, W, 0.0))


@pytest.mark.parametrize("method", METHODS)
def test_admm_with_white_inputs_changes_no_kept_weight(method: str) -> None:
    """X^T X = c I couples no columns: nothing to compensate (2e-3: ADMM's few last iterations halve what is left)."""
    W, _ = problem()
    pruned = prune(method, W, 3 * torch.eye(24))
    torch.testing.assert_close(pruned.weight, torch.where(pruned.mask, W, 0.0), rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_admm_prunes_dead_columns_first_and_leaves_the_kept_ones(method: str) -> None:
    """Columns whose input is always 0 go before any other; where more are dead than go, they keep their weights."""
    W, X = problem()
    X[:, 5] = 0
    assert not prune(method, W, X).mask[:, 5].any()
    X[:, 3:20] = 0
    pruned = prune(method, W, X)
    assert bool(pruned.mask[:, X.any(0)].all())
    kept_dead = pruned.mask & (X == 0).all(0)
    assert kept_dead.any()
    assert torch.equal(pruned.weight[kept_dead], W[kept_dead])


@pytest.mark.parametrize("method", METHODS)
def test_admm_repeats_bit_for_bit_and_leaves_its_input(method: str) -> None:
    """Two runs are equal, from a transposed view too; neither the weights nor the statistic are written to."""
    W, X = problem()
    statistic = Gram(24)
    statistic.add(X)
    before, G = W.clone(), statistic.gram().clone()
    stored = W.T.contiguous().T
    recipe = PruningRecipe.model_validate({"method": method})
    runs = [PRUNERS[method].prune(weight, statistic, HALF, recipe) for weight in (W, W, stored)]
    assert all(torch.equal(run.weight, runs[0].weight) for run in runs)
    assert torch.equal(W, before)
    assert torch.equal(stored, before)
    assert torch.equal(statistic.gram(), G)


@pytest.mark.parametrize("method", METHODS)
def test_admm_bears_fewer_tokens_than_columns(method: str) -> None:
    """A singular X^T X is made definite by the damping."""
    W, X = problem(tokens=3)
    assert bool(torch.isfinite(prune(method, W, X).weight).all())


@pytest.mark.parametrize("method", METHODS)
def test_admm_without_tokens_takes_magnitude_and_says_so(method: str) -> None:
    """An expert that no token reached is pruned by magnitude, with a note."""
    W, _ = problem()
    recipe = PruningRecipe.model_validate({"method": method})
    pruned = PRUNERS[method].prune(W, Gram(24), HALF, recipe)
    assert torch.equal(pruned.mask, PRUNERS["magnitude"].prune(W, None, HALF, recipe).mask)
    assert "no calibration token" in str(pruned.note)


@pytest.mark.parametrize("method", METHODS)
def test_admm_refuses_non_finite_inputs(method: str) -> None:
    """NaN among the inputs is an error before anything is computed."""
    W, X = problem()
    X[0, 0] = float("nan")
    with pytest.raises(InputRefused) as caught:
        prune(method, W, X)
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"


def test_admm_refuses_an_indefinite_hessian() -> None:
    """Sums that no inputs can have are refused by name."""
    W, _ = problem()
    statistic = Gram(24)
    statistic.add(torch.eye(24))
    statistic.gram()[0, 1] = statistic.gram()[1, 0] = 100
    with pytest.raises(InputRefused, match=r"block\.up") as caught:
        PRUNERS["admm"].prune(W, statistic, HALF, PruningRecipe(method="admm"), name="block.up")
    assert caught.value.error_id == "E-HESSIAN-SINGULAR"


def test_admm_recipe_lets_the_mask_be_finished() -> None:
    """More iterations for the mask than there are would leave it unfinished."""
    with pytest.raises(UsageError, match="mask_iterations"):
        read_overrides({"pruning.admm.iterations": 10})
