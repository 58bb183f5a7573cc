"""A model folder as the export takes it: traceable, in the dtype that the graph computes in."""

from __future__ import annotations

from pathlib import Path

import torch

from compressor.models.checkpoint import Checkpoint, open_checkpoint
from compressor.models.loading import load_causal_lm
from exporters.parts import LoadedParts

__all__ = ["export_parts"]


def export_parts(
    model: str | Path | Checkpoint, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> LoadedParts:
    """The model for ``exporters``, its weights stored in ``dtype``.

    The graph of a float16 model computes in float16. One of a bfloat16 model computes in float32, since ONNX
    Runtime's CPU provider has no bfloat16 kernels: the weights are stored in bfloat16 and cast where they are used.

    Args:
        model: A model's folder, or the checkpoint that was opened.
        dtype: What the weights are stored in; the checkpoint's where none is given.
        trust_remote_code: As for ``open_checkpoint``.

    Raises:
        InputRefused: The model cannot be loaded.
    """
    checkpoint = (
        model
        if isinstance(model, Checkpoint)
        else open_checkpoint(model, trust_remote_code=trust_remote_code)
    )
    stored = checkpoint.dtype if dtype is None else dtype
    computed = torch.float16 if stored == torch.float16 else torch.float32
    return LoadedParts(load_causal_lm(checkpoint, computed, traceable=True), stored)
