"""What a graph makes of a matrix: products, look-ups, and the choice of experts with the product behind it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx
from onnx import helper, numpy_helper

from exporters.graph_weights import GraphWeight
from exporters.packed_nodes import ExpertProduct, Lookup, Product
from exporters.packing import STRIP_ROWS

__all__ = ["MatrixUses", "UseFinder"]


@dataclass
class MatrixUses:
    """What a graph makes of a weight, the nodes between, and whether a Transpose is among them."""

    products: list[Product] = field(default_factory=list)
    experts: list[ExpertProduct] = field(default_factory=list)
    lookups: list[Lookup] = field(default_factory=list)
    between: list[onnx.NodeProto] = field(default_factory=list)
    transposed: bool = False

    def may_be_packed(self, shape: tuple[int, ...]) -> bool:
        """Whether a packed weight of the shape can take the weight's place in all of them."""
        if self.lookups or self.transposed:
            return False
        if not self.experts:
            return len(shape) == 2
        # Each expert begins with a strip of its own.
        return len(shape) == 3 and not self.products and shape[1] % STRIP_ROWS == 0


class UseFinder:
    """Looks for the uses of weights in a graph that stays as it is meanwhile."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._consumers: dict[str, list[tuple[onnx.NodeProto, int]]] = defaultdict(list)
        self._producers = {output: node for node in graph.node for output in node.output}
        for node in graph.node:
            for position, value in enumerate(node.input):
                self._consumers[value].append((node, position))
        self._constants = {constant.name: constant for constant in graph.initializer}
        self._outputs = {value.name for value in graph.output}

    def is_computed(self, value: str | None) -> bool:
        """Whether a node of the graph makes the value."""
        return value in self._producers

    def of(self, weight: GraphWeight) -> MatrixUses:
        """What is made of the weight; nothing where it is used otherwise as well."""
        uses = MatrixUses()
        pending = [(weight.name, False)]
        while pending:
            value, swapped = pending.pop()
            for node, position in self._consumers[value]:
                if node.op_type == "Cast" and position == 0:
                    uses.between.append(node)
                    pending.append((node.output[0], swapped))
                elif node.op_type == "Transpose" and _attribute(node, "perm") == [1, 0] and not swapped:
                    uses.between.append(node)
                    uses.transposed = True
                    pending.append((node.output[0], True))
                elif (product := _product(node, position, swapped)) is not None:
                    uses.products.append(product)
                elif position == 0 and (of_experts := self._expert_product(node)) is not None:
                    uses.experts.append(of_experts)
                elif (
                    node.op_type == "Gather"
                    and position == 0
                    and not swapped
                    and not _attribute(node, "axis")
                ):
                    uses.lookups.append(Lookup(node, node.input[1], node.output[0], _name(node)))
                else:
                    return MatrixUses()
        return uses

    def _expert_product(self, gather: onnx.NodeProto) -> ExpertProduct | None:
        """The product of each row with the matrix that ``gather`` takes for it out of those of all experts.

        As the exporter writes it: the matrices (T, N, K) times x (T, K, 1), whose last axis is taken away again.
        """
        experts = self._chosen_experts(gather)
        product = self._only_user(gather, "MatMul")
        if experts is None or product is None or product.input[0] != gather.output[0]:
            return None
        column, squeeze = self._producers.get(product.input[1]), self._only_user(product, "Squeeze")
        if column is None or column.op_type != "Unsqueeze" or squeeze is None:
            return None
        if not self._is_last_of_three(column) or not self._is_last_of_three(squeeze):
            return None
        nodes = (gather, product, squeeze)
        return ExpertProduct(nodes, column.input[0], experts, squeeze.output[0], _name(product))

    def _chosen_experts(self, gather: onnx.NodeProto) -> str | None:
        """The numbers (T,) of the matrices that the node takes."""
        if gather.op_type == "Gather" and not _attribute(gather, "axis"):
            return str(gather.input[1])
        if gather.op_type != "GatherND" or _attribute(gather, "batch_dims"):
            return None
        column = self._producers.get(gather.input[1])
        if column is None or column.op_type != "Unsqueeze" or self._axes(column) not in ([-1], [1]):
            return None
        return str(column.input[0])

    def _only_user(self, node: onnx.NodeProto, op_type: str) -> onnx.NodeProto | None:
        """The only node that uses the node's output, if it is one of this type."""
        users = self._consumers[node.output[0]]
        alone = len(users) == 1 and node.output[0] not in self._outputs
        return users[0][0] if alone and users[0][0].op_type == op_type else None

    def _is_last_of_three(self, node: onnx.NodeProto) -> bool:
        return self._axes(node) in ([-1], [2])

    def _axes(self, node: onnx.NodeProto) -> list[int] | None:
        """The axes, a constant of the graph, of a Squeeze or an Unsqueeze."""
        constant = self._constants.get(node.input[1]) if len(node.input) > 1 else None
        return (
            None if constant is None else [int(axis) for axis in numpy_helper.to_array(constant).reshape(-1)]
        )


def _product(node: onnx.NodeProto, position: int, swapped: bool) -> Product | None:
    """The product that a node makes with what enters at ``position``, if it is a plain one."""
    if node.op_type == "MatMul" and position == 1:
        return Product(node, node.input[0], node.output[0], None, swapped, _name(node))
    if node.op_type != "Gemm" or position != 1 or swapped:
        return None
    plain = all(_attribute(node, name) in (None, 1.0) for name in ("alpha", "beta"))
    if not plain or _attribute(node, "transA"):
        return None
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    return Product(node, node.input[0], node.output[0], bias, bool(_attribute(node, "transB")), _name(node))


def _attribute(node: onnx.NodeProto, name: str) -> object:
    """The value of an attribute; None where it is not given."""
    found: Iterator[object] = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    value = next(found, None)
    return list(value) if isinstance(value, (list, tuple)) else value


def _name(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])
