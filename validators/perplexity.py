"""Perplexity: exp of the mean negative log likelihood in nats per predicted token.

All windows are equally long. Each window of T tokens predicts T - 1 (the first has nothing before it), so the
mean over all tokens equals the mean of the windows' means: the protocol of GPTQ, SparseGPT and Wanda on WikiText-2.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

# Logits are turned into float32 in slices of at most this many numbers, so that a vocabulary of 150 000 at
# 2048 tokens does not take a second and third copy of a gigabyte each.
_SLICE_NUMBERS = 2**24


def sum_nll(logits: Tensor, ids: Tensor) -> Tensor:
    """Negative log likelihood of each window, summed over its T - 1 predicted tokens, in nats: (B,) float64.

    -sum_t log softmax(logits[t])[ids[t + 1]], computed in float32, summed in float64.

    Args:
        logits: (B, T, V), any floating type, any device; row t predicts token t + 1.
        ids: (B, T) int64.
    """
    predictions = logits[:, :-1]  # (B, T-1, V)
    targets = ids[:, 1:].to(logits.device)  # (B, T-1)
    windows, length, vocabulary = predictions.shape
    step = max(1, _SLICE_NUMBERS // (windows * vocabulary))
    total = torch.zeros(windows, dtype=torch.float64, device=logits.device)
    for start in range(0, length, step):
        part = predictions[:, start : start + step].float()  # (B, step, V)
        nll = cross_entropy(part.flatten(0, 1), targets[:, start : start + step].flatten(), reduction="none")
        total += nll.view(windows, -1).double().sum(dim=-1)
    return total


def perplexity(nll_sum: float | Tensor, tokens: int) -> float:
    """exp(nll_sum / tokens), from nats summed over ``tokens`` predicted tokens; inf where exp overflows.

    A tensor of several windows' sums is added up first.
    """
    if tokens <= 0:
        raise ValueError(f"perplexity needs at least one predicted token, got {tokens}")
    total = nll_sum.double().sum().item() if isinstance(nll_sum, Tensor) else nll_sum
    try:
        return math.exp(total / tokens)
    except OverflowError:
        return math.inf


def measure_perplexity(
    logits_of: Callable[[NDArray[np.int64]], NDArray[np.float32]],
    windows: NDArray[np.int64],
    on_window: Callable[[int, int], None],
) -> float:
    """Perplexity of a model over windows (N, T), one at a time.

    Args:
        logits_of: Logits (1, T, V) of token ids (1, T).
        windows: (N, T) int64.
        on_window: Called with the windows done and in all, after each.
    """
    total = 0.0
    for index, ids in enumerate(windows):
        logits = logits_of(ids[None])
        total += float(sum_nll(torch.from_numpy(logits), torch.from_numpy(ids[None])).item())
        on_window(index + 1, len(windows))
    return perplexity(total, windows.shape[0] * (windows.shape[1] - 1))
