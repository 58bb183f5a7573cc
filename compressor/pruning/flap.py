"""FLAP: which heads and neurons fluctuate least, and what their absence leaves behind (An et al., AAAI'24).

Source: "Fluctuation-based Adaptive Structured Pruning for Large Language Models", arXiv 2312.11983, section 3,
and its published code where the paper is silent (the square for attention). A channel that hardly varies from
token to token can be replaced by its mean: W_:j x_j ≈ W_:j E[x_j], a bias.

Notation: ``W`` is the matrix that units leave through (``o_proj``, ``down_proj``), (out, in); ``x`` its inputs;
j a channel. All statistics are of the dense model.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from compressor.moments import Moments
from compressor.units import UnitGroup

__all__ = ["Metric", "channel_scores", "compensation", "member_scores", "standardised"]

Metric = Literal["WIFV", "IFV", "WIFN"]


def channel_scores(W: Tensor, inputs: Moments, metric: Metric) -> Tensor:
    """How much each channel matters, (in,) float64: equation 4, and the two that the paper compares it with.

    * WIFV: Var_t(x_j) · Σ_i W_ij², the output that its fluctuation makes;
    * IFV: Var_t(x_j);
    * WIFN: mean_i |W_ij| · ||x_j||_2, Wanda's score of a column.

    Args:
        W: (out, in).
        inputs: Moments of x, (in,).
        metric: Which one.
    """
    if metric == "IFV":
        return inputs.variance
    columns = W.to(inputs.mean.device)
    if metric == "WIFN":
        return columns.abs().mean(0, dtype=torch.float64) * inputs.norms
    return inputs.variance * columns.square().sum(0, dtype=torch.float64)


def member_scores(group: UnitGroup, scores: Tensor) -> Tensor:
    """Scores that can be compared between blocks: of each head or neuron of a group, (members,) float64.

    Attention's channel scores are squared first, as published; then all channels of the block are standardised
    (equation 6), and a head has the mean of its channels.

    Args:
        group: Heads or neurons.
        scores: Of its channels, (channels,).
    """
    if group.kind == "heads":
        scores = scores.square()
    return standardised(scores).view(group.members, group.width).mean(1)


def standardised(scores: Tensor) -> Tensor:
    """(s − mean) / std over the channels of one block; zeros where all are equal."""
    deviation = scores.std() if len(scores) > 1 else scores.new_zeros(())
    return torch.where(deviation > 0, (scores - scores.mean()) / deviation, torch.zeros_like(scores))


def compensation(W: Tensor, kept: Tensor, mean: Tensor) -> Tensor:
    """b_i = Σ_j W_ij E[x_j] over the channels that go (equation 3), (out,) in ``W``'s type.

    Exact where these channels are constant.

    Args:
        W: (out, in), before the removal.
        kept: (in,) bool.
        mean: E[x], (in,).
    """
    gone = ~kept.to(W.device)
    return (W[:, gone].double() @ mean.to(W.device)[gone]).to(W.dtype)
