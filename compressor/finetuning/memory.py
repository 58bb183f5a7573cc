"""Whether the whole model can be tuned at once: bytes needed against bytes there are. An estimate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from compressor.devices import free_device_bytes
from compressor.finetuning.losses import LOGITS
from compressor.finetuning.sparse_model import KEPT_ACTIVATIONS_BYTES, kept_bytes_per_token

# A parameter in float32, its gradient, Adam's two moments, the best step's copy, and its mask.
BYTES_PER_PARAMETER = 5 * 4 + 1
# A dense copy that runs along.
_BYTES_PER_DENSE_PARAMETER = 4
# Logits of the sparse and the dense model, their logarithms, and the gradient.
_LOGIT_COPIES = 5
# Of what is free; the rest is for the allocator's waste and for what the estimate leaves out.
_USABLE = 0.8


@dataclass(frozen=True)
class Room:
    """Bytes that end-to-end tuning needs, and bytes that are free where it would happen."""

    needed_bytes: int
    free_bytes: int

    @property
    def fits(self) -> bool:
        """Whether the need leaves a fifth of what is free."""
        return self.needed_bytes <= _USABLE * self.free_bytes

    def __str__(self) -> str:
        needed, free = (f"{size / 2**30:.2f} GiB" for size in (self.needed_bytes, self.free_bytes))
        return f"needs about {needed}, {free} are free"


def room_for(
    blocks: Sequence[nn.Module],
    *,
    tokens: int,
    hidden_size: int,
    vocab_size: int,
    stored_tokens: int,
    runs_dense: bool,
    device: torch.device,
    free_host_bytes: int,
) -> Room:
    """What tuning ``blocks`` together takes on ``device``, and what is free there.

    Args:
        blocks: All of them, or their structure.
        tokens: Of a batch.
        hidden_size: D.
        vocab_size: V.
        stored_tokens: Of all calibration and held-out windows, whose hidden states lie in host memory.
        runs_dense: Whether a dense copy of the blocks runs along.
        device: Where it would happen.
        free_host_bytes: Host memory that is free, which counts where the device is the CPU.
    """
    parameters = sum(weight.numel() for block in blocks for weight in block.parameters())
    kept = tokens * max(kept_bytes_per_token([block]) for block in blocks)
    passed_on = 4 * tokens * hidden_size * len(blocks)
    logits = 4 * _LOGIT_COPIES * min(LOGITS, tokens * vocab_size)
    needed = BYTES_PER_PARAMETER * parameters + 2 * kept + passed_on + logits
    if runs_dense:
        needed += _BYTES_PER_DENSE_PARAMETER * parameters + passed_on
    if device.type == "cuda":
        return Room(needed, free_device_bytes(device))
    streams = 2 * 4 * stored_tokens * hidden_size  # the sparse path's and the dense path's
    return Room(needed + streams + KEPT_ACTIVATIONS_BYTES, free_host_bytes)
