"""The same widths in every layer, such as a config of transformers can state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from compressor.errors import UsageError
from compressor.models.loading import plain_outline
from compressor.models.source import BlockSource
from compressor.models.structure import difference
from compressor.units import UnitGroup, remove_channels

__all__ = ["uniform_counts"]

# What configs of transformers call the width of the MLP.
_NEURON_KEYS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
# What a head computes with besides its weights.
_HEAD_SCALARS = ("head_dim", "head_size", "scaling")


def uniform_counts(
    source: BlockSource, groups: Sequence[Sequence[UnitGroup]], per_unit: Sequence[int], budget: int
) -> tuple[dict[str, int], dict[str, int]]:
    """How many units each kind of group gives up, as many in all layers, and the config values that say so.

    Heads give up their share as far as the config can state what is left (a Llama config wants a hidden size that
    the number of heads divides); neurons give up the rest.

    Args:
        source: The dense blocks.
        groups: Of each block.
        per_unit: Weights that go with one unit of each group of the first block.
        budget: Weights to remove.

    Raises:
        UsageError: E-FLAP-UNIFORM: the layers differ, or the config has no key for their widths.
    """
    layers, own = len(groups), groups[0]
    if any(tuple(other) != tuple(own) for other in groups):
        raise UsageError(
            "E-FLAP-UNIFORM",
            "the layers do not have the same heads and neurons to take out, so they cannot stay alike",
            "leave --uniform out, or --ignore the same matrices in every layer",
        )
    weights = {group.kind: each for group, each in zip(own, per_unit, strict=True)}
    units = {group.kind: group.units for group in own}
    share = budget / (layers * sum(units[kind] * each for kind, each in weights.items()))
    most_heads = min(int(share * units["heads"]), units["heads"] - 1) if "heads" in units else 0
    for heads in range(most_heads, -1, -1):
        counts = {"heads": heads, "neurons": 0}
        if "neurons" in units:
            rest = budget // layers - (heads * weights["heads"] if heads else 0)
            counts["neurons"] = min(rest // weights["neurons"], units["neurons"] - 1)
        widths = _stated_widths(source, own, counts)
        if widths is not None:
            return counts, widths
    raise UsageError(
        "E-FLAP-UNIFORM",
        f"a config of {source.architecture.label} has no key for the width of its MLP",
        "leave --uniform out; the model then loads with blockpress alone",
    )


def _stated_widths(
    source: BlockSource, groups: Sequence[UnitGroup], counts: Mapping[str, int]
) -> dict[str, int] | None:
    """Config values that make transformers build the block that is left; ``None`` where there are none."""
    block = source.load_block(0)
    config = source.checkpoint.config
    widths: dict[str, int] = {}
    for group in groups:
        gone = counts[group.kind]
        left = group.units - gone
        if group.kind == "neurons":
            widths.update((key, left) for key in _NEURON_KEYS if hasattr(config, key))
        elif gone:
            widths.update(num_attention_heads=left * group.shared, head_dim=group.width)
            if len(group.rows) > 1 and hasattr(config, "num_key_value_heads"):
                widths["num_key_value_heads"] = left
        members = group.ranked(torch.zeros(group.members))
        remove_channels(block, group, group.keeping(members[:gone]))
    try:
        stated = plain_outline(source.checkpoint, widths).get_submodule(source.blocks_name)[0]
    except Exception:  # each config and model class raises its own kind for what it does not allow
        return None
    return widths if difference(block, stated).is_plain and _same_heads(block, stated) else None


def _same_heads(block: nn.Module, stated: nn.Module) -> bool:
    """Whether heads have the same width and scale in both."""
    return all(
        vars(module)[name] == vars(stated.get_submodule(path)).get(name)
        for path, module in block.named_modules()
        for name in _HEAD_SCALARS
        if name in vars(module)
    )
