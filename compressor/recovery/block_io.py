"""What a block's repair sees, and what it tells when it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.linears import PrunableMatrix
from compressor.sparsity import Mask, SparsityPattern
from compressor.streams import Activations


@dataclass(frozen=True)
class BlockIO:
    """Inputs and wanted outputs of one block, for training windows and for held-out ones.

    Attributes:
        inputs: What the sparse blocks before this one give, (N, T, D).
        targets: The wanted output, (N, T, D).
        heldout_inputs: The same for windows that only select, (H, T, D).
        heldout_targets: (H, T, D).
        forward: Runs the block as the model would: (block, (B, T, D)) -> (B, T, D).
        device: Where the block is.
        amp_dtype: bfloat16 or float16 for mixed precision, ``None`` for float32.
        name: The block, for errors.
        matrices: What the masks belong to, for methods that look at single matrices.
        pattern: The zeros that the masks keep to, for methods that move masks.
        load_dense: A copy of the block as it was before pruning, for methods that give weights back.
        dense_inputs: What the dense model has before this block, (N, T, D), where the targets are its own and a
            method looks inside the block.
        heldout_dense_inputs: The same for the held-out windows, (H, T, D).
        micro_batch: Windows that go through the block at once in training and selection; ``None`` for whole batches.
    """

    inputs: Activations
    targets: Activations
    heldout_inputs: Activations
    heldout_targets: Activations
    forward: Callable[[nn.Module, Tensor], Tensor]
    device: torch.device
    amp_dtype: torch.dtype | None = None
    name: str = "the block"
    matrices: Sequence[PrunableMatrix] = ()
    pattern: SparsityPattern | None = None
    load_dense: Callable[[], nn.Module] | None = None
    dense_inputs: Activations | None = None
    heldout_dense_inputs: Activations | None = None
    micro_batch: int | None = None

    def at_once(self, batch_size: int) -> int:
        """Windows that go through the block at once."""
        return batch_size if self.micro_batch is None else min(batch_size, self.micro_batch)


@dataclass(frozen=True)
class Repaired:
    """How a repair went. Losses are mean squared errors of the block's output: windows, tokens, channels.

    Which tokens count, and how much, is the recipe's ``first_token`` (reconstruction.py).

    Attributes:
        loss_before: Held-out loss of the masked block as it came (step 0).
        loss_after: Held-out loss of the weights that were kept.
        target_power: The held-out loss of an output of 0; loss / target_power is the relative loss.
        train_loss_first: Training loss averaged over the first epoch; ``None`` if it diverged there.
        train_loss_last: The same over the last finite epoch.
        best_step: The step whose weights were kept; 0 means that no step was better than none.
        steps: Optimiser steps made.
        lr: Peak learning rate; 0 where nothing was trained.
        diverged: Whether a loss became NaN or infinite and the repair stopped there.
        elapsed_s: Wall time.
        masks: New masks by parameter, of a method that moves them; ``None`` where they stayed frozen.
        trained_parameters: How many numbers were free to move; ``None`` where the method does not tell.
    """

    loss_before: float
    loss_after: float
    target_power: float
    train_loss_first: float | None
    train_loss_last: float | None
    best_step: int
    steps: int
    lr: float
    diverged: bool
    elapsed_s: float
    masks: Mapping[str, Mask] | None = None
    trained_parameters: int | None = None

    @property
    def relative_before(self) -> float:
        """``loss_before`` as a share of the targets' mean square."""
        return self.loss_before / self.target_power if self.target_power else 0.0

    @property
    def relative_after(self) -> float:
        """``loss_after`` as a share of the targets' mean square."""
        return self.loss_after / self.target_power if self.target_power else 0.0
