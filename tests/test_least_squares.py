"""The best weights of a mask: against one least-squares problem per row, for both solvers and for other targets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.least_squares import Solver, masked_least_squares, solve_rows


def problem(out: int = 9, width: int = 24, tokens: int = 300, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (out, width), correlated inputs (tokens, width), a mask with rows of any count, one of them empty."""
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(out, width, generator=generator)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    X = torch.randn(tokens, width, generator=generator) @ mix
    mask = torch.rand(out, width, generator=generator) < torch.linspace(0, 1, out)[:, None]
    return W, X, mask


def row_by_row(X: Tensor, Y: Tensor, mask: Tensor) -> Tensor:
    """The least squares of each output in ``Y`` (tokens, out) on the inputs that its row keeps, in float64."""
    V = torch.zeros(mask.shape, dtype=torch.float64)
    for row, kept in enumerate(mask):
        if kept.any():
            V[row, kept] = torch.linalg.lstsq(X[:, kept].double(), Y[:, row].double()).solution
    return V


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_least_squares_equal_those_of_each_row(solver: Solver) -> None:
    """Without damping, within 1e-4 of lstsq (condition of X about 30; conjugate gradients compute in float32)."""
    W, X, mask = problem()
    V = masked_least_squares(W, X.T @ X, mask, damping=0, solver=solver, tolerance=1e-7)
    torch.testing.assert_close(V.double(), row_by_row(X, X @ W.T, mask), rtol=0, atol=1e-4)
    assert not V[~mask].any()
    assert not V[~mask].signbit().any()


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_least_squares_aim_at_the_dense_inputs(solver: Solver) -> None:
    """With the cross-Gram X_s^T X_d the target is the dense layer on its own inputs (1e-4 as above)."""
    W, X, mask = problem()
    sparse = X + 0.3 * torch.randn(X.shape, generator=torch.Generator().manual_seed(1))
    V = masked_least_squares(
        W, sparse.T @ sparse, mask, C=sparse.T @ X, damping=0, solver=solver, tolerance=1e-7
    )
    torch.testing.assert_close(V.double(), row_by_row(sparse, X @ W.T, mask), rtol=0, atol=1e-4)


def test_least_squares_with_damping_stay_near_the_dense_weights() -> None:
    """Damping is λ rows more, of sqrt(λ) I, that ask for W itself (1e-4 as above)."""
    W, X, mask = problem()
    G = X.T @ X
    rows = (0.5 * G.diagonal().mean()).sqrt() * torch.eye(24)
    expected = row_by_row(torch.cat([X, rows]), torch.cat([X @ W.T, rows @ W.T]), mask)
    V = masked_least_squares(W, G, mask, damping=0.5)
    torch.testing.assert_close(V.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_least_squares_repeat_bit_for_bit_and_keep_a_full_row(solver: Solver) -> None:
    """Two runs are equal; a row that keeps everything keeps its weights (1e-4: solved, not copied)."""
    W, X, mask = problem()
    runs = [masked_least_squares(W, X.T @ X, mask, solver=solver) for _ in range(2)]
    assert torch.equal(runs[0], runs[1])
    assert bool(mask[-1].all())
    torch.testing.assert_close(runs[0][-1], W[-1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("workspace_bytes", [1, 20_000, 1 << 20])
def test_least_squares_do_not_depend_on_the_workspace(workspace_bytes: int) -> None:
    """One row at a time, a few, or all: the same weights (float64, so to 1e-9)."""
    W, X, mask = problem()
    A = X.T.double() @ X.double()
    few = solve_rows(A, W.double() @ A, mask, workspace_bytes=workspace_bytes)
    torch.testing.assert_close(few, solve_rows(A, W.double() @ A, mask), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["exact", "cg"])
def test_least_squares_leave_columns_without_input(solver: Solver) -> None:
    """Nothing is known of a column that is always 0, so its kept weights stay, damped or not."""
    W, X, mask = problem()
    X[:, 5] = 0
    for damping in (0.0, 0.01):
        V = masked_least_squares(W, X.T @ X, mask, damping=damping, solver=solver)
        torch.testing.assert_close(V[:, 5], W[:, 5] * mask[:, 5], rtol=1e-6, atol=0)


def test_least_squares_beat_the_mask_alone() -> None:
    """On correlated inputs the layer's error falls by more than a third at half the weights."""
    W, X, _ = problem(out=32, width=40)
    X[:, ::2] = X[:, 1::2] + 0.3 * X[:, ::2]
    mask = torch.rand(W.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    errors = [(X @ (W - V).T).square().mean() for V in (masked_least_squares(W, X.T @ X, mask), W * mask)]
    assert errors[0] < 0.65 * errors[1]


def test_least_squares_refuse_what_has_no_answer() -> None:
    """Equal inputs without damping, and NaN among the sums, are errors that name the matrix."""
    W, X, mask = problem()
    X[:, 1] = X[:, 0]
    with pytest.raises(InputRefused, match=r"block\.o") as caught:
        masked_least_squares(W, X.T @ X, torch.ones_like(mask), damping=0, name="block.o")
    assert caught.value.error_id == "E-HESSIAN-SINGULAR"
    with pytest.raises(InputRefused, match=r"block\.o") as caught:
        masked_least_squares(W, X.T @ X * float("nan"), mask, name="block.o")
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"
