"""Example inputs to trace a model with, and which of their axes are dynamic."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from exporters.parts import ModelParts, canonical_names, named_tensors
from exporters.template import Template

__all__ = ["ExampleSizes", "example_inputs", "example_tokens"]


@dataclass(frozen=True)
class ExampleSizes:
    """Sizes of an example, all different and none 0 or 1, which the exporter would take for constants."""

    batch: int = 2
    past: int = 7
    length: int = 5


def example_tokens(model: nn.Module, sizes: ExampleSizes) -> dict[str, Tensor]:
    """Return token inputs for `model`: ids (B, T), a left-padded mask (B, past + T), and positions (B, T)."""
    config: Any = model.config
    vocabulary = int(config.get_text_config().vocab_size)
    count = torch.arange(sizes.batch * sizes.length).view(sizes.batch, sizes.length)
    mask = torch.ones(sizes.batch, sizes.past + sizes.length, dtype=torch.long)
    # Padding in one row, since without any the library leaves the mask out.
    mask[0, : sizes.past // 2] = 0
    tokens = {"input_ids": (count * 7 + 3) % vocabulary, "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        # A copy, since the exporter fixes the strides of a slice.
        tokens["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, sizes.past :].clone()
    return tokens


@dataclass(frozen=True)
class _Input:
    """An example tensor and its dynamic axes."""

    tensor: Tensor
    axes: dict[int, Any]


def example_inputs(
    parts: ModelParts, templates: Sequence[Template], sizes: ExampleSizes
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the trace takes: tokens, past_length, blocks (one per template), head_hidden, weights.

    The second result has the same structure and holds the dynamic axes. Only the tokens hold values.
    """
    batch, length, past = (
        torch.export.Dim(name) for name in ("batch_size", "sequence_length", "past_sequence_length")
    )
    # The mask is as long as past and input together, which cannot be said in advance.
    token_axes = {"attention_mask": {0: batch, 1: torch.export.Dim.DYNAMIC}}
    example = templates[0].call.hidden

    def hidden() -> _Input:
        return _Input(torch.empty_like(example), {0: batch, 1: length})

    def past_states(heads: int, width: int, dtype: torch.dtype) -> _Input:
        return _Input(torch.empty(sizes.batch, heads, sizes.past, width, dtype=dtype), {0: batch, 2: past})

    def block(template: Template) -> dict[str, Any]:
        kv = template.key_value
        return {
            "hidden": hidden(),
            "key": past_states(kv.key_heads, kv.key_dim, kv.dtype),
            "value": past_states(kv.value_heads, kv.value_dim, kv.dtype),
            "weights": _weights(parts.blocks.modules[template.source]),
        }

    tree = {
        "tokens": {
            name: _Input(tensor, token_axes.get(name, {0: batch, 1: length}))
            for name, tensor in example_tokens(parts.model, sizes).items()
        },
        "past_length": past_states(1, 1, torch.float32),
        "blocks": [block(template) for template in templates],
        "head_hidden": hidden(),
        "weights": _weights(parts.model, outside=f"{parts.blocks.name}."),
    }
    return pytree.tree_map(lambda leaf: leaf.tensor, tree), pytree.tree_map(lambda leaf: leaf.axes, tree)


def _weights(module: nn.Module, outside: str | None = None) -> dict[str, _Input]:
    """Return memory for each tensor of `module`, tied ones once: reserved and never touched."""
    first = canonical_names(module)
    return {
        name: _Input(torch.empty(tensor.shape, dtype=tensor.dtype), {})
        for name, tensor in named_tensors(module).items()
        if first[name] == name and not (outside and name.startswith(outside))
    }
