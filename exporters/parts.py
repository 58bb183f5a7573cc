"""What the export takes: a model, its blocks one at a time, its weights one at a time as they are stored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from exporters.probe import BlockList, find_blocks

__all__ = ["LoadedParts", "ModelParts", "named_tensors"]


class ModelParts(Protocol):
    """A causal language model that need not be in memory whole.

    The graph computes in the dtype of the model's parameters. Where a weight is stored in another one
    (bfloat16, for which ONNX Runtime has no CPU kernels), a Cast follows its initializer.
    """

    @property
    def model(self) -> nn.Module:
        """The causal language model in eval mode, its attention implementation set.

        Everything outside the decoder blocks holds its values; the blocks may lie on the meta device.
        """

    @property
    def blocks(self) -> BlockList:
        """The decoder blocks of `model`."""

    def block(self, index: int) -> AbstractContextManager[nn.Module]:
        """Yield one block with its values, in the dtype that the graph computes in."""

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter or buffer is to be stored, by its name in the state dict."""

    def stored(self, name: str) -> Tensor:
        """Return a parameter or buffer by its name in the state dict, in its stored dtype."""


class LoadedParts:
    """A model that is in memory.

    Args:
        model: A causal language model in eval mode.
        dtype: Store floating-point parameters in this dtype instead of the model's; they are rounded one at a
            time when they are asked for.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.blocks = find_blocks(model)
        self._dtype = dtype
        self._tensors = named_tensors(model)

    @contextmanager
    def block(self, index: int) -> Iterator[nn.Module]:
        """Yield one block, which is in memory."""
        yield self.blocks.modules[index]

    def stored_dtype(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter or buffer is to be stored."""
        tensor = self._tensors[name]
        convert = self._dtype is not None and isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        return self._dtype if convert and self._dtype is not None else tensor.dtype

    def stored(self, name: str) -> Tensor:
        """Return a parameter or buffer in its stored dtype."""
        return self._tensors[name].detach().to("cpu", self.stored_dtype(name))


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return parameters, then buffers of `module` by name, each name of a tied one included."""
    named: dict[str, Any] = dict(module.named_parameters(remove_duplicate=False))
    named.update(module.named_buffers(remove_duplicate=False))
    return named


def canonical_names(module: nn.Module) -> Mapping[str, str]:
    """Return for each name of a parameter or buffer the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named_tensors(module).items()}
