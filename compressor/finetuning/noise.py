"""Windows with some of their tokens exchanged: more contexts for the dense model to answer than the text has.

A sparse model that is tuned towards a dense one needs no true text: the dense model says what follows any tokens. So
each time a training window is used, some of its tokens give way to others, and both models read the same. What was
learnt by heart of the window no longer helps.

The others are tokens of the calibration text, or what the dense model takes to follow what stands before them. These
leave a window more like the text that the model is for, and so more of them can be exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from compressor.finetuning.losses import LOGITS

# What the dense model expects is drawn from this many tokens, its likeliest ones.
LIKELIEST = 512


def shares(noise: float, steps: int, *, fades: bool) -> Iterator[float]:
    """The share of tokens to exchange in each of ``steps`` steps: ``noise`` throughout, or from it down to 0."""
    for step in range(steps):
        yield noise * (1.0 - step / steps) if fades else noise


def with_noise(ids: Tensor, share: float, pool: Tensor) -> Tensor:
    """``ids`` (B, T) with about ``share`` of the tokens behind the first replaced; new draws of torch's generator.

    Args:
        ids: (B, T) int64, on the CPU; it is not changed.
        share: In [0, 1); 0 gives ``ids`` back and draws nothing.
        pool: Tokens of the calibration text, any shape; frequent ones are drawn as often as they stand there.
    """
    if not share:
        return ids
    drawn = pool.flatten()[torch.randint(pool.numel(), ids.shape)]  # (B, T)
    replaced = torch.rand(ids.shape) < share
    replaced[:, 0] = False  # a BOS stays
    return torch.where(replaced, drawn, ids)


def with_expected(
    ids: Tensor,
    share: float,
    chances: Tensor,
    states: Tensor,
    head: Callable[[Tensor], Tensor],
    *,
    vocab_size: int,
) -> Tensor:
    """``ids`` (B, T) with about ``share`` of the tokens behind the first replaced by what the dense model expects.

    Each is drawn from the dense model's distribution given all that stands before it in ``ids``, so that one draw
    does not depend on another.

    Args:
        ids: (B, T) int64, on the CPU; it is not changed.
        share: In [0, 1).
        chances: (2, B, T) in [0, 1), on the CPU: which tokens are replaced, and by what.
        states: The dense model's last hidden states (B, T, D) for ``ids``.
        head: (b, t, D) -> logits (b, t, V), token by token.
        vocab_size: V.

    Returns:
        (B, T) on the device of ``states``.
    """
    replaced = chances[0] < share
    replaced[:, 0] = False
    rows, places = replaced.nonzero(as_tuple=True)  # (n,) each
    exchanged = ids.to(states.device, copy=True)
    if not len(rows):
        return exchanged
    at_once = max(1, LOGITS // vocab_size)
    for row, place in zip(torch.split(rows, at_once), torch.split(places, at_once), strict=True):
        logits = head(states[row, place - 1][None])[0]  # (n, V)
        exchanged[row, place] = _drawn(logits, chances[1, row, place].to(logits.device))
    return exchanged


def _drawn(logits: Tensor, chances: Tensor) -> Tensor:
    """One of the likeliest tokens for each row of ``logits`` (n, V), where its ``chances`` (n,) fall among them."""
    best, tokens = logits.topk(min(LIKELIEST, logits.shape[-1]))  # (n, k), falling
    # A product and no cumsum, which on CUDA has no fixed order of summation.
    until = best.softmax(-1) @ best.new_ones(best.shape[-1], best.shape[-1]).triu()  # (n, k), rising
    place = (until <= chances[:, None] * until[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, place.clamp(max=tokens.shape[-1] - 1))[:, 0]
