"""SparseGPT: one-shot pruning with second-order compensation (Frantar and Alistarh, arXiv 2301.00774).

Notation: ``H`` is the Hessian of the layer's squared output error, X^T X up to a constant, (in, in); ``U`` is
the upper Cholesky factor of its inverse, H^-1 = U^T U. Row ``i`` of ``U`` holds what remains of H^-1 once the
columns before ``i`` are fixed, so U_ii^2 is the ``[H_F]^-1_ii`` of the paper's equation 3.

H is never inverted here. With the triangular ``R`` = U^-1, so that H = R R^T, the scaled errors ``E`` of the columns
that are done are (W - Q) R, where ``Q`` are their new weights. What the paper subtracts from a later block of
columns b, E U_:b, is then -(W - Q) R_:b U_bb: of U only the blocks on the diagonal are needed, and they are the
inverses of R's. The same weights come out for less than half of the arithmetic before the pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning.calibrated import CalibratedPruner
from compressor.pruning.group_ranks import LONGEST, lowest_of_planes
from compressor.pruning.pruner import Pruned, lowest, lowest_in_groups, without
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import Gram, Statistic

RETRIES = (1.0, 5.0, 10.0, 50.0, 100.0)  # times the recipe's damping, until the Hessian can be factorised
_STEP = 8  # columns updated one by one before the others of a block follow, where there is no N:M


class SparseGPT(CalibratedPruner[Gram]):
    """Prunes by w^2 / U_jj^2, per block of columns over all rows (or per group of a row for N:M).

    With ``recipe.update_weights`` each pruned weight's error is spread over the columns to its right; without
    it the masks come from the original weights alone, as in EBFT (arXiv 2402.12419).
    """

    statistic: type[Statistic] | None = Gram

    def prune_calibrated(
        self, W: Tensor, statistic: Gram, pattern: SparsityPattern, recipe: PruningRecipe, name: str
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(out * width * s) zeros per column block, or by groups.

        Raises:
            InputRefused: NaN or infinity in the inputs, or a Hessian that no damping makes positive definite.
        """
        dead = statistic.gram().diagonal().to(W.device) == 0
        R, damping = statistic.derived(
            ("hessian_factor", recipe.damping), lambda G: hessian_factor(G, recipe.damping, name)
        )
        note = None if damping == recipe.damping else f"Hessian damping raised to {damping:g}"
        width = column_block_width(recipe.column_block, pattern)
        if recipe.update_weights:
            weight, mask = prune_and_update(W, R.to(W.device), dead, pattern, width)
        else:
            mask = saliency_mask(saliency(W, R.diagonal().to(W.device), dead), pattern, width)
            weight = without(W, mask)
        return Pruned(mask, weight, note)


def hessian_factor(G: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """``R`` (in, in), float32, upper triangular, with H + damping = R R^T, and the damping that it took.

    With J the reversal of the axes and J H J = L L^T, R = J L J. In float32, whose rounding is that of the sum G
    itself; should that make a pivot negative, in float64, and then with more damping.

    Args:
        G: Gram matrix of the inputs, (in, in); columns without any input get H_jj = 1 and stay uncoupled.
        damping: Added to the diagonal, as a share of its mean.
        name: The matrix, for the error.

    Raises:
        InputRefused: Not positive definite even with the largest damping.
    """
    H = G.flip(0, 1)  # a copy
    diagonal = H.diagonal()  # a view
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    for factor in RETRIES:
        for dtype in (torch.float32, torch.float64):
            damped = H.to(dtype, copy=True)
            damped.diagonal().add_(damping * factor * mean)
            L, failed = torch.linalg.cholesky_ex(damped)
            if int(failed) == 0:
                return L.float().flip(0, 1), damping * factor
    raise InputRefused(
        "E-HESSIAN-SINGULAR",
        f"the Hessian of {name} is not positive definite, even with damping {damping * RETRIES[-1]:g}",
        "raise --num-calibration-samples, or choose --pruner wanda",
    )


def column_block_width(column_block: int, pattern: SparsityPattern) -> int:
    """Columns per block: as asked, rounded down to whole N:M groups (at least one)."""
    if pattern.m is None:
        return column_block
    return max(pattern.m, column_block // pattern.m * pattern.m)


def saliency(W: Tensor, diagonal: Tensor, dead: Tensor) -> Tensor:
    """(w_ij R_jj)^2 = w_ij^2 / U_jj^2 (equation 3), (out, columns); 0 where the input was never anything but 0.

    Args:
        W: (out, columns).
        diagonal: R_jj of these columns, (columns,).
        dead: (columns,) bool. The published code sets such a column to 0 as a whole; here it is the first to
            be pruned and keeps what the sparsity leaves, so that the zeros are the mask's and no others.
    """
    return (W * diagonal).square_().masked_fill_(dead, 0.0)


def saliency_mask(S: Tensor, pattern: SparsityPattern, width: int) -> Mask:
    """Keeps the highest of ``S`` (out, in): per block of ``width`` columns over all rows, or per group."""
    if pattern.is_n_m:
        return ~lowest_in_groups(S, pattern)
    return torch.cat([~_block_lowest(part, pattern) for part in torch.split(S, width, dim=1)], dim=1)


def prune_and_update(
    W: Tensor, R: Tensor, dead: Tensor, pattern: SparsityPattern, width: int
) -> tuple[Tensor, Mask]:
    """Compensated weights and mask, both (out, in): algorithm 1, block of columns by block of columns.

    Columns stand in rows here (the transposed copy), so that each step reads and writes contiguous stretches.
    """
    change = W.T.clone(memory_format=torch.contiguous_format)  # (in, out), in the end W - Q
    Q = torch.empty_like(change)
    pruned = torch.empty_like(change, dtype=torch.bool)
    for start in range(0, len(change), width):
        block = slice(start, min(start + width, len(change)))
        U = _inverse(R[block, block])
        torch.addmm(change[block], U.T, R[:start, block].T @ change[:start], out=Q[block])
        pruned[block] = _prune_columns(Q[block], U, dead[block], pattern)
        change[block] -= Q[block]
    return Q.T.contiguous(), ~pruned.T.contiguous()


def _inverse(R: Tensor) -> Tensor:
    """R^-1 of an upper triangular ``R`` (columns, columns), float32 by way of float64."""
    eye = torch.eye(len(R), dtype=torch.float64, device=R.device)
    inverse: Tensor = torch.linalg.solve_triangular(R.double(), eye, upper=True)
    return inverse.float()


def _prune_columns(T: Tensor, U: Tensor, dead: Tensor, pattern: SparsityPattern) -> Tensor:
    """Prunes one block of columns in place, left to right; one where it did, else zero, (columns, out).

    For column j: e = (w_j - q_j) / U_jj, then w_k -= e * U_jk for all k > j in the block. A group of columns
    takes what those before it in the block owe it in one product, then each column what its group owes it.

    Args:
        T: The columns, (columns, out).
        U: The block of the inverse factor on the diagonal, (columns, columns).
        dead: (columns,) bool, see :func:`saliency`.
        pattern: Chosen per group as its turn comes; unstructured, for the whole block before its first column.
    """
    step = pattern.m or _STEP
    inverse = (1 / U.diagonal())[:, None]
    weight = inverse.masked_fill(dead[:, None], 0.0)  # the saliency's square root, for a weight of 1
    if pattern.is_n_m:
        pruned = torch.empty_like(T)
    else:
        pruned = _block_lowest((T * weight).square_().T, pattern).T.to(T.dtype).contiguous()
    owed = -U.T.contiguous()
    E = torch.empty_like(T)
    rows = list(
        zip(*(torch.split(each, 1) for each in (T, pruned, inverse, E)), strict=True)
    )  # (1, out) each
    for start in range(0, len(T), step):
        group = slice(start, min(start + step, len(T)))
        if start:
            T[group].addmm_(owed[group, :start], E[:start])
        if pattern.is_n_m:
            pruned[group] = _group_lowest((T[group] * weight[group]).square_(), pattern)
        for j, (column, goes, scale, error) in enumerate(rows[group], start):
            if j > start:
                column.addmm_(owed[j : j + 1, start:j], E[start:j])
            torch.mul(column, goes, out=error).mul_(scale)
    T.addcmul_(T, pruned, value=-1)  # w - w * 1 is +0.0
    return pruned


def _group_lowest(S: Tensor, pattern: SparsityPattern) -> Tensor:
    """One where the m - n lowest of each column of ``S`` (m, out) are, else zero: one group of every row."""
    assert pattern.n is not None
    assert pattern.m is not None
    if pattern.m <= LONGEST:
        return lowest_of_planes(S, pattern.m - pattern.n)
    return lowest(S.T, pattern.m - pattern.n).T.to(S.dtype)


def _block_lowest(S: Tensor, pattern: SparsityPattern) -> Tensor:
    """Where the floor(numel * s) lowest of a block are, (out, columns)."""
    return lowest(S.reshape(1, -1), pruned_count(S.numel(), pattern.sparsity)).view(S.shape)
