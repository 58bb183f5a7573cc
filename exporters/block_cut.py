"""One block cut out of an exported graph, with its weights as inputs, under names that do not tell which block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from exporters.causal_lm import BlockGraph
from exporters.graph_weights import GraphWeight

__all__ = ["HIDDEN", "OUTPUTS", "PAST_KEY", "PAST_VALUE", "BlockCut", "BlockCutter"]

HIDDEN, PAST_KEY, PAST_VALUE = "hidden", "past.key", "past.value"
OUTPUTS = ("block/hidden_states", "present.key", "present.value")


@dataclass(frozen=True)
class BlockCut:
    """A block as a model of its own.

    Attributes:
        proto: Inputs are `HIDDEN`, `PAST_KEY`, `PAST_VALUE`, what the prologue needs of the graph's inputs,
            and the weights; outputs are `OUTPUTS`. Equal for blocks that differ in nothing but names and weights.
        weights: The weight that belongs to each input of that name.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, GraphWeight]


class BlockCutter:
    """Cuts blocks out of one graph."""

    def __init__(self, graph: BlockGraph) -> None:
        proto = graph.proto.graph
        self._graph = graph
        self._position = {output: number for number, node in enumerate(proto.node) for output in node.output}
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._weights = {weight.name: weight for weight in graph.weights}
        self._input_types = {value.name: value.type.tensor_type.elem_type for value in proto.input}

    def cut(self, index: int) -> BlockCut:
        """Return block `index` with the nodes of the prologue that it needs."""
        graph, name = self._graph, self._graph.block_names[index]
        entering = graph.block_outputs[index - 1] if index else graph.embedded
        rename = _renaming(index, name, entering)
        leaving = [graph.block_outputs[index], f"present.{index}.key", f"present.{index}.value"]
        positions, reached = self._reach(leaving, entering)
        nodes = [_renamed(graph.proto.graph.node[position], rename) for position in sorted(positions)]
        weights = {name: self._weights[name] for name in sorted(reached) if name in self._weights}
        hidden_type = self._input_types[f"past_key_values.{index}.key"]
        inputs = {HIDDEN: hidden_type}
        inputs.update({rename(n): self._input_types[n] for n in sorted(reached) if n in self._input_types})
        inputs.update({rename(n): _widened(weight.dtype) for n, weight in weights.items()})
        outputs = [helper.make_tensor_value_info(output, hidden_type, None) for output in OUTPUTS]
        constants = [self._constants[n] for n in sorted(reached) if n in self._constants]
        proto = helper.make_model(
            helper.make_graph(
                nodes,
                "block",
                [helper.make_tensor_value_info(n, kind, None) for n, kind in inputs.items()],
                outputs,
                [_renamed_tensor(constant, rename) for constant in constants],
            ),
            opset_imports=list(graph.proto.opset_import),
            ir_version=graph.proto.ir_version,
        )
        return BlockCut(proto, {rename(n): weight for n, weight in weights.items()})

    def _reach(self, leaving: Iterable[str], entering: str) -> tuple[set[int], set[str]]:
        """Return the positions of the nodes that `leaving` needs, down from `entering`, and the leaves reached."""
        nodes = self._graph.proto.graph.node
        positions: set[int] = set()
        leaves: set[str] = set()
        waiting = list(leaving)
        while waiting:
            value = waiting.pop()
            position = self._position.get(value)
            if value == entering or not value:
                continue
            if position is None:
                leaves.add(value)
            elif position not in positions:
                positions.add(position)
                waiting.extend(nodes[position].input)
        return positions, leaves


def _renaming(index: int, block: str, entering: str) -> Callable[[str], str]:
    prefixes = {
        f"{block}/": "block/",
        f"{block}.": "block.",
        f"past_key_values.{index}.": "past.",
        f"present.{index}.": "present.",
    }

    def rename(name: str) -> str:
        if name == entering:
            return HIDDEN
        for prefix, replacement in prefixes.items():
            if name.startswith(prefix):
                return replacement + name[len(prefix) :]
        return name

    return rename


def _renamed(node: onnx.NodeProto, rename: Callable[[str], str]) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(node)
    copy.name = rename(node.name)
    copy.input[:] = [rename(name) for name in node.input]
    copy.output[:] = [rename(name) for name in node.output]
    return copy


def _renamed_tensor(tensor: TensorProto, rename: Callable[[str], str]) -> TensorProto:
    copy = TensorProto()
    copy.CopyFrom(tensor)
    copy.name = rename(tensor.name)
    return copy


def _widened(dtype: int) -> int:
    # ONNX Runtime's Python binding takes no bfloat16 arrays; fed as float32, the Cast that follows changes
    # nothing.
    return TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype
