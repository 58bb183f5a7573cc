"""Along which axis the inputs of a weight run: read from the node that uses it.

A parameter is (out, in) in PyTorch and often (in, out) in the graph; N:M groups lie along the inputs, so
whoever checks them must know.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import onnx

from exporters.int8_function import is_int8_product

_PASS_THROUGH = {"Cast", "Identity", "DequantizeLinear"}  # the same matrix in another type

Consumers = Mapping[str, list[tuple[onnx.NodeProto, int]]]


def input_axes(graph: onnx.GraphProto, ranks: Mapping[str, int]) -> dict[str, int]:
    """The axis of the inputs (-1 or -2) of each weight in ``ranks`` (name: number of axes) that products use.

    A weight used in two products that disagree, or in none, is absent. ``Cast``, ``Transpose`` of the last
    two axes, and the choice of experts (``Gather`` or ``GatherND`` on the first of three axes) are looked through.
    """
    consumers = defaultdict(list)
    for node in graph.node:
        for position, value in enumerate(node.input):
            consumers[value].append((node, position))
    found = {name: _axes_of(name, rank, consumers) for name, rank in ranks.items() if rank >= 2}
    return {name: next(iter(axes)) for name, axes in found.items() if len(axes) == 1}


def _axes_of(weight: str, rank: int, consumers: Consumers) -> set[int]:
    """Input axes of all products that use ``weight``, in the order in which it is stored."""
    axes: set[int] = set()
    found, pending = {(weight, False)}, [(weight, False)]  # values that are the weight, and whether swapped
    while pending:
        value, swapped = pending.pop()
        for node, position in consumers.get(value, []):
            axis = _product_axis(node, position)
            if axis is not None:
                axes.add(-3 - axis if swapped else axis)
                continue
            transposes = _swaps_last_two(node, rank)
            if position == 0 and node.output and (transposes or _keeps_layout(node, rank)):
                derived = (node.output[0], swapped != transposes)
                if derived not in found:  # a broken graph may have cycles
                    found.add(derived)
                    pending.append(derived)
    return axes


def _product_axis(node: onnx.NodeProto, position: int) -> int | None:
    """The axis that a matrix product sums over in its input at ``position``; None for other nodes."""
    if is_int8_product(node):
        return -1 if position == 1 else None
    if node.op_type in {"MatMul", "MatMulInteger"}:
        return -2 if position == 1 else -1
    if node.op_type == "Gemm" and position < 2:
        swapped = _integer(node, "transB" if position == 1 else "transA", 0) != 0
        return -1 if swapped == (position == 1) else -2
    return None


def _keeps_layout(node: onnx.NodeProto, rank: int) -> bool:
    """Whether the last two axes of the node's first input are those of its output."""
    if node.op_type in {"Gather", "GatherND"}:  # GatherND as torch traces it: one index, an expert's number
        return rank >= 3 and _integer(node, "axis", 0) == 0 == _integer(node, "batch_dims", 0)
    return node.op_type in _PASS_THROUGH


def _swaps_last_two(node: onnx.NodeProto, rank: int) -> bool:
    """Whether the node is a Transpose that swaps the last two axes and leaves the others."""
    if node.op_type != "Transpose":
        return False
    order = next(
        (list(found.ints) for found in node.attribute if found.name == "perm"), [*reversed(range(rank))]
    )
    return order == [*range(rank - 2), rank - 1, rank - 2]


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """The value of an integer attribute, or its default."""
    return next((int(found.i) for found in node.attribute if found.name == name), default)
