"""SparseGPT: one-shot pruning with second-order compensation (Frantar and Alistarh, arXiv 2301.00774).

Notation: ``H`` is the Hessian of the layer's squared output error, X^T X up to a constant, (in, in); ``U`` is
the upper Cholesky factor of its inverse, H^-1 = U^T U. Row ``i`` of ``U`` holds what remains of H^-1 once the
columns before ``i`` are fixed, so U_ii^2 is the ``[H_F]^-1_ii`` of the paper's equation 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning.magnitude import magnitude_mask
from compressor.pruning.pruner import Pruned, check_pattern, check_weight, lowest, lowest_in_groups, without
from compressor.pruning.wanda import NO_TOKENS
from compressor.recipe import PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import Gram, Statistic

RETRIES = (1.0, 5.0, 10.0, 50.0, 100.0)  # times the recipe's damping, until the Hessian can be factorised


class SparseGPT:
    """Prunes by w^2 / U_jj^2, per block of columns over all rows (or per group of a row for N:M).

    With ``recipe.update_weights`` each pruned weight's error is spread over the columns to its right; without
    it the masks come from the original weights alone, as in EBFT (arXiv 2402.12419).
    """

    statistic: type[Statistic] | None = Gram

    def prune(
        self,
        W: Tensor,
        statistic: Statistic | None,
        pattern: SparsityPattern,
        recipe: PruningRecipe,
        *,
        name: str = "weight",
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(out * width * s) zeros per column block, or by groups.

        Raises:
            InputRefused: NaN or infinity in the inputs, or a Hessian that no damping makes positive definite.
        """
        assert isinstance(statistic, Gram)
        check_pattern(name, W.shape[1], pattern)
        check_weight(name, W)
        statistic.check_finite(name)
        W = W.detach().float()
        if statistic.tokens == 0:
            mask = magnitude_mask(W, pattern)
            return Pruned(mask, without(W, mask), NO_TOKENS)
        dead = statistic.gram().diagonal().to(W.device) == 0
        U, damping = inverse_factor(statistic.gram().to(W.device), recipe.damping, name)
        note = None if damping == recipe.damping else f"Hessian damping raised to {damping:g}"
        width = column_block_width(recipe.column_block, pattern)
        if recipe.update_weights:
            weight, mask = prune_and_update(W, U, dead, pattern, width)
        else:
            mask = saliency_mask(saliency(W, U, dead), pattern, width)
            weight = without(W, mask)
        return Pruned(mask, weight, note)


def inverse_factor(G: Tensor, damping: float, name: str) -> tuple[Tensor, float]:
    """``U`` (in, in), float32, upper, with (H + damping)^-1 = U^T U, and the damping that it took.

    Instead of inverting and factorising again, the reversed Hessian is factorised once: with J the reversal
    of the axes and J H J = L L^T, U = J L^-1 J. In float64, since H of few tokens is singular but for the damping.

    Args:
        G: Gram matrix of the inputs, (in, in); columns without any input get H_jj = 1 and stay uncoupled.
        damping: Added to the diagonal, as a share of its mean.
        name: The matrix, for the error.

    Raises:
        InputRefused: Not positive definite even with the largest damping.
    """
    H = G.double().flip(0, 1)
    diagonal = H.diagonal()  # a view
    diagonal[diagonal == 0] = 1.0
    mean = float(diagonal.mean())
    added = 0.0
    for factor in RETRIES:
        diagonal += damping * factor * mean - added
        added = damping * factor * mean
        L, failed = torch.linalg.cholesky_ex(H)
        if int(failed) == 0:
            eye = torch.eye(len(H), dtype=H.dtype, device=H.device)
            inverse = torch.linalg.solve_triangular(L, eye, upper=False)
            return inverse.flip(0, 1).float(), damping * factor
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


def saliency(W: Tensor, U: Tensor, dead: Tensor) -> Tensor:
    """w_ij^2 / U_jj^2 (equation 3), (out, columns); 0 in columns whose input was never anything but 0.

    Args:
        W: (out, columns).
        U: (columns, columns), the diagonal block that belongs to them.
        dead: (columns,) bool. The published code sets such a column to 0 as a whole; here it is the first to
            be pruned and keeps what the sparsity leaves, so that the zeros are the mask's and no others.
    """
    return (W / U.diagonal()).square().masked_fill(dead, 0.0)


def saliency_mask(S: Tensor, pattern: SparsityPattern, width: int) -> Mask:
    """Keeps the highest of ``S`` (out, in): per block of ``width`` columns over all rows, or per group."""
    if pattern.is_n_m:
        return ~lowest_in_groups(S, pattern)
    return torch.cat([_keep_block(part, pattern.sparsity) for part in torch.split(S, width, dim=1)], dim=1)


def prune_and_update(
    W: Tensor, U: Tensor, dead: Tensor, pattern: SparsityPattern, width: int
) -> tuple[Tensor, Mask]:
    """Compensated weights and mask, both (out, in): algorithm 1, updating lazily from block to block."""
    W = W.clone()
    mask = torch.ones_like(W, dtype=torch.bool)
    for start in range(0, W.shape[1], width):
        block = slice(start, min(start + width, W.shape[1]))
        E = _prune_columns(W[:, block], mask[:, block], U[block, block], dead[block], pattern)
        W[:, block.stop :] -= E @ U[block, block.stop :]
    return without(W, mask), mask


def _prune_columns(W: Tensor, mask: Mask, U: Tensor, dead: Tensor, pattern: SparsityPattern) -> Tensor:
    """Prunes one block of columns in place, left to right; gives its errors (out, columns) for the rest.

    For column j: e = (w_j - q_j) / U_jj, then w_k -= e * U_jk for all k > j in the block. Columns stand in
    rows here (the transposed copy), so that each step reads and writes one contiguous stretch.
    """
    if not pattern.is_n_m:
        mask.copy_(_keep_block(saliency(W, U, dead), pattern.sparsity))
    T = W.T.contiguous()  # (columns, out)
    keep = mask.T.contiguous()
    E = torch.empty_like(T)
    diagonal = U.diagonal().tolist()
    for j in range(len(T)):
        if pattern.m is not None and j % pattern.m == 0:
            group = slice(j, j + pattern.m)
            S = saliency(T[group].T, U[group, group], dead[group])
            keep[group] = ~lowest_in_groups(S, pattern).T
        torch.mul(T[j], 1.0 / diagonal[j], out=E[j])
        E[j].masked_fill_(keep[j], 0.0)
        T[j + 1 :].addr_(U[j, j + 1 :], E[j], alpha=-1.0)
    W.copy_(T.T)
    mask.copy_(keep.T)
    return E.T


def _keep_block(S: Tensor, sparsity: float) -> Mask:
    """Keeps all but the floor(numel * s) lowest of a block, (out, columns)."""
    return ~lowest(S.reshape(1, -1), pruned_count(S.numel(), sparsity)).view(S.shape)
