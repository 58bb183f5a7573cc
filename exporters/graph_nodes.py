"""Nodes of a graph that is being changed."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
from onnx import NodeProto

__all__ = ["used_nodes"]


def used_nodes(nodes: Sequence[NodeProto], graph: onnx.GraphProto) -> list[NodeProto]:
    """The nodes without those of which nothing is used: what led to a replaced one."""
    wanted, kept = {value.name for value in graph.output}, []
    for node in reversed(nodes):
        if wanted.intersection(node.output):
            kept.append(node)
            wanted.update(node.input)
            wanted.update(_inner_inputs(node))
    return kept[::-1]


def _inner_inputs(node: NodeProto) -> set[str]:
    """What the graphs inside of a node read."""
    found: set[str] = set()
    for attribute in node.attribute:
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
            for inner in graph.node:
                found.update(inner.input, _inner_inputs(inner))
    return found
