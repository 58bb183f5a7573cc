"""The best weights for a given mask: least squares on each row's own support.

Notation: ``W`` are the dense weights and ``V`` the ones sought, (out, in); ``G`` = X^T X of the inputs that the sparse
layer will see, (in, in). Rows are independent: row i solves a system with the rows and columns of ``G`` that its mask
keeps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.sparsity import Mask

EXACT_UP_TO = (
    512  # inputs; a factorisation per row costs their cube, so wider matrices take conjugate gradients
)
WORKSPACE_BYTES = 256 * 2**20


Solver = Literal["auto", "exact", "cg"]


def masked_least_squares(
    W: Tensor,
    G: Tensor,
    mask: Mask,
    *,
    C: Tensor | None = None,
    damping: float = 0.01,
    solver: Solver = "auto",
    iterations: int = 100,
    tolerance: float = 1e-5,
    name: str = "weight",
) -> Tensor:
    """``V`` (out, in) float32, +0.0 where ``mask`` is ``False``, that brings X_s V^T closest to X_d W^T.

    Minimises ||X_s V^T - X_d W^T||^2 + λ ||V - W||^2 over the kept weights: with A = G + λ I and B = W C^T + λ W,
    each row solves A_SS v_S = b_S on its support S. Columns without any input keep their weights.

    Args:
        W: Dense weights, (out, in), finite.
        G: X_s^T X_s, (in, in), of the inputs that V will see.
        mask: (out, in) bool, ``True`` = kept.
        C: X_s^T X_d, (in, in), where the inputs X_d of the dense layer are others; ``G`` where they are the same.
        damping: λ as a share of the mean diagonal of ``G``.
        solver: ``exact`` is a Cholesky factorisation per row, ``cg`` conjugate gradients of all rows at once, ``auto``
            exact up to ``EXACT_UP_TO`` inputs.
        iterations: Of the conjugate gradients, at most.
        tolerance: They end when every row's residual has come down to this share of its right-hand side.
        name: The matrix, for errors.

    Raises:
        InputRefused: NaN or infinity in G or C; a system that is singular.
    """
    for sums in (G,) if C is None else (G, C):
        _check_sums(name, sums)
    exact = solver == "exact" or (solver == "auto" and W.shape[1] <= EXACT_UP_TO)
    dtype = torch.float64 if exact else torch.float32
    W, A = W.detach().to(dtype), G.to(W.device, dtype, copy=True)
    diagonal = A.diagonal()  # a view
    proximal = torch.full_like(diagonal, damping * float(diagonal.mean()))
    proximal[diagonal == 0] += 1.0
    B = W @ (A if C is None else C.to(A).T) + W * proximal
    diagonal += proximal
    if exact:
        V = solve_rows(A, B, mask, name=name).float()
    else:
        V = conjugate_gradients(A, B, mask, W.masked_fill(~mask, 0.0), iterations, tolerance)
    return V.masked_fill(~mask, 0.0)


def solve_rows(
    A: Tensor, B: Tensor, mask: Mask, *, workspace_bytes: int = WORKSPACE_BYTES, name: str = "weight"
) -> Tensor:
    """``V`` (out, in) with A_SS v_S = b_S in each row, 0 elsewhere: Cholesky, as many rows at a time as fit.

    Args:
        A: (in, in), symmetric.
        B: (out, in).
        mask: (out, in) bool; a row's support S.
        workspace_bytes: For the systems of the rows at a time; one row is always taken.
        name: The matrix, for the error.

    Raises:
        InputRefused: A system is not positive definite.
    """
    V = torch.zeros_like(B)
    kept = mask.sum(1)
    order = kept.argsort(descending=True, stable=True)  # rows of like size share a batch
    start = 0
    while start < len(order) and (width := int(kept[order[start]])) > 0:
        batch = max(1, workspace_bytes // (3 * width * width * A.element_size()))  # gathered, masked, factor
        rows = order[start : start + batch]
        start += batch
        places = mask[rows].byte().argsort(dim=1, descending=True, stable=True)[:, :width]  # (rows, width)
        padding = torch.arange(width, device=A.device) >= kept[rows, None]
        systems = A[places[:, :, None], places[:, None, :]]  # (rows, width, width)
        systems.masked_fill_(padding[:, :, None] | padding[:, None, :], 0.0)
        systems.diagonal(dim1=1, dim2=2).masked_fill_(padding, 1.0)
        right = B[rows].gather(1, places).masked_fill_(padding, 0.0)
        L, failed = torch.linalg.cholesky_ex(systems)
        if bool(failed.any()):
            raise InputRefused(
                "E-HESSIAN-SINGULAR",
                f"the inputs that {name} keeps are linearly dependent",
                "raise --num-calibration-samples, or the damping",
            )
        V[rows] = V[rows].scatter(1, places, torch.cholesky_solve(right[:, :, None], L)[:, :, 0])
    return V


def conjugate_gradients(
    A: Tensor, B: Tensor, mask: Mask, V: Tensor, iterations: int, tolerance: float = 0.0
) -> Tensor:
    """``V`` (out, in) nearer to A_SS v_S = b_S in each row; all rows at once, each with its own step lengths.

    Preconditioned with the diagonal, as ALPS' last step (arXiv 2406.07831); the rows need one product
    with ``A`` per iteration between them.

    Args:
        A: (in, in), symmetric and positive definite.
        B: (out, in).
        mask: (out, in) bool; what lies outside stays 0.
        V: Where to start, 0 outside the mask.
        iterations: At most.
        tolerance: Ends earlier once all residuals are this share of the right-hand side, in the norm of the
            preconditioner.
    """
    V = V.clone()
    support = mask.to(A.dtype)
    precondition = 1 / A.diagonal()
    residual = (B - V @ A) * support
    direction = residual * precondition
    squared = (residual * direction).sum(1, keepdim=True)  # (out, 1)
    enough = tolerance**2 * (B.square() * support * precondition).sum(1, keepdim=True)
    for _ in range(iterations):
        if bool((squared <= enough).all()):
            break
        image = (direction @ A) * support
        curvature = (direction * image).sum(1, keepdim=True)
        step = torch.where(curvature > 0, squared / curvature, 0.0)
        V += step * direction
        residual -= step * image
        conditioned = residual * precondition
        before, squared = squared, (residual * conditioned).sum(1, keepdim=True)
        direction = conditioned + torch.where(before > 0, squared / before, 0.0) * direction
    return V


def _check_sums(name: str, sums: Tensor) -> None:
    if not bool(torch.isfinite(sums).all()):
        raise InputRefused(
            "E-STATISTIC-NONFINITE",
            f"the calibration inputs of {name} hold NaN or infinity",
            "check the model's weights, or run with --device cpu to compute in float32",
        )
