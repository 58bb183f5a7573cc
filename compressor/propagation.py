"""Moving windows through the model one block at a time.

Notation: N windows, T tokens each, hidden width D.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from compressor.models.source import BlockSource
from compressor.ranks import ALONE, Ranks
from compressor.streams import Activations, in_order

TOKENS_AT_ONCE = 4096


def windows_per_batch(seqlen: int) -> int:
    """How many windows of this length go through a block at once when nothing is trained."""
    return max(1, TOKENS_AT_ONCE // seqlen)


def embedded(source: BlockSource, ids: Tensor, device: torch.device, ranks: Ranks = ALONE) -> Activations:
    """The hidden states (N, T, D) that enter the first block for windows ``ids`` (N, T), shared out over the ranks."""
    windows, seqlen = ids.shape
    states = Activations(windows, seqlen, source.hidden_size, device=device, ranks=ranks)
    held = ranks.share(windows)
    own = ids[held.start : held.stop]
    with torch.no_grad():
        for rows in in_order(len(own), windows_per_batch(seqlen)):
            states.write(rows.start, source.embed(own[rows.start : rows.stop].to(device)))
    return states


def advance(
    source: BlockSource, index: int, block: nn.Module, states: Activations, out: Activations | None = None
) -> Activations:
    """``states`` (N, T, D) pushed through block ``index``, written to ``out``, or in place; returns that store."""
    return states.map(
        lambda hidden: source.forward(index, block, hidden), windows_per_batch(states.shape[1]), out
    )


def visit(source: BlockSource, index: int, block: nn.Module, states: Activations) -> None:
    """Run block ``index`` on ``states`` for what observers see; its outputs are dropped."""
    with torch.no_grad():
        for rows in in_order(len(states), windows_per_batch(states.shape[1])):
            source.forward(index, block, states.read(rows))
