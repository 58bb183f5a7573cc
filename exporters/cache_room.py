"""A cache with room for tokens to come: the operators of attention write new keys and values behind the past ones.

Where the caller gives the same memory as past and present, no step copies the cache. The length of such a past says
nothing of how many tokens are in it, so the graph must read that from the attention mask, which has a place for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from exporters.attention_function import CACHED_ATTENTION, ROTARY_ATTENTION
from exporters.packed_function import DOMAIN

if TYPE_CHECKING:  # which needs torch
    from exporters.trace import TracedModel

__all__ = ["has_cache_room", "read_past_from_mask"]


def read_past_from_mask(traced: TracedModel) -> None:
    """Replace the length of the past by that of the mask without the new tokens, where only attention uses the past."""
    if not _only_attention_uses_past(traced):
        return
    uses = [use.node for use in traced.past_length.uses()]
    if any(node.op_type != "Shape" or _range(node) != (2, 3) for node in uses):
        return
    for node in uses:
        total = _length_of(traced.tokens["attention_mask"])
        new = _length_of(traced.tokens["input_ids"])
        past = ir.Node("", "Sub", [total.outputs[0], new.outputs[0]])
        traced.graph.insert_before(node, [total, new, past])
        node.outputs[0].replace_all_uses_with(past.outputs[0])
        traced.graph.remove(node, safe=True)


def has_cache_room(traced: TracedModel) -> bool:
    """Whether the past may have room: nothing but attention, and none of its sizes, is used."""
    return _only_attention_uses_past(traced) and not traced.past_length.uses()


def _only_attention_uses_past(traced: TracedModel) -> bool:
    uses = [use for block in traced.blocks for past in (block.key, block.value) for use in past.uses()]
    own = {(DOMAIN, CACHED_ATTENTION), (DOMAIN, ROTARY_ATTENTION)}
    return bool(uses) and all((use.node.domain, use.node.op_type) in own for use in uses)


def _range(node: ir.Node) -> tuple[int, int]:
    start, end = (node.attributes.get(name) for name in ("start", "end"))
    return (0, -1) if start is None or end is None else (start.as_int(), end.as_int())


def _length_of(tokens: ir.Value) -> ir.Node:
    """The second axis of (B, tokens)."""
    return ir.Node("", "Shape", [tokens], [ir.AttrInt64("start", 1), ir.AttrInt64("end", 2)])
