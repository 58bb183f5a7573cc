"""ADMM pruning: mask and weights together, by alternating directions (Boza, "Fast and Effective Weight Update for
Pruned Large Language Models", arXiv 2401.02938).

Notation: columns are scaled by the length of their inputs, so ``W`` stands for W_ij ||X_j|| and ``A`` for the Gram
matrix of inputs of length one, damped: 1 + damping on the diagonal. ``V`` is the sparse copy, ``U`` the dual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.pruning.calibrated import CalibratedPruner
from compressor.pruning.pruner import Pruned, lowest, lowest_in_groups, without
from compressor.recipe import AdmmRecipe, PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import Gram, Statistic

Choose = Callable[[Tensor, int], Mask]  # scores and the iteration, from 0, to what is kept


class ADMM(CalibratedPruner[Gram]):
    """Prunes by |W + U| over the whole matrix, or by groups, a little more in each of the first iterations.

    With ``recipe.update_weights`` the weights are the iteration's, near to the least squares of the mask; without
    it only the mask is.
    """

    statistic: type[Statistic] | None = Gram

    def prune_calibrated(
        self, W: Tensor, statistic: Gram, pattern: SparsityPattern, recipe: PruningRecipe, name: str
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(out * in * s) zeros, or m - n in each group.

        Raises:
            InputRefused: NaN or infinity in the inputs, or a Hessian that the damping does not make definite.
        """
        W = W.contiguous()
        settings = recipe.admm
        A, inverse, lengths = statistic.derived(
            ("admm", settings.damping, settings.penalty), lambda G: _prepared(G, settings, name)
        )
        lengths = lengths.to(W.device)
        dead = statistic.gram().diagonal().to(W.device) == 0
        V, mask = alternate(
            W * lengths,
            A.to(W.device),
            inverse.to(W.device),
            settings.penalty,
            settings.iterations,
            gradual_choice(pattern, settings.mask_iterations, dead),
        )
        if not recipe.update_weights:
            return Pruned(mask, without(W, mask))
        return Pruned(mask, without(torch.where(dead, W, V / lengths), mask))


def alternate(
    W: Tensor, A: Tensor, inverse: Tensor, penalty: float, iterations: int, choose: Choose
) -> tuple[Tensor, Mask]:
    """Sparse weights and their mask, both (out, in), after ``iterations`` rounds.

    V <- M * (W + U);  U <- U + W - V;  W <- (W_dense A + penalty (V - U)) inverse.

    For a mask M that stays as it is, V goes to the weights that minimise (V - W) A (V - W)^T on it.

    Args:
        W: Scaled dense weights, (out, in).
        A: (in, in), symmetric.
        inverse: (A + penalty)^-1, (in, in).
        penalty: The paper's ρ.
        iterations: Updates of W.
        choose: The mask of an iteration, from W + U.
    """
    target = W @ A
    total = W  # W + U
    mask = choose(total, 0)
    for iteration in range(1, iterations + 1):
        V = without(total, mask)
        U = total - V
        total = torch.addmm(U, torch.add(target, V - U, alpha=penalty), inverse)
        mask = choose(total, iteration)
    return without(total, mask), mask


def gradual_choice(pattern: SparsityPattern, mask_iterations: int, dead: Tensor) -> Choose:
    """Keeps the highest of the whole matrix; the share pruned grows to ``pattern``'s, then the mask stays.

    The paper's cubic schedule: s_t = s - s (1 - t / k)^3 in iteration t = 1 ... k (the published code prunes
    by s from the start where the whole matrix is compared). For N:M the pruned are the lowest among those
    that the groups would lose, so that the last of them go in iteration k.

    Args:
        pattern: What to reach.
        mask_iterations: k.
        dead: (in,) bool, columns without any input: the first to go.
    """
    last: list[Mask] = []

    def choose(total: Tensor, iteration: int) -> Mask:
        if iteration >= mask_iterations:
            return last[-1]
        share = pattern.sparsity * (1 - (1 - (iteration + 1) / mask_iterations) ** 3)
        S = total.abs().masked_fill_(dead, 0.0)
        if pattern.is_n_m:
            S.masked_fill_(~lowest_in_groups(S, pattern), torch.inf)
        last[:] = [~lowest(S.view(1, -1), pruned_count(S.numel(), share)).view(S.shape)]
        return last[-1]

    return choose


def scaled_gram(G: Tensor) -> tuple[Tensor, Tensor]:
    """``G`` with ones on the diagonal, and the lengths it was divided by, (in,); a column without input gets 1."""
    lengths = G.diagonal().sqrt()
    lengths[lengths == 0] = 1.0
    scaled = G / lengths / lengths[:, None]
    scaled.diagonal().fill_(1.0)
    return scaled, lengths


def _prepared(G: Tensor, settings: AdmmRecipe, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """A, (A + penalty)^-1 and the lengths of the columns."""
    A, lengths = scaled_gram(G)
    A.diagonal().add_(settings.damping)  # the mean of the diagonal is 1
    damped = A.clone()
    damped.diagonal().add_(settings.penalty)
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise InputRefused(
            "E-HESSIAN-SINGULAR",
            f"the Hessian of {name} is not positive definite with damping {settings.damping:g}",
            "raise --num-calibration-samples, or pruning.admm.damping",
        )
    return A, torch.cholesky_inverse(L), lengths
