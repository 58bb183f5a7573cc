"""A look at every block of the dense model before the first one is pruned.

What is shared out over all blocks (sparsity by outliers, heads and neurons by one global order) needs figures
of all of them first. One block is in memory at a time, beside the hidden states of the calibration windows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from compressor.errors import StoppedSafely
from compressor.models.source import BlockSource
from compressor.propagation import advance, embedded
from compressor.ranks import ALONE, Ranks

__all__ = ["survey"]

Found = TypeVar("Found")


def survey(
    source: BlockSource,
    ids: Tensor,
    device: torch.device,
    examine: Callable[[int, nn.Module, Callable[[], object]], Found],
    *,
    stop: Callable[[], bool] = lambda: False,
    ranks: Ranks = ALONE,
) -> tuple[Found, ...]:
    """What ``examine`` finds in each block of the dense model, first block to last.

    Args:
        source: The dense blocks.
        ids: Calibration windows (N, T).
        device: Where blocks compute.
        examine: Called with a block's index, the block, and a function that sends all windows through it, as
            they come from the dense blocks before it; to be called once, with whatever observes them in place.
        stop: Asked between blocks; true ends the survey.
        ranks: Who shares the windows; ``examine`` sends those of this rank.

    Raises:
        StoppedSafely: ``stop`` said so.
    """
    states = embedded(source, ids, device, ranks)
    found = []
    for index in range(source.num_blocks):
        if stop():
            raise StoppedSafely(
                "E-STOPPED",
                f"stopped at block {index} of {source.num_blocks}, before anything was pruned",
                "run the same command again",
            )
        block = source.load_block(index)
        found.append(examine(index, block, partial(advance, source, index, block, states)))
    return tuple(found)
