"""A model folder as the export takes it: traceable, in the dtype that the graph computes in."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.models.checkpoint import Checkpoint, open_checkpoint
from compressor.models.mapped_model import MappedModel

__all__ = ["MappedParts", "export_parts"]


class MappedParts:
    """A model for ``exporters`` whose blocks are in memory one at a time.

    Args:
        mapped: The model, in the dtype that the graph computes in.
        dtype: What floating-point parameters are stored in.
    """

    def __init__(self, mapped: MappedModel, dtype: torch.dtype) -> None:
        self.model: Any = mapped.model
        self.blocks = mapped.blocks
        self._mapped, self._dtype = mapped, dtype
        self._tensors = mapped.tensors()

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """One block with its values, while the context is open."""
        return self._mapped.filled(index)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype in which a parameter or buffer is to be stored."""
        tensor = self._tensors[name]
        convert = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return self._dtype if convert else tensor.dtype

    def stored(self, name: str) -> Tensor:
        """A copy of a parameter or buffer in its stored dtype."""
        return self._mapped.stored(name, self._tensors[name], self.stored_dtype(name))


def export_parts(
    model: str | Path | Checkpoint, dtype: torch.dtype | None = None, *, trust_remote_code: bool = False
) -> MappedParts:
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
    return MappedParts(MappedModel(checkpoint, computed, traceable=True), stored)
