"""How much of the sparsity each block bears: one share of zeros per block, with the mean that was asked for.

The mean counts each block by its prunable weights, so the whole model ends at ``sparsity`` whatever its blocks' sizes;
for blocks of one size it is the published formulas' plain mean.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from compressor.errors import UsageError
from compressor.pruning.wanda import wanda_score

OWL_LAMBDA = 0.08  # as published for 70 %
OWL_M = 5.0


def uniform(n_blocks: int, sparsity: float) -> tuple[float, ...]:
    """The same share in every block."""
    return (sparsity,) * n_blocks


def linear(
    n_blocks: int, sparsity: float, slope: float, weights: Sequence[int] | None = None
) -> tuple[float, ...]:
    """An arithmetic progression, s_l = s + slope * (l - mean(l)): early blocks keep more if ``slope`` > 0.

    Source: Huang et al., "Determining Layer-wise Sparsity for Large Language Models Through a Theoretical
    Perspective", arXiv 2502.14770: errors of early blocks grow on their way through the later ones.

    Args:
        n_blocks: Blocks, in order.
        sparsity: The mean, in (0, 1).
        slope: Difference from one block to the next.
        weights: Prunable weights of each block; equal if not given.

    Raises:
        UsageError: A share would not lie between 0 and 1.
    """
    return _around(sparsity, [slope * index for index in range(n_blocks)], weights, "linear", "the slope")


def owl(
    outlier_ratios: Sequence[float],
    sparsity: float,
    lambda_: float = OWL_LAMBDA,
    weights: Sequence[int] | None = None,
) -> tuple[float, ...]:
    """Blocks with more outliers keep more: s_l = s - (a_l - mean(a)), a_l = 2 λ (r_l - min r) / (max r - min r).

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", arXiv 2310.05175, and its published code. Equal
    ratios give equal shares.

    Args:
        outlier_ratios: r of each block, see :func:`outlier_ratio`; any unit.
        sparsity: The mean, in (0, 1).
        lambda_: No two blocks differ by more than 2 λ.
        weights: Prunable weights of each block; equal if not given.

    Raises:
        UsageError: A share would not lie between 0 and 1.
    """
    low, high = min(outlier_ratios), max(outlier_ratios)
    width = high - low or 1.0
    steps = [-2 * lambda_ * (ratio - low) / width for ratio in outlier_ratios]
    return _around(sparsity, steps, weights, "owl", "its lambda")


def outlier_ratio(matrices: Iterable[tuple[Tensor, Tensor]], M: float = OWL_M) -> float:
    """Percentage of a block's Wanda scores |W_ij| ||X_j|| that exceed ``M`` times their mean over the block.

    Source: arXiv 2310.05175, the layerwise outlier distribution, and its published code: all linears of a block
    count as one.

    Args:
        matrices: W (out, in) and the lengths of its dense inputs' columns (in,), for each linear of the block.
        M: How far above the mean an outlier stands.
    """
    scores = [wanda_score(W.detach().float(), norms.to(W.device)) for W, norms in matrices]
    count = sum(S.numel() for S in scores)
    mean = sum(float(S.sum(dtype=torch.float64)) for S in scores) / count
    return 100 * sum(int((M * mean < S).sum()) for S in scores) / count


def _around(
    sparsity: float, steps: Sequence[float], weights: Sequence[int] | None, method: str, remedy: str
) -> tuple[float, ...]:
    """``steps`` moved to the weighted mean ``sparsity``.

    Raises:
        UsageError: A share would not lie between 0 and 1.
    """
    sizes = [1] * len(steps) if weights is None else weights
    mean = sum(size * step for size, step in zip(sizes, steps, strict=True)) / sum(sizes)
    shares = tuple(sparsity + step - mean for step in steps)
    for index, share in enumerate(shares):
        if not 0 < share < 1:
            raise UsageError(
                "E-ALLOCATION-RANGE",
                f"allocation {method} gives block {index} a sparsity of {share:.3g}, outside 0 and 1",
                f"lower {remedy}, or choose a sparsity nearer to 0.5",
            )
    return shares
