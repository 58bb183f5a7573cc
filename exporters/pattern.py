"""Nodes that mean one thing together: found by what makes and uses their values, removed with what only they used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = [
    "columns",
    "constant",
    "only_user",
    "permutes",
    "producer",
    "remove_unused",
    "replace_uses",
    "shared_constant",
    "sizes_of",
]


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes the value, if it is of that type."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type else None


def only_user(node: ir.Node) -> ir.Node | None:
    """The one node that uses the node's first output, once; none if there are more, or it leaves the graph."""
    users = list(node.outputs[0].uses())
    return users[0].node if len(users) == 1 and not node.outputs[0].is_graph_output() else None


def constant(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant; none for a value that is computed or given."""
    if value is None or value.const_value is None:
        return None
    return [int(number) for number in value.const_value.numpy().reshape(-1)]


def columns(node: ir.Node, rank: int, width: int) -> range | None:
    """Which columns of the last axis a Slice takes; none if that is not certain, or it takes less of another axis."""
    bounds = [constant(bound) for bound in node.inputs[1:]]
    if len(bounds) == 3:
        bounds.append([1])
    if len(bounds) != 4 or any(bound is None or len(bound) != 1 for bound in bounds):
        return None
    (start,), (end,), (axis,), (step,) = (bound for bound in bounds if bound is not None)
    return range(width)[start:end] if axis in (-1, rank - 1) and step == 1 else None


def sizes_of(value: ir.Value | None) -> list[int | str | None]:
    """The sizes of the value's axes, each a number, a name, or none where it is not known; empty without a shape."""
    if value is None or value.shape is None:
        return []
    return [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]


def permutes(node: ir.Node | None, order: Sequence[int]) -> bool:
    """Whether the node puts the axes into that order."""
    if node is None or node.op_type != "Transpose":
        return False
    return list(node.attributes["perm"].as_ints()) == list(order)


def remove_unused(graph: ir.Graph, node: ir.Node) -> None:
    """Remove the node, and what then has no use either, if nothing uses it."""
    if any(value.uses() or value.is_graph_output() for value in node.outputs):
        return
    inputs = dict.fromkeys(value for value in node.inputs if value is not None)
    graph.remove(node, safe=True)
    for value in inputs:
        maker = value.producer()
        if maker is not None and maker.graph is graph:
            remove_unused(graph, maker)
        elif value.name is not None and value.name in graph.initializers and not value.uses():
            del graph.initializers[value.name]


def replace_uses(old: ir.Value, new: ir.Value) -> None:
    """Let every node that uses the old value use the new one."""
    for use in list(old.uses()):
        use.node.replace_input_with(use.idx, new)


def shared_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """The graph's constant of that name, made of ``array`` if it has none yet."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(array, name=name)))
    return graph.initializers[name]
