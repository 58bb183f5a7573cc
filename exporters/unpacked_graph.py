"""The inverse of ``packed_graph``: packed and integer weights as plain float32 matrices in plain products.

Attention that is one operator of ours becomes standard operators again: those of an export that has none of ours.

What another tool quantised is left as it is: only the shapes that ``packed_nodes`` makes are known here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper

from exporters.attention_function import CACHE_ROOM, called_nodes, is_attention
from exporters.graph_nodes import used_nodes
from exporters.int8_function import is_int8_product
from exporters.packed_function import DOMAIN, is_expert_product, is_packed_product, weight_inputs
from exporters.packed_nodes import MASK, SCALES
from exporters.packing import packed_error
from exporters.stored import StoredTensor

_LAST_AXIS = "dense/last_axis"
_LOOKING_UP = ("Cast", "Mul")  # from rows of integers to the result


@dataclass(frozen=True)
class DenseWeight:
    """A weight of a dense graph, made from what is stored when it is asked for."""

    name: str
    shape: tuple[int, ...]
    dtype: int
    load: Callable[[], NDArray[np.generic]]
    transposed: bool = False


def unpack_graph(proto: onnx.ModelProto, stored: Mapping[str, StoredTensor]) -> dict[str, DenseWeight]:
    """Make plain products of all packed and integer ones, and return the weights that they need, by name.

    Attention becomes standard operators.

    Args:
        proto: The graph; changed. The old initializers are no longer used in it.
        stored: The initializers of the file.

    Raises:
        ExportError: E-ONNX-*: the file does not hold a bias, or experts have one. Loading a weight may raise the same.
    """
    work = _Unpacking(proto.graph, stored)
    functions = {function.name: function for function in proto.functions if function.domain == DOMAIN}
    for node in proto.graph.node:
        if is_attention(node):
            work.unpack_attention(node, functions)
        elif is_expert_product(node):
            work.unpack_experts(node)
        elif is_packed_product(node):
            work.unpack(node)
        elif is_int8_product(node):
            work.unpack_int8(node)
        elif node.op_type == "Gather":
            work.widen_lookup(node)
    nodes = [new for node in proto.graph.node for new in work.replaced.get(id(node), [node])]
    _keep_used(proto.graph, nodes)
    for entry in [entry for entry in proto.metadata_props if entry.key == CACHE_ROOM]:
        proto.metadata_props.remove(entry)  # only our own attention knows room
        _read_past_from_cache(proto.graph)
    for entries in (proto.functions, proto.opset_import):
        for entry in [entry for entry in entries if entry.domain == DOMAIN]:
            entries.remove(entry)
    return work.weights


class _Unpacking:
    """The nodes that take another's place, and the weights that they use."""

    def __init__(self, graph: onnx.GraphProto, stored: Mapping[str, StoredTensor]) -> None:
        self._graph, self._stored = graph, stored
        self._producers = {output: node for node in graph.node for output in node.output}
        self._consumers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self._consumers[name].append(node)
        self.replaced: dict[int, list[NodeProto]] = {}  # by id of the node whose place they take
        self.weights: dict[str, DenseWeight] = {}

    def unpack(self, node: NodeProto) -> None:
        """Replace an operator of packed weights by a product with each."""
        nodes = self.replaced[id(node)] = []
        for number, (inputs, output) in enumerate(zip(weight_inputs(node), node.output, strict=True)):
            mask, *_, bias = inputs
            weight, name = mask.removesuffix(MASK), f"{node.name}/{number}" if number else node.name
            tensor = self._stored[weight]
            self._add(weight, tensor.shape[::-1], partial(_transposed, tensor))
            nodes += self._product(node.input[0], weight, bias, output, name)

    def unpack_int8(self, node: NodeProto) -> None:
        """Replace the operator of a dense int8 matrix by a product with the matrix in float32."""
        weight = self._scaled(node, 1)
        if weight is None or len(node.input) != 4:
            raise packed_error(node.name, f"{node.op_type} without an int8 matrix and its scales")
        nodes, name = [], f"{weight.name}.float32"
        if any(user.op_type == "Gather" for user in self._consumers[weight.name]):
            # A head that shares its matrix with the embeddings: one table, as in a model that was never quantised.
            nodes.append(helper.make_node("Transpose", [self._table(weight)], [name], perm=[1, 0]))
        else:
            load = partial(_scaled_rows, weight, self._scales(weight), transposed=True)
            self._add(name, weight.shape[::-1], load)
        nodes += self._product(node.input[0], name, node.input[3], node.output[0], node.name)
        self.replaced[id(node)] = nodes

    def _product(self, x: str, weight: str, bias: str, output: str, name: str) -> list[NodeProto]:
        """x times the weight, and the bias, if it is not always zero."""
        if bias in self._stored and not self._stored[bias].load().any():
            return [_node("MatMul", [x, weight], output, name)]
        product = f"{output}.unbiased"
        return [
            _node("MatMul", [x, weight], product, name),
            _node("Add", [product, bias], output, f"{name}/bias"),
        ]

    def unpack_attention(self, node: NodeProto, functions: Mapping[str, onnx.FunctionProto]) -> None:
        """Replace attention by the nodes of its function."""
        if node.op_type not in functions:
            raise packed_error(node.name, f"{node.op_type} without its function")
        nodes = self.replaced[id(node)] = called_nodes(node, functions[node.op_type])
        following = self._down(node, ["Reshape"])
        shape = None if following is None else self._stored.get(following.input[1])
        if following is not None and shape is not None and shape.load().all():
            # A reshape to rows needs none before it.
            following.input[0] = nodes[-1].input[0]
        self._transpose_once(node, nodes)

    def _transpose_once(self, node: NodeProto, nodes: list[NodeProto]) -> None:
        """Transpose what queries, keys and values are split from, once, as it stands in a standard export."""
        split = self._producers.get(node.input[0])
        if split is None or split.op_type != "Split" or sorted(split.output) != sorted(node.input[:3]):
            return
        if [a.i for a in split.attribute if a.name == "axis"] not in ([3], [-1]) or len(split.input) != 1:
            return
        by_head = {inner.input[0]: inner for inner in nodes if inner.op_type == "Transpose"}
        if not by_head.keys() >= set(split.output) or any(len(self._consumers[x]) > 1 for x in split.output):
            return
        transposes = [by_head[x] for x in split.output]
        name = f"{node.name}/by_head"
        first = NodeProto.FromString(transposes[0].SerializeToString())
        first.input[0], first.output[0] = split.input[0], name
        second = NodeProto.FromString(split.SerializeToString())
        second.input[0] = name
        second.output[:] = [inner.output[0] for inner in transposes]
        self.replaced[id(split)] = [first, second]
        self.replaced[id(node)] = [inner for inner in nodes if all(inner is not one for one in transposes)]

    def unpack_experts(self, node: NodeProto) -> None:
        """Replace an operator of packed experts by the choice of their matrices and a product with each."""
        x, experts, mask, *_, bias = node.input
        weight = mask.removesuffix(MASK)
        tensor = self._stored[weight]
        if bias not in self._stored or self._stored[bias].load().any():
            raise packed_error(weight, "experts with a bias")
        self._add(weight, tensor.shape, partial(_as_float32, tensor))
        (output,), last = node.output, self._last_axis()
        self.replaced[id(node)] = [
            _node("Gather", [weight, experts], f"{output}.chosen", f"{node.name}/chosen"),
            _node("Unsqueeze", [x, last], f"{output}.column", f"{node.name}/column"),
            _node("MatMul", [f"{output}.chosen", f"{output}.column"], f"{output}.product", node.name),
            _node("Squeeze", [f"{output}.product", last], output, f"{node.name}/row"),
        ]

    def _last_axis(self) -> str:
        """The name of a constant that says "the last axis"."""
        if all(constant.name != _LAST_AXIS for constant in self._graph.initializer):
            self._graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), _LAST_AXIS))
        return _LAST_AXIS

    def widen_lookup(self, node: NodeProto) -> None:
        """Replace a look-up of rows in an int8 table."""
        weight = self._scaled(node, 0)
        last = self._down(node, _LOOKING_UP)
        if weight is None or last is None or any(attribute.i for attribute in node.attribute):
            return
        table = self._table(weight)
        self.replaced[id(last)] = [_node("Gather", [table, node.input[1]], last.output[0], last.name)]

    def _scaled(self, node: NodeProto, place: int) -> StoredTensor | None:
        """The node's int8 matrix with scales beside it, if it has one at ``place``."""
        weight = self._stored.get(node.input[place]) if len(node.input) > place and node.output else None
        if weight is None or weight.dtype != TensorProto.INT8 or len(weight.shape) != 2:
            return None
        return weight if f"{weight.name}{SCALES}" in self._stored else None

    def _scales(self, weight: StoredTensor) -> StoredTensor:
        return self._stored[f"{weight.name}{SCALES}"]

    def _table(self, weight: StoredTensor) -> str:
        """The name of the float32 table of an int8 one."""
        load = partial(_scaled_rows, weight, self._scales(weight))
        return self._add(f"{weight.name}.table", weight.shape, load)

    def _add(self, name: str, shape: tuple[int, ...], load: Callable[[], NDArray[np.float32]]) -> str:
        self.weights[name] = DenseWeight(name, shape, TensorProto.FLOAT, load)
        return name

    def _down(self, node: NodeProto, operators: Sequence[str]) -> NodeProto | None:
        """The last of the nodes that follow one another from ``node`` on, if they have these operators."""
        for operator in operators:
            users = self._consumers[node.output[0]] if node.output else []
            if len(users) != 1 or users[0].op_type != operator or not users[0].output:
                return None
            node = users[0]
        return node


def _keep_used(graph: onnx.GraphProto, nodes: Sequence[NodeProto]) -> None:
    """Give the graph these nodes, but for those that nothing uses."""
    kept = [NodeProto.FromString(node.SerializeToString()) for node in used_nodes(nodes, graph)]
    del graph.node[:]
    graph.node.extend(kept)


def _read_past_from_cache(graph: onnx.GraphProto) -> None:
    """Take the number of past tokens from the first cache, as a standard export does: the inverse of ``cache_room``."""
    caches = [value.name for value in graph.input if len(value.type.tensor_type.shape.dim) == 4]
    lengths = {
        node.output[0]: node.input[0]
        for node in graph.node
        if node.op_type == "Shape"
        and node.input
        and node.output
        and [a.i for a in node.attribute if a.name == "start"] == [1]
    }
    for node in graph.node:
        subtracted = [lengths.get(name) for name in node.input]
        if caches and node.op_type == "Sub" and subtracted == ["attention_mask", "input_ids"]:
            node.CopyFrom(helper.make_node("Shape", caches[:1], node.output, name=node.name, start=2, end=3))
    _keep_used(graph, graph.node)


def _transposed(tensor: StoredTensor) -> NDArray[np.float32]:
    """The matrix of a packed weight as (inputs, outputs)."""
    return np.ascontiguousarray(tensor.load().astype(np.float32).T)


def _as_float32(tensor: StoredTensor) -> NDArray[np.float32]:
    return tensor.load().astype(np.float32)


def _scaled_rows(
    weight: StoredTensor, scales: StoredTensor, *, transposed: bool = False
) -> NDArray[np.float32]:
    """The int8 matrix, each row times its scale."""
    matrix = weight.load().astype(np.float32) * scales.load().astype(np.float32).reshape(-1, 1)
    return np.ascontiguousarray(matrix.T) if transposed else matrix


def _node(operator: str, inputs: Sequence[str], output: str, name: str) -> NodeProto:
    node: NodeProto = helper.make_node(operator, inputs, [output], name=name)
    return node
