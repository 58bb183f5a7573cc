"""The graph of an .onnx file that this package has written, as something that blocks can be cut out of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx

from exporters.block_cut import CutWeight
from exporters.read import OnnxFile
from exporters.stored import DenseTensor

__all__ = ["FileGraph", "graph_of_file"]

_EMBEDDED = "prologue/hidden_states"  # as exporters.stitch names it
_LEAVES = "/hidden_states"


@dataclass(frozen=True)
class FileGraph:
    """A file's graph without weights, and the weights, which are read one at a time and expanded; a `CutGraph`.

    Attributes:
        proto: The graph; constants that lie in the model file itself are inside.
        weights: Sparse initializers, and dense ones in other files.
        embedded: Name of the hidden state that enters the first block.
        block_names: Path of each block, first to last.
        block_outputs: Name of the hidden state that leaves each block.
    """

    proto: onnx.ModelProto
    weights: Sequence[CutWeight]
    embedded: str
    block_names: Sequence[str]
    block_outputs: Sequence[str]


def graph_of_file(model: OnnxFile, block_outputs: Sequence[str]) -> FileGraph | None:
    """The graph of a file whose manifest names ``block_outputs``; None where it is not of the form that is exported."""
    computed = {output for node in model.proto.graph.node for output in node.output}
    inputs = {value.name for value in model.proto.graph.input}
    outputs = {value.name for value in model.proto.graph.output}
    named = all(name.endswith(_LEAVES) and name in computed for name in (_EMBEDDED, *block_outputs))
    cached = all(
        f"past_key_values.{index}.{part}" in inputs and f"present.{index}.{part}" in outputs
        for index in range(len(block_outputs))
        for part in ("key", "value")
    )
    if not block_outputs or not named or not cached or "logits" not in outputs:
        return None
    weights = [
        tensor
        for tensor in model.tensors
        if tensor.name not in computed and not (isinstance(tensor, DenseTensor) and tensor.span is None)
    ]
    outside = {weight.name for weight in weights}
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    inline = [tensor for tensor in proto.graph.initializer if tensor.name not in outside]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    names = [name.removesuffix(_LEAVES) for name in block_outputs]
    return FileGraph(proto, weights, _EMBEDDED, names, tuple(block_outputs))
