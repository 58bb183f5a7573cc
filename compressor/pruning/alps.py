"""ALPS: the mask by alternating directions with a growing penalty, then the weights by conjugate gradients
(Meng, Behdin, Wang and Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large Language
Models", arXiv 2406.07831).

Notation: columns are scaled so that ``A``, the damped Gram matrix, has ones on its diagonal; ``W`` are the scaled
dense weights, ``B`` the weights of the least squares, ``D`` their sparse copy, ``dual`` the paper's V, ``rho`` ρ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.least_squares import conjugate_gradients
from compressor.pruning.admm import scaled_gram
from compressor.pruning.calibrated import CalibratedPruner
from compressor.pruning.pruner import Pruned, lowest, lowest_in_groups, without
from compressor.recipe import AlpsRecipe, PruningRecipe
from compressor.sparsity import Mask, SparsityPattern, pruned_count
from compressor.statistics import Gram, Statistic

INTERVAL = 3  # iterations between two looks at the support
GROWTH = (
    (0.1, 1.3),
    (0.005, 1.2),
    (0.0, 1.1),
)  # more than this share of the kept places changed: ρ times that
FIRST_MOVE = 0.005
SETTLED_AFTER, SETTLED = 30, 0.0003  # from this iteration on, so small a change ends the search


class ALPS(CalibratedPruner[Gram]):
    """Prunes by |B + dual / ρ| over the whole matrix, or by groups, until the support stays.

    With ``recipe.update_weights`` the weights are the least squares of the mask, by conjugate gradients; without
    it only the mask is.
    """

    statistic: type[Statistic] | None = Gram

    def prune_calibrated(
        self, W: Tensor, statistic: Gram, pattern: SparsityPattern, recipe: PruningRecipe, name: str
    ) -> Pruned:
        """The pruned copy of ``W`` (out, in); floor(out * in * s) zeros, or m - n in each group.

        Raises:
            InputRefused: NaN or infinity in the inputs.
        """
        W = W.contiguous()
        damping = recipe.alps.damping
        prepared = statistic.derived(("alps", damping), lambda G: _prepared(G, damping))
        A, eigenvalues, Q, lengths = (part.to(W.device) for part in prepared)
        dead = statistic.gram().diagonal().to(W.device) == 0
        scaled = W * lengths
        D, mask = find_support(scaled, A, (eigenvalues, Q), pattern, dead, recipe.alps)
        if not recipe.update_weights:
            return Pruned(mask, without(W, mask))
        V = conjugate_gradients(A, scaled @ A, mask, D, recipe.alps.cg_iterations)
        return Pruned(mask, without(torch.where(dead, W, V / lengths), mask))


def find_support(
    W: Tensor,
    A: Tensor,
    eigen: tuple[Tensor, Tensor],
    pattern: SparsityPattern,
    dead: Tensor,
    settings: AlpsRecipe,
) -> tuple[Tensor, Mask]:
    """Sparse weights and their mask, both (out, in): the paper's iteration with its scheme for ρ.

    B <- (W A - dual + ρ D) (A + ρ)^-1;  D <- the largest of B + dual / ρ;  dual <- dual + ρ (B - D).

    Until the support first moves by ``FIRST_MOVE``, ρ is divided by 5 and the search begins anew, as in the
    published code: a ρ that is too large pins the support to where it starts.

    Args:
        W: Scaled dense weights, (out, in).
        A: (in, in), symmetric.
        eigen: Eigenvalues (in,) and eigenvectors (in, in) of ``A``.
        pattern: How many are kept, and where.
        dead: (in,) bool, columns without any input: the first to go.
        settings: ρ at first, and the most iterations.
    """
    target, rho, moves = W @ A, settings.penalty, False
    seen = _kept(W, pattern, dead)
    start = D = without(W, seen)
    mask, dual = seen, torch.zeros_like(W)
    kept = W.numel() - pruned_count(W.numel(), pattern.sparsity)
    inverse = _inverse(eigen, rho)
    for iteration in range(1, settings.max_iterations + 1):
        B = (target - dual + rho * D) @ inverse
        total = B + dual / rho
        mask = _kept(total, pattern, dead)
        D = without(total, mask)
        dual += rho * (B - D)
        if iteration % INTERVAL:
            continue
        changed = int((mask != seen).sum()) / kept
        seen = mask
        growth = next((factor for share, factor in GROWTH if changed > share), None)
        moves = moves or changed > FIRST_MOVE
        if not moves:
            rho, D, dual = rho / 5, start, torch.zeros_like(W)
        elif growth is None or (iteration > SETTLED_AFTER and changed < SETTLED):
            break
        else:
            rho *= growth
        inverse = _inverse(eigen, rho)
    return D, mask


def _kept(total: Tensor, pattern: SparsityPattern, dead: Tensor) -> Mask:
    """Keeps the largest of the whole matrix, or of each group, (out, in)."""
    S = total.abs().masked_fill_(dead, 0.0)
    if pattern.is_n_m:
        return ~lowest_in_groups(S, pattern)
    return ~lowest(S.view(1, -1), pruned_count(S.numel(), pattern.sparsity)).view(S.shape)


def _inverse(eigen: tuple[Tensor, Tensor], rho: float) -> Tensor:
    """(A + ρ)^-1, (in, in)."""
    eigenvalues, Q = eigen
    return (Q / (eigenvalues + rho)) @ Q.T


def _prepared(G: Tensor, damping: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, its eigenvalues and eigenvectors, the lengths of the columns; float32, decomposed in float64."""
    damped = G.clone()
    damped.diagonal().add_(damping * float(G.diagonal().mean()))
    A, lengths = scaled_gram(damped)
    eigenvalues, Q = torch.linalg.eigh(A.double())
    return A, eigenvalues.clamp(min=0).float(), Q.float(), lengths
