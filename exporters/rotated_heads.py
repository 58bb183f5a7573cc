"""Heads that a rotary embedding has rotated, wholly or in their first columns: what they were before.

Source: RoFormer, arXiv 2104.09864, section 3.4.2; in halves, as GPT-NeoX has it, and ``rotary`` writes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from exporters.pattern import columns, producer, sizes_of

__all__ = ["RotatedHeads", "rotated_heads"]


@dataclass(frozen=True)
class RotatedHeads:
    """Heads (B, H, S, D) of which the first columns are rotated by the two tables (B or 1, 1, S, R)."""

    heads: ir.Value
    cos: ir.Value
    sin: ir.Value


def rotated_heads(value: ir.Value) -> RotatedHeads | None:
    """What the value is with its first columns rotated, in halves; none if that is not certain."""
    joined = producer(value, "Concat")
    if joined is None or joined.attributes["axis"].as_int() not in (-1, 3) or len(joined.inputs) != 2:
        return _wholly_rotated(value)
    inner = None if joined.inputs[0] is None else _wholly_rotated(joined.inputs[0])
    first = None if inner is None else producer(inner.heads, "Slice")
    second = producer(joined.inputs[1], "Slice")
    if inner is None or first is None or second is None or first.inputs[0] is not second.inputs[0]:
        return None
    whole, width, part = first.inputs[0], _width(first.inputs[0]), _width(inner.heads)
    if whole is None or width is None or part is None or not _have_equal_sizes(whole, value):
        return None
    found = [columns(node, 4, width) for node in (first, second)]
    return RotatedHeads(whole, inner.cos, inner.sin) if found == [range(part), range(part, width)] else None


def _wholly_rotated(value: ir.Value) -> RotatedHeads | None:
    """What the value is with all columns rotated: x cos + swapped_halves(x) sin, as ``rotary`` writes it."""
    added = producer(value, "Add")
    products = [producer(term, "Mul") for term in added.inputs] if added is not None else []
    for plain, turned in (products, products[::-1]) if len(products) == 2 else ():
        if plain is None or turned is None:
            continue
        for number in (0, 1):
            heads, sin = _swapped_halves(turned.inputs[number]), turned.inputs[1 - number]
            if heads is None or sin is None or heads not in plain.inputs:
                continue
            cos = plain.inputs[1 - plain.inputs.index(heads)]
            if cos is not None and _have_equal_sizes(heads, value):
                return RotatedHeads(heads, cos, sin)
    return None


def _swapped_halves(value: ir.Value | None) -> ir.Value | None:
    """The value whose halves of the last of four axes change places."""
    joined = producer(value, "Concat")
    if joined is None or joined.attributes["axis"].as_int() not in (-1, 3) or len(joined.inputs) != 2:
        return None
    split = producer(joined.inputs[0], "Split")
    if split is None or len(split.inputs) != 1 or len(split.outputs) != 2:
        return None
    axis = split.attributes.get("axis")
    if axis is None or axis.as_int() not in (-1, 3) or list(joined.inputs) != list(split.outputs[::-1]):
        return None
    width, halves = _width(split.inputs[0]), [_width(half) for half in split.outputs]
    return split.inputs[0] if width is not None and halves == [width / 2] * 2 else None


def _width(value: ir.Value | None) -> int | None:
    """The size of the last axis, if it is fixed."""
    size = sizes_of(value)[-1] if sizes_of(value) else None
    return size if isinstance(size, int) else None


def _have_equal_sizes(one: ir.Value, other: ir.Value) -> bool:
    """Whether both have the same four sizes, all of them known."""
    sizes = sizes_of(one)
    return len(sizes) == 4 and None not in sizes and sizes == sizes_of(other)
