"""Attention's keys, transposed by one node that ONNX Runtime fuses with the product behind it.

PyTorch's exporter writes the transposed keys of ``scaled_dot_product_attention`` as a reshape to three axes, a
transpose and a reshape back, whose sizes are computed in the graph. ONNX Runtime then copies all keys of the cache,
transposed, at every token; a single ``Transpose`` of the last two axes becomes a flag of its matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporters.pattern import constant, only_user, producer, remove_unused, replace_uses

__all__ = ["simplify_key_transposes"]

_SWAP_IN_THREE, _SWAP_IN_FOUR = [0, 2, 1], [0, 1, 3, 2]
_LOWEST, _HIGHEST = -(2**63), 2**63 - 1  # how a slice says that it has no beginning or no end


def simplify_key_transposes(graph: ir.Graph) -> None:
    """Replace reshape, transpose, reshape by one transpose where together they swap the last two of four axes."""
    for node in list(graph):
        if node.op_type != "Transpose" or list(node.attributes["perm"].as_ints()) != _SWAP_IN_THREE:
            continue
        last = only_user(node)
        if last is not None:
            keys = _swapped_value(node, last)
            if keys is not None:
                _swap(graph, keys, last)


def _swapped_value(transpose: ir.Node, last: ir.Node) -> ir.Value | None:
    """The value whose last two axes the transpose, and the reshapes around it, swap; none if that is not certain."""
    first = producer(transpose.inputs[0], "Reshape")
    if first is None or last.op_type != "Reshape":
        return None
    keys = first.inputs[0]
    if keys is None or keys.shape is None or len(keys.shape) != 4:
        return None
    flat, back = producer(first.inputs[1], "Concat"), producer(last.inputs[1], "Concat")
    if flat is None or back is None or len(flat.inputs) != 3 or len(back.inputs) != 3:
        return None
    rows, columns = (-2, -1), (-1, _HIGHEST)
    if constant(flat.inputs[0]) != [-1] or not _are_sizes(keys, flat.inputs[1:], (rows, columns)):
        return None
    return keys if _are_sizes(keys, back.inputs, ((_LOWEST, -2), columns, rows)) else None


def _are_sizes(value: ir.Value, sizes: Sequence[ir.Value | None], slices: Sequence[tuple[int, int]]) -> bool:
    """Whether each of ``sizes`` is that slice of the value's shape."""
    for size, (start, end) in zip(sizes, slices, strict=True):
        node = producer(size, "Slice")
        shape = None if node is None else producer(node.inputs[0], "Shape")
        if node is None or shape is None or shape.inputs[0] is not value or not _is_whole(shape):
            return False
        if [constant(bound) for bound in node.inputs[1:]] not in ([[start], [end]], [[start], [end], [0]]):
            return False
    return True


def _is_whole(shape: ir.Node) -> bool:
    """Whether a ``Shape`` node gives all sizes."""
    start = shape.attributes.get("start")
    return "end" not in shape.attributes and (start is None or start.as_int() == 0)


def _swap(graph: ir.Graph, keys: ir.Value, last: ir.Node) -> None:
    """Put a transpose of ``keys`` in the place of ``last``, and take out what nothing uses any more."""
    old = last.outputs[0]
    assert keys.shape is not None
    shape = ir.Shape([keys.shape[axis] for axis in _SWAP_IN_FOUR])
    output = ir.Value(name=f"{old.name}_swapped", type=keys.type, shape=shape)
    perm = ir.AttrInt64s("perm", _SWAP_IN_FOUR)
    graph.insert_before(
        last, ir.Node("", "Transpose", [keys], [perm], outputs=[output], name=f"{output.name}_Transpose")
    )
    replace_uses(old, output)
    remove_unused(graph, last)
