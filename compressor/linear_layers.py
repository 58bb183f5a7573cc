"""Linear layers of either kind, read and changed in one orientation: weights (out, in).

``nn.Linear`` keeps its weight (out, in), GPT-2's ``Conv1D`` (in, out); subclasses that compute the same in
another way keep working, since the module stays and its parameters change.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

__all__ = ["bias_of", "is_linear", "linears_of", "resize", "set_parameters", "shape_of", "weight_of"]


def is_linear(module: nn.Module) -> bool:
    """Whether the module multiplies by one matrix: ``nn.Linear`` or ``Conv1D``."""
    return isinstance(module, nn.Linear) or _is_conv1d(module)


def linears_of(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every linear layer of a block, in the order of its modules."""
    return ((path, module) for path, module in block.named_modules() if is_linear(module))


def weight_of(linear: nn.Module) -> Tensor:
    """W (out, in): a view into the layer's parameter, outside autograd."""
    weight = linear.get_parameter("weight").detach()
    return weight.T if _is_conv1d(linear) else weight


def bias_of(linear: nn.Module) -> Tensor | None:
    """Its bias (out,) outside autograd, if it has one."""
    bias = dict(linear.named_parameters(recurse=False)).get("bias")
    return None if bias is None else bias.detach()


def shape_of(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of its weight."""
    out_features, in_features = weight_of(linear).shape
    return out_features, in_features


def set_parameters(linear: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Give the layer another weight (out, in), of any shape, and another bias (out,), or none."""
    transposed = _is_conv1d(linear)
    stored = (weight.T if transposed else weight).contiguous()
    linear.register_parameter("weight", nn.Parameter(stored, requires_grad=False))
    own = None if bias is None else nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    linear.register_parameter("bias", own)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    for name, size in zip(names, weight.shape, strict=True):
        setattr(linear, name, size)


def resize(linear: nn.Module, shape: tuple[int, int], *, bias: bool) -> None:
    """Give the layer a weight of ``shape`` (out, in), and a bias or none; their values are not set."""
    like = weight_of(linear)
    weight = torch.empty(shape, dtype=like.dtype, device=like.device)
    set_parameters(linear, weight, weight.new_empty(shape[0]) if bias else None)


def _is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, Conv1D)
