"""Heads and neurons: what can be taken out of a block whole, found by trying, and the taking out.

A unit leaves through columns of an output matrix (of ``o_proj``, of ``down_proj``). Taking it out removes these
columns and the rows, in the matrices before, that feed nothing else. What is left must compute what the block
computes with the columns at zero: a block is tried for that, so no architecture is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compressor.linear_layers import bias_of, linears_of, set_parameters, shape_of, weight_of

__all__ = ["HEAD_COUNTS", "UnitGroup", "find_units", "remove_channels"]

# Attributes of an attention module that count its heads, as transformers calls them, and what they count.
HEAD_COUNTS: Mapping[str, Literal["query", "key_value", "ratio"]] = {
    "num_heads": "query",
    "num_attention_heads": "query",
    "num_key_value_heads": "key_value",
    "num_kv_heads": "key_value",
    "num_key_value_groups": "ratio",
}
_HEAD_WIDTHS = ("head_dim", "head_size")
# Both sides add the same numbers in another order, and zeros: some roundings of float32, 6e-8 each.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class UnitGroup:
    """Units of one block that are alike: the heads of its attention, or the neurons of its MLP.

    A channel is a column of the output matrix. A head has ``width`` channels, a neuron has one. Where keys and
    values are shared, a unit is one query head of each of the ``shared`` groups, so that as many are left in
    each; keys and values stay. Otherwise a head's keys and values go with it.

    Attributes:
        kind: ``heads`` or ``neurons``.
        path: The module around the matrices, such as ``self_attn``; "" for the block itself.
        output: Path of the layer that the units leave through.
        rows: Paths of the layers with a row for each channel; where there are k times as many rows, k stacked
            matrices have one each.
        channels: Columns of the output matrix.
        width: Channels of a head; 1 for neurons.
        shared: Groups of query heads with keys and values in common; 1 where each head has its own.
    """

    kind: Literal["heads", "neurons"]
    path: str
    output: str
    rows: tuple[str, ...]
    channels: int
    width: int = 1
    shared: int = 1

    @property
    def members(self) -> int:
        """Heads or neurons."""
        return self.channels // self.width

    @property
    def units(self) -> int:
        """How many can be taken out one after the other; the last one has to stay."""
        return self.members // self.shared

    @property
    def layers(self) -> tuple[str, ...]:
        """Paths of all layers that a removal changes."""
        return (*self.rows, self.output)

    def weights_per_unit(self, block: nn.Module) -> int:
        """Elements of weight matrices that go with one unit."""
        rows = [shape_of(block.get_submodule(path)) for path in self.rows]
        per_channel = sum(out // self.channels * inputs for out, inputs in rows)
        per_channel += shape_of(block.get_submodule(self.output))[0]
        return per_channel * self.width * self.shared

    def ranked(self, scores: Tensor) -> Tensor:
        """Members of each unit, (units, shared) int64, the unit with the lowest scores first.

        Args:
            scores: Of each member, (members,). Groups that share keys give up their lowest members together.
        """
        return scores.view(self.shared, self.units).argsort(dim=1, stable=True).T + (
            torch.arange(self.shared, device=scores.device) * self.units
        )

    def keeping(self, members: Tensor) -> Tensor:
        """Which channels stay where ``members`` (any shape, int64) go; (channels,) bool."""
        kept = torch.ones(self.members, dtype=torch.bool)
        kept[members.flatten().cpu()] = False
        return kept.repeat_interleave(self.width)


def find_units(load: Callable[[], nn.Module], run: Callable[[nn.Module], Tensor]) -> tuple[UnitGroup, ...]:
    """The groups of units that a block really lets go of, each tried on a copy.

    Args:
        load: Gives a copy of the block of its own.
        run: What a block makes of some hidden states, the same ones each time.
    """
    found = []
    for group in _candidates(load(), run):
        if group.units > 1 and _lets_go(group, load(), run):
            found.append(group)
    return tuple(found)


def remove_channels(block: nn.Module, group: UnitGroup, kept: Tensor, bias: Tensor | None = None) -> None:
    """Take the channels outside ``kept`` out of the block: smaller matrices, and as many heads as are left.

    Args:
        block: Changed in place; a second removal needs a group with the new number of channels.
        group: What the channels belong to.
        kept: (channels,) bool, whole units.
        bias: (out,) that the output layer adds from now on; ``None`` for nothing.
    """
    for path in group.rows:
        layer = block.get_submodule(path)
        rows = kept.repeat(shape_of(layer)[0] // group.channels).to(weight_of(layer).device)
        own = bias_of(layer)
        set_parameters(layer, weight_of(layer)[rows], None if own is None else own[rows])
    layer = block.get_submodule(group.output)
    columns = kept.to(weight_of(layer).device)
    total = bias_of(layer)
    if bias is not None:
        bias = bias.to(weight_of(layer))
        total = bias if total is None else total + bias
    set_parameters(layer, weight_of(layer)[:, columns], total)
    if group.kind == "heads":
        _count_heads(block.get_submodule(group.path), group, int(kept.sum()) // group.width)


def _count_heads(attention: nn.Module, group: UnitGroup, left: int) -> None:
    """Tell the attention module how many heads are left; an attribute that counted something else stays."""
    own_keys = len(group.rows) > 1
    before = {"query": group.members, "key_value": group.members if own_keys else group.shared}
    after = {"query": left, "key_value": left if own_keys else group.shared}
    for counts in (before, after):
        counts["ratio"] = counts["query"] // counts["key_value"]
    for name, counted in HEAD_COUNTS.items():
        if vars(attention).get(name) == before[counted]:
            setattr(attention, name, after[counted])


def _candidates(block: nn.Module, run: Callable[[nn.Module], Tensor]) -> Iterator[UnitGroup]:
    """What looks like heads or neurons: layers of one module, of which the last to run takes in all channels."""
    by_parent: dict[str, list[str]] = {}
    for path in _in_order_of_use(block, run):
        by_parent.setdefault(path.rpartition(".")[0], []).append(path)
    for parent, (*inputs, output) in by_parent.items():
        channels = shape_of(block.get_submodule(output))[1]
        sizes = [shape_of(block.get_submodule(path))[0] for path in inputs]
        if len(inputs) == 3:
            yield from _heads(block, parent, inputs, sizes, output, channels)
        elif 1 <= len(inputs) <= 2 and all(size in (channels, 2 * channels) for size in sizes):
            yield UnitGroup("neurons", parent, output, tuple(inputs), channels)


def _heads(
    block: nn.Module, parent: str, inputs: Sequence[str], sizes: Sequence[int], output: str, channels: int
) -> Iterator[UnitGroup]:
    """Query, key and value: the query has a row for each channel, key and value the same or fewer."""
    attention = vars(block.get_submodule(parent))
    width = next((attention[name] for name in _HEAD_WIDTHS if isinstance(attention.get(name), int)), 0)
    if not width or any(size % width for size in (channels, *sizes)):
        return
    if all(size == channels for size in sizes):
        yield UnitGroup("heads", parent, output, tuple(inputs), channels, width)
        return
    queries = [path for path, size in zip(inputs, sizes, strict=True) if size == channels]
    keys = {size for size in sizes if size != channels}
    if len(queries) == 1 and len(keys) == 1 and not channels % (shared := keys.pop()):
        yield UnitGroup("heads", parent, output, (queries[0],), channels, width, shared // width)


def _in_order_of_use(block: nn.Module, run: Callable[[nn.Module], Tensor]) -> list[str]:
    """Paths of the linear layers in the order in which the block runs them."""
    used: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda *_, path=path: used.append(path))
        for path, layer in linears_of(block)
    ]
    try:
        run(block)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(used))


def _lets_go(group: UnitGroup, block: nn.Module, run: Callable[[nn.Module], Tensor]) -> bool:
    """Whether the block without some units computes what it computes with their columns at zero."""
    draw = torch.rand(group.members, generator=torch.Generator().manual_seed(0))
    kept = group.keeping(group.ranked(draw)[: (group.units + 1) // 2])
    output = weight_of(block.get_submodule(group.output))
    output[:, ~kept.to(output.device)] = 0.0
    expected = run(block)
    remove_channels(block, group, kept)
    try:
        left = run(block)
    except Exception:  # whatever the block's code raises for sizes that it does not expect
        return False
    scale = float(expected.abs().max())
    return left.shape == expected.shape and bool((left - expected).abs().max() <= _TOLERANCE * scale)
