"""Grouped-query attention that multiplies by each key and value head once, where it lies in the cache.

PyTorch's exporter writes heads that several queries share as a copy for each of them: an expansion of all keys, and
one of all values, of the cache at every token. The queries of one such head lie next to each other, so that
(B, H·G, T, D) is (B, H, G·T, D) without moving a number: one product with the head as it is stands for G products with
its copies. Source: GQA, arXiv 2305.13245.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from exporters.pattern import only_user, producer, remove_unused, replace_uses, shared_constant

__all__ = ["simplify_grouped_attention"]

_SWAP_LAST = [0, 1, 3, 2]


@dataclass(frozen=True)
class _Repeated:
    """A factor of a product that is made of repeated heads.

    Attributes:
        value: The repeated heads, (B, H·G, L, D).
        heads: Those that are repeated, (B, H, L, D).
        steps: The nodes that transpose and scale `value` on its way to the product, the last one first.
        user: The first of them, or the product, and which of its inputs `value` is.
    """

    value: ir.Value
    heads: ir.Value
    steps: tuple[ir.Node, ...]
    user: tuple[ir.Node, int]


def simplify_grouped_attention(graph: ir.Graph) -> None:
    """Multiply by the heads themselves wherever the second factor of a product is repeated heads."""
    for node in list(graph):
        if node.op_type == "MatMul" and not node.outputs[0].is_graph_output():
            repeated = _repeated_heads(node)
            if repeated is not None:
                _multiply_by_heads(graph, node, repeated)


def _repeated_heads(product: ir.Node) -> _Repeated | None:
    """What the product's second factor repeats; none if that is not certain."""
    steps: list[ir.Node] = []
    user, index = product, 1
    while True:
        value = user.inputs[index]
        step = None if value is None else value.producer()
        followed = None if step is None else _followed(step)
        if step is None or followed is None or only_user(step) is None:
            break
        steps.append(step)
        user, index = step, followed
    heads = _heads(value)
    if value is None or heads is None or _count(product.inputs[0]) != _count(value):
        return None
    return _Repeated(value, heads, tuple(steps), (user, index))


def _followed(node: ir.Node) -> int | None:
    """Which input keeps its heads in the node: that of a transpose of the last axes, that of a product by a number."""
    if node.op_type == "Transpose":
        return 0 if list(node.attributes["perm"].as_ints()) == _SWAP_LAST else None
    numbers = [_is_number(value) for value in node.inputs]
    return numbers.index(False) if node.op_type == "Mul" and sum(numbers) == 1 else None


def _is_number(value: ir.Value | None) -> bool:
    return value is not None and value.const_value is not None and len(value.const_value.shape) == 0


def _heads(value: ir.Value | None) -> ir.Value | None:
    """The heads (B, H, L, D) of which (B, H·G, L, D) has each G times in a row."""
    last = producer(value, "Reshape")
    expanded = producer(last.inputs[0], "Expand") if last is not None else None
    apart = producer(expanded.inputs[0], "Unsqueeze") if expanded is not None else None
    if value is None or expanded is None or apart is None:
        return None
    heads, wide = apart.inputs[0], expanded.outputs[0]
    if heads is None or heads.shape is None or wide.shape is None or value.shape is None:
        return None
    if len(heads.shape) != 4 or len(wide.shape) != 5:
        return None
    batch, count, length, width = heads.shape
    groups = wide.shape[2]
    if not isinstance(count, int) or not isinstance(groups, int):
        return None
    if any(isinstance(size, ir.SymbolicDim) and size.value is None for size in (batch, length, width)):
        return None  # sizes that are not known are not equal
    certain = (
        apart.outputs[0].shape == [batch, count, 1, length, width]
        and wide.shape == [batch, count, groups, length, width]
        and value.shape == [batch, count * groups, length, width]
    )
    return heads if certain else None


def _count(value: ir.Value | None) -> int | None:
    """How many heads a value of four axes has, if that is fixed."""
    if value is None or value.shape is None or len(value.shape) != 4:
        return None
    count = value.shape[1]
    return count if isinstance(count, int) else None


def _multiply_by_heads(graph: ir.Graph, product: ir.Node, repeated: _Repeated) -> None:
    """Let the product take the heads themselves, and all queries of a head as rows of one matrix."""
    queries, heads = _count(repeated.value), _count(repeated.heads)
    assert queries is not None
    assert heads is not None
    user, index = repeated.user
    user.replace_input_with(index, repeated.heads)
    remove_unused(graph, _maker(repeated.value))

    # A factor of the queries stays next to the product: ONNX Runtime makes one kernel of the two.
    scaling = producer(product.inputs[0], "Mul")
    factor = _followed(scaling) if scaling is not None and only_user(scaling) is product else None
    first, place = (product, 0) if scaling is None or factor is None else (scaling, factor)
    output, rows = product.outputs[0], first.inputs[place]
    assert rows is not None
    merged = _with_heads(graph, rows, heads, f"{output.name}_rows")
    first.replace_input_with(place, merged.outputs[0])
    graph.insert_before(first, merged)

    apart = _with_heads(graph, output, queries, f"{output.name}_heads")
    apart.outputs[0].shape = output.shape
    replace_uses(output, apart.outputs[0])
    apart.replace_input_with(0, output)
    graph.insert_after(product, apart)
    for changed in {*repeated.steps, first, product}:
        changed.outputs[0].shape = None


def _maker(value: ir.Value) -> ir.Node:
    node = value.producer()
    assert node is not None
    return node


def _with_heads(graph: ir.Graph, value: ir.Value, heads: int, name: str) -> ir.Node:
    """A reshape to that many heads, with as many rows as there are then for each."""
    shape = shared_constant(graph, f"heads_{heads}", np.array([0, heads, -1, 0]))  # 0 keeps a size
    output = ir.Value(name=name, type=value.type)
    return ir.Node("", "Reshape", [value, shape], outputs=[output], name=f"{name}_Reshape")
