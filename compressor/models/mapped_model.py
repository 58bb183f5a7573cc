"""A whole model whose decoder blocks have values only while they are used: one block in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.models.checkpoint import Checkpoint
from compressor.models.loading import load_without_experts, restore_float32_buffers
from compressor.models.mapped import MappedFiles
from exporters.parts import named_tensors
from exporters.probe import find_blocks

__all__ = ["MappedModel"]


class MappedModel:
    """A checkpoint's model in a dtype of one's choice, its blocks on the meta device until they are filled.

    Args:
        checkpoint: The model.
        dtype: What it computes in. Weights that are stored in another one are converted as their block is filled.
        device: Where it computes.
        traceable: See ``load_causal_lm``.

    Attributes:
        model: The model in eval mode. What is outside the blocks holds its values.
        blocks: Its decoder blocks.

    Raises:
        InputRefused: As ``load_causal_lm``.
        ExportError: E-EXPORT-NO-BLOCKS.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        traceable: bool = False,
    ) -> None:
        model, self._experts = load_without_experts(checkpoint, checkpoint.dtype, traceable=traceable)
        self.model: Any = model
        restore_float32_buffers(model)
        with self._experts.first_filled(model):
            self.blocks = find_blocks(model)
        self._mapped = MappedFiles(checkpoint.weights.paths)
        self._dtype, self._device = dtype, torch.device(device)
        self._stored = [
            {name: parameter.data for name, parameter in block.named_parameters()}
            for block in self.blocks.modules
        ]
        for index in range(len(self.blocks)):
            self.empty(index)
        for tensor in self._rest().values():
            is_parameter = isinstance(tensor, nn.Parameter)
            tensor.data = tensor.data.to(self._device, dtype if is_parameter else tensor.dtype)

    @contextmanager
    def filled(self, index: int) -> Iterator[nn.Module]:
        """One block with its values, which it loses at the end."""
        self.fill(index)
        try:
            yield self.blocks.modules[index]
        finally:
            self.empty(index)

    def fill(self, index: int) -> None:
        """Give one block its values."""
        self._place(index, self._device)

    def empty(self, index: int) -> None:
        """Take one block's values from it, and give back the memory that they took."""
        self._place(index, torch.device("meta"))
        self._mapped.give_back(self._stored[index].values())

    def fill_as_they_run(self) -> Any:
        """The model, which from now on fills each block as its turn comes."""
        for index, block in enumerate(self.blocks.modules):
            block.register_forward_pre_hook(partial(self._before_run, index))
            block.register_forward_hook(partial(self._after_run, index))
        return self.model

    def stored(self, name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy of one of :meth:`tensors` on the host, converted from what is stored."""
        copy = self._experts.values(name, tensor.detach()).to("cpu", dtype, copy=True)
        self._mapped.give_back([tensor])
        return copy

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, a block's as they are stored, and buffers, by their names in the state dict; fused experts on
        the meta device.
        """
        named = {
            f"{self.blocks.block_name(index)}.{name}": nn.Parameter(tensor, requires_grad=False)
            for index, tensors in enumerate(self._stored)
            for name, tensor in tensors.items()
        }
        return {**named, **self._rest()}

    def _before_run(self, index: int, *_: Any) -> None:
        self.fill(index)

    def _after_run(self, index: int, *_: Any) -> None:
        self.empty(index)

    def _rest(self) -> dict[str, Tensor]:
        """All but the blocks' parameters."""
        inside = {
            f"{self.blocks.block_name(index)}.{name}"
            for index, tensors in enumerate(self._stored)
            for name in tensors
        }
        return {name: tensor for name, tensor in named_tensors(self.model).items() if name not in inside}

    def _place(self, index: int, device: torch.device) -> None:
        """A block's parameters, made of the stored ones, on a device."""
        block = self.blocks.modules[index]
        for name, tensor in self._stored[index].items():
            path, _, own = name.rpartition(".")
            if device.type != "meta":
                tensor = self._experts.values(f"{self.blocks.block_name(index)}.{name}", tensor)
            moved = nn.Parameter(tensor.to(device, self._dtype), requires_grad=False)
            setattr(block.get_submodule(path), own, moved)
