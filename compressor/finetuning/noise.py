"""Windows with some of their tokens exchanged: more contexts for the dense model to answer than the text has.

A sparse model that is tuned towards a dense one needs no true text: the dense model says what follows any tokens. So
each time a training window is used, a few of its tokens give way to others of the calibration text, and both models
read the same. What was learnt by heart of the window no longer helps.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
