"""Parts cut out of an exported graph, with their weights as inputs; blocks under names that do not tell which block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

__all__ = [
    "HIDDEN",
    "OUTPUTS",
    "PAST_KEY",
    "PAST_VALUE",
    "BlockCut",
    "BlockCutter",
    "CutGraph",
    "CutWeight",
]

HIDDEN, PAST_KEY, PAST_VALUE = "hidden", "past.key", "past.value"
OUTPUTS = ("block/hidden_states", "present.key", "present.value")


class CutWeight(Protocol):
    """A weight that a part of a graph uses."""

    @property
    def name(self) -> str:
        """The initializer's name."""

    @property
    def dtype(self) -> int:
        """ONNX element type as stored."""

    @property
    def load(self) -> Callable[[], NDArray[np.generic]]:
        """Loads the values in the stored shape and type."""


class CutGraph(Protocol):
    """A graph of blocks without its weights, and the weights; see `exporters.causal_lm.BlockGraph`."""

    @property
    def proto(self) -> onnx.ModelProto:
        """The graph; only constants that are no weights are inside."""

    @property
    def weights(self) -> Sequence[CutWeight]:
        """What nodes name and the graph does not hold."""

    @property
    def embedded(self) -> str:
        """Name of the hidden state that enters the first block."""

    @property
    def block_names(self) -> Sequence[str]:
        """Path of each block in the model, first to last; its nodes' names begin with it."""

    @property
    def block_outputs(self) -> Sequence[str]:
        """Name of the hidden state that leaves each block."""


@dataclass(frozen=True)
class BlockCut:
    """A block as a model of its own.

    Attributes:
        proto: Inputs are `HIDDEN`, `PAST_KEY`, `PAST_VALUE`, what the prologue needs of the graph's inputs,
            and the weights; outputs are `OUTPUTS`. Equal for blocks that differ in nothing but names and weights.
        weights: The weight that belongs to each input of that name.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, CutWeight]


class BlockCutter:
    """Cuts blocks, and what stands before and behind them, out of one graph."""

    def __init__(self, graph: CutGraph) -> None:
        proto = graph.proto.graph
        self._graph = graph
        self._position = {output: number for number, node in enumerate(proto.node) for output in node.output}
        self._constants = {tensor.name: tensor for tensor in proto.initializer}
        self._weights = {weight.name: weight for weight in graph.weights}
        self._input_types = {value.name: value.type.tensor_type.elem_type for value in proto.input}
        self._output_types = {value.name: value.type.tensor_type.elem_type for value in proto.output}

    def cut(self, index: int) -> BlockCut:
        """Return block `index` with the nodes of the prologue that it needs."""
        graph, name = self._graph, self._graph.block_names[index]
        entering = graph.block_outputs[index - 1] if index else graph.embedded
        leaving = [graph.block_outputs[index], f"present.{index}.key", f"present.{index}.value"]
        hidden_type = self._input_types[f"past_key_values.{index}.key"]
        outputs = dict.fromkeys(OUTPUTS, hidden_type)
        return self._cut(leaving, entering, _renaming(index, name, entering), hidden_type, outputs)

    def cut_prologue(self) -> BlockCut:
        """Return what leaves the hidden state `embedded`; its output has that name."""
        hidden_type = self._input_types["past_key_values.0.key"]
        outputs = {self._graph.embedded: hidden_type}
        return self._cut([self._graph.embedded], None, lambda name: name, hidden_type, outputs)

    def cut_epilogue(self) -> BlockCut:
        """Return what makes ``logits`` of the last block's hidden state, which it takes as `HIDDEN`."""
        last = self._graph.block_outputs[-1]
        outputs = {"logits": self._output_types["logits"]}
        hidden_type = self._input_types["past_key_values.0.key"]
        return self._cut(["logits"], last, lambda n: HIDDEN if n == last else n, hidden_type, outputs)

    def _cut(
        self,
        leaving: Sequence[str],
        entering: str | None,
        rename: Callable[[str], str],
        hidden_type: int,
        outputs: Mapping[str, int],
    ) -> BlockCut:
        """Return what `leaving` needs, down from `entering`; `outputs` are their names and types there."""
        graph = self._graph
        positions, reached = self._reach(leaving, entering)
        nodes = [_renamed(graph.proto.graph.node[position], rename) for position in sorted(positions)]
        weights = {name: self._weights[name] for name in sorted(reached) if name in self._weights}
        inputs = {} if entering is None else {HIDDEN: hidden_type}
        inputs.update({rename(n): self._input_types[n] for n in sorted(reached) if n in self._input_types})
        inputs.update({rename(n): _widened(weight.dtype) for n, weight in weights.items()})
        constants = [self._constants[n] for n in sorted(reached) if n in self._constants]
        proto = helper.make_model(
            helper.make_graph(
                nodes,
                "block",
                [helper.make_tensor_value_info(n, kind, None) for n, kind in inputs.items()],
                [helper.make_tensor_value_info(n, kind, None) for n, kind in outputs.items()],
                [_renamed_tensor(constant, rename) for constant in constants],
            ),
            opset_imports=list(graph.proto.opset_import),
            ir_version=graph.proto.ir_version,
            functions=list(graph.proto.functions),
        )
        return BlockCut(proto, {rename(n): weight for n, weight in weights.items()})

    def _reach(self, leaving: Iterable[str], entering: str | None) -> tuple[set[int], set[str]]:
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
