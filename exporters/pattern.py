"""Nodes that mean one thing together: found by what makes and uses their values, removed with what only they used."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

__all__ = ["constant", "only_user", "producer", "remove_unused", "replace_uses", "shared_constant"]


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
