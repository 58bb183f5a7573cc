"""The whole sparse model in memory, as the end-to-end methods see it.

Notation: N windows of T tokens, B of them in a batch, hidden width D, vocabulary V, L blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from compressor.linears import PrunableMatrix
from compressor.ranks import ALONE, Ranks
from compressor.sparsity import Mask
from compressor.streams import Activations

# On the CPU the activations of a step are kept up to this size, on CUDA never, where memory decides whether the
# model fits at all. Running blocks twice took 0.52 s of processor time a step and 0.37 s without (8 x 256 tokens of
# examples/tiny-llm, one thread), and let the process grow by 111 MiB instead of 189.
KEPT_ACTIVATIONS_BYTES = 2**30


@dataclass(frozen=True)
class Windows:
    """Windows of tokens, and what the dense model makes of them.

    Attributes:
        ids: (N, T) int64, of all ranks.
        dense: The dense model's last hidden states, (N, T, D), before final norm and head; ``None`` where no
            method asks for them. The dense model's logits are ``head(dense)``, since final norm and head are
            never changed.
    """

    ids: Tensor
    dense: Activations | None = None

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class SparseModel:
    """All blocks, pruned, with what stands before and behind them.

    Attributes:
        blocks: In order, float32, on ``device``, without gradients.
        masks: Of each block: parameter path -> bool mask of the parameter's shape, True = kept.
        matrices: Of each block: the matrices that were pruned.
        training: Windows to train on.
        heldout: Windows that only select.
        embed: ids (B, T) -> what enters the first block (B, T, D), without gradients.
        forward: (index, block, (B, T, D)) -> (B, T, D), as the model runs block ``index``.
        head: (B, T, D) -> logits (B, T, V) float32, with gradients to its input; token by token.
        load_dense: The dense block ``index``, for methods that look at every layer of the dense model.
        vocab_size: V.
        device: Where all of it computes.
        amp_dtype: bfloat16 or float16 for mixed precision, ``None`` for float32.
        micro_batch: Windows that go through the blocks at once; ``None`` for whole batches.
        ranks: Who shares the windows; ``dense`` of each is what this one holds.
    """

    blocks: Sequence[nn.Module]
    masks: Sequence[Mapping[str, Mask]]
    matrices: Sequence[Sequence[PrunableMatrix]]
    training: Windows
    heldout: Windows
    embed: Callable[[Tensor], Tensor]
    forward: Callable[[int, nn.Module, Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    load_dense: Callable[[int], nn.Module]
    vocab_size: int
    device: torch.device
    amp_dtype: torch.dtype | None = None
    micro_batch: int | None = None
    ranks: Ranks = ALONE

    def together(self) -> nn.ModuleList:
        """All blocks as one module; a parameter of block 3 is ``3.<path>``."""
        return nn.ModuleList(self.blocks)

    def all_masks(self) -> dict[str, Mask]:
        """Every mask by its parameter's path in :meth:`together`."""
        return {f"{index}.{name}": mask for index, own in enumerate(self.masks) for name, mask in own.items()}


def hidden_states(
    model: SparseModel, blocks: Sequence[nn.Module], ids: Tensor, *, recompute: bool = False
) -> list[Tensor]:
    """The output (B, T, D) of each of ``blocks``, one after the other, for ``ids`` (B, T).

    Args:
        model: Says how they are run.
        blocks: The model's own, or others in their place.
        ids: (B, T).
        recompute: Forget what is inside a block until the backward pass, which runs it again (gradient
            checkpointing, arXiv 1604.06174): the same gradients, less memory, more time.
    """
    hidden = model.embed(ids)
    states = []
    for index, block in enumerate(blocks):
        if recompute and torch.is_grad_enabled():
            hidden = checkpoint(model.forward, index, block, hidden, use_reentrant=False)
        else:
            hidden = model.forward(index, block, hidden)
        states.append(hidden)
    return states


def kept_bytes_per_token(blocks: Sequence[nn.Module]) -> int:
    """About what a step keeps of each token without recomputation: inputs and outputs of every matrix, float32."""
    return 4 * sum(
        sum(weight.shape[-2:]) for block in blocks for weight in block.parameters() if weight.ndim >= 2
    )
