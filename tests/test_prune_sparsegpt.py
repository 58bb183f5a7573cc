"""SparseGPT: against an oracle that inverts the Hessian anew for every column, and its exact counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning import PRUNERS
from compressor.pruning.pruner import Pruned
from compressor.pruning.sparsegpt import column_block_width, hessian_factor
from compressor.recipe import PruningRecipe
from compressor.sparsity import SparsityPattern, holds_n_m, pruned_count
from compressor.statistics import ColumnNorms, Gram

HALF = SparsityPattern.unstructured(0.5)


def problem(out: int = 8, width: int = 20, tokens: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Weights (out, width) and correlated inputs (tokens, width)."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) + 2 * torch.eye(width)
    return W, torch.randn(tokens, width, generator=generator) @ mix


def gram_of(X: Tensor) -> Gram:
    """The statistic of the inputs ``X``."""
    statistic = Gram(X.shape[1])
    statistic.add(X)
    return statistic


def prune(W: Tensor, X: Tensor, pattern: SparsityPattern = HALF, **settings: object) -> Pruned:
    """``W`` pruned by SparseGPT with these settings."""
    recipe = PruningRecipe.model_validate({"method": "sparsegpt", **settings})
    return PRUNERS["sparsegpt"].prune(W, gram_of(X), pattern, recipe)


def damped(X: Tensor, damping: float = 0.01) -> Tensor:
    """X^T X + damping * mean diagonal, in float64."""
    H = X.double().T @ X.double()
    return H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def oracle(W: Tensor, H: Tensor, pattern: SparsityPattern, block: int) -> tuple[Tensor, Tensor]:
    """Optimal brain surgeon, column by column; H^-1 of the columns left, anew for each."""
    W, mask = W.double().clone(), torch.ones_like(W, dtype=torch.bool)
    step = pattern.m or block
    for start in range(0, W.shape[1], step):
        stop = min(start + step, W.shape[1])
        left = [torch.linalg.inv(H[j:, j:])[0, 0] for j in range(start, stop)]
        score = W[:, start:stop] ** 2 / torch.stack(left)
        if pattern.m is not None:
            assert pattern.n is not None
            mask[:, start:stop].scatter_(1, score.topk(pattern.m - pattern.n, largest=False).indices, False)
        else:
            flat = torch.ones(score.numel(), dtype=torch.bool)
            flat[score.flatten().argsort()[: pruned_count(score.numel(), pattern.sparsity)]] = False
            mask[:, start:stop] = flat.view(score.shape)
        for j in range(start, stop):
            inverse = torch.linalg.inv(H[j:, j:])
            error = W[:, j] * ~mask[:, j] / inverse[0, 0]
            W[:, j:] -= error[:, None] * inverse[0]
    return W, mask


@pytest.mark.parametrize(("pattern", "block"), [(HALF, 8), (HALF, 128), (SparsityPattern.n_m(2, 4), 8)])
def test_sparsegpt_equals_the_column_by_column_oracle(pattern: SparsityPattern, block: int) -> None:
    """Same masks, and weights within the rounding of float32 updates (20 of them: 1e-4)."""
    W, X = problem()
    pruned = prune(W, X, pattern, column_block=block)
    weight, mask = oracle(W, damped(X), pattern, block)
    assert torch.equal(pruned.mask, mask)
    torch.testing.assert_close(pruned.weight.double(), weight * mask, rtol=1e-4, atol=1e-4)


def test_hessian_factor_squares_to_the_damped_hessian() -> None:
    """R is upper triangular with R R^T = H (float32 sums of 20 products: 1e-5 of its largest)."""
    X = problem(tokens=60)[1]
    R, damping = hessian_factor(X.T @ X, 0.01, "w")
    assert torch.equal(R, R.triu())
    assert damping == 0.01
    H = damped(X)
    torch.testing.assert_close(R.double() @ R.double().T, H, rtol=0, atol=1e-5 * float(H.max()))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
@pytest.mark.parametrize("update", [True, False])
def test_sparsegpt_meets_the_share_in_every_column_block(sparsity: float, update: bool) -> None:
    """floor(out * width * s) zeros in each block of columns, the narrower last one included."""
    W, X = problem()
    pruned = prune(W, X, SparsityPattern.unstructured(sparsity), column_block=8, update_weights=update)
    counts = [int((~part).sum()) for part in torch.split(pruned.mask, 8, dim=1)]
    assert counts == [pruned_count(8 * width, sparsity) for width in (8, 8, 4)]
    assert not pruned.weight[~pruned.mask].any()


@pytest.mark.parametrize("column_block", [1, 10, 12, 128])
def test_sparsegpt_groups_do_not_depend_on_the_column_block(column_block: int) -> None:
    """2:4 groups are chosen from the updated weights, so lazy updates give the same at any block width."""
    W, X = problem()
    pattern = SparsityPattern.n_m(2, 4)
    pruned, reference = prune(W, X, pattern, column_block=column_block), prune(W, X, pattern, column_block=4)
    assert torch.equal(pruned.mask, reference.mask)
    assert holds_n_m(pruned.mask, 2, 4)
    # Block widths only regroup float32 sums.
    torch.testing.assert_close(pruned.weight, reference.weight, rtol=1e-4, atol=1e-5)


def test_column_block_holds_whole_groups() -> None:
    """The block width is rounded down to whole groups, but holds at least one."""
    assert column_block_width(128, HALF) == 128
    assert column_block_width(10, SparsityPattern.n_m(2, 4)) == 8
    assert column_block_width(4, SparsityPattern.n_m(4, 8)) == 8


def test_sparsegpt_with_white_inputs_is_magnitude_without_compensation() -> None:
    """X^T X = c I couples no columns: the block's smallest weights go, the others stay."""
    W, _ = problem(8, 16)
    pruned = prune(W, 3 * torch.eye(16))
    plain = PRUNERS["magnitude"].prune(W, None, HALF, PruningRecipe())
    assert torch.equal(pruned.mask, plain.mask)
    assert torch.equal(pruned.weight, plain.weight)


def test_sparsegpt_beats_wanda_on_correlated_inputs() -> None:
    """Where half the inputs follow from the others, compensation takes 40 % off the error of Wanda's mask."""
    W, X = problem(32, 40)
    X[:, ::2] = X[:, 1::2] + 0.3 * X[:, ::2]
    norms = ColumnNorms(40)
    norms.add(X)
    wanda = PRUNERS["wanda"].prune(W, norms, HALF, PruningRecipe())
    errors = [(X @ (W - pruned.weight).T).square().mean() for pruned in (prune(W, X), wanda)]
    assert errors[0] < 0.6 * errors[1]


def test_mask_only_keeps_the_original_weights() -> None:
    """Without the update, kept weights are the original ones and scores come from them."""
    W, X = problem()
    pruned = prune(W, X, update_weights=False)
    assert torch.equal(pruned.weight, torch.where(pruned.mask, W, 0.0))
    R, _ = hessian_factor(X.T @ X, 0.01, "w")
    S = (W * R.diagonal()).square()
    assert S[~pruned.mask].max() <= S[pruned.mask].min()


@pytest.mark.parametrize("update", [True, False])
def test_dead_columns_go_first_and_lose_nothing_beyond_the_mask(update: bool) -> None:
    """A column whose input is always 0 is pruned before any other; no kept weight becomes 0."""
    W, X = problem()
    X[:, 5] = 0
    pruned = prune(W, X, update_weights=update)
    assert not pruned.mask[:, 5].any()
    X[:, 3:17] = 0
    pruned = prune(W, X, update_weights=update)
    assert bool(pruned.weight[pruned.mask].all())
    kept_dead = pruned.mask & (X == 0).all(0)
    assert kept_dead.any()
    assert torch.equal(pruned.weight[kept_dead], W[kept_dead])


def test_fewer_tokens_than_columns_is_fine() -> None:
    """A singular X^T X is made definite by the damping; nothing is noted."""
    W, X = problem(tokens=3)
    pruned = prune(W, X)
    assert bool(torch.isfinite(pruned.weight).all())
    assert pruned.note is None


def test_indefinite_hessian_raises_the_damping_then_gives_up() -> None:
    """A small negative eigenvalue needs more damping, which is noted; a large one is refused by name."""
    W, _ = problem()
    statistic = gram_of(torch.eye(20))
    statistic.gram()[0, 0] = -0.02
    recipe = PruningRecipe(method="sparsegpt")
    assert PRUNERS["sparsegpt"].prune(W, statistic, HALF, recipe).note == "Hessian damping raised to 0.05"
    statistic.gram()[0, 0] = -100  # a written sum is factorised anew
    with pytest.raises(InputRefused, match=r"block\.down") as caught:
        PRUNERS["sparsegpt"].prune(W, statistic, HALF, recipe, name="block.down")
    assert caught.value.error_id == "E-HESSIAN-SINGULAR"


def test_hessian_beyond_float32_is_factorised_in_float64() -> None:
    """A damping that float32 rounds away still makes a singular Hessian of whole numbers definite."""
    X = torch.randint(-3, 4, (3, 20), generator=torch.Generator().manual_seed(0)).float()
    R, damping = hessian_factor(X.T @ X, 1e-10, "w")
    assert damping == 1e-10
    # R is rounded to float32: 1e-6 of the Hessian's largest.
    torch.testing.assert_close(R @ R.T, X.T @ X, rtol=0, atol=1e-6 * float((X.T @ X).max()))


def test_sparsegpt_factorises_a_shared_hessian_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two matrices with one statistic are pruned with one factor."""
    calls = []

    def counted(*arguments: object) -> object:
        calls.append(arguments)
        return hessian_factor(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("compressor.pruning.sparsegpt.hessian_factor", counted)
    W, X = problem()
    statistic, recipe = gram_of(X), PruningRecipe(method="sparsegpt")
    for weight in (W, 2 * W):
        PRUNERS["sparsegpt"].prune(weight, statistic, HALF, recipe)
    assert len(calls) == 1


def test_sparsegpt_refuses_non_finite_inputs() -> None:
    """NaN among the inputs is an error before anything is factorised."""
    W, X = problem()
    X[0, 0] = float("nan")
    with pytest.raises(InputRefused) as caught:
        prune(W, X)
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"


def test_sparsegpt_without_tokens_takes_magnitude_and_says_so() -> None:
    """An expert that no token reached is pruned by magnitude, with a note."""
    W, _ = problem()
    recipe = PruningRecipe(method="sparsegpt")
    pruned = PRUNERS["sparsegpt"].prune(W, Gram(20), HALF, recipe)
    assert torch.equal(pruned.mask, PRUNERS["magnitude"].prune(W, None, HALF, recipe).mask)
    assert "no calibration token" in str(pruned.note)


def test_sparsegpt_repeats_bit_for_bit_on_a_transposed_view() -> None:
    """A weight stored (in, out) and seen transposed gives the same bits as its contiguous copy."""
    W, X = problem()
    stored = W.T.contiguous().T
    first, second = prune(W, X, column_block=8), prune(stored, X, column_block=8)
    assert torch.equal(stored, W)  # and neither is written to
    assert torch.equal(first.mask, second.mask)
    assert torch.equal(first.weight, second.weight)
