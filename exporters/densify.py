"""The graph of any .onnx file with every weight dense and in float32: what a sparse model is compared with.

Zeros stay zeros but are stored and multiplied like any other number, so that the file runs as a model runs that was
never pruned. Tools that quantise need this form too: they fail on sparse initializers, or pass over them silently.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.fragments import tensor_bytes
from exporters.packed_read import PackedTensor
from exporters.read import OnnxFile
from exporters.stored import SparseTensor, StoredTensor
from exporters.unpacked_graph import DenseWeight, unpack_graph
from exporters.wire import write_model

_HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_INLINE_BYTES = (
    1024  # shapes and axes stay in the graph: tools that infer shapes do not look for them elsewhere
)


Weights = dict[str, DenseWeight]


def densify(model: OnnxFile, path: Path, *, fold_transposes: bool = False) -> None:
    """Write the dense float32 form of ``model`` to ``path``, and its weights to ``<name>.data`` beside it.

    One weight is in memory at a time.

    Args:
        model: The file that was read.
        path: The new ``.onnx`` file.
        fold_transposes: Store transposed, as a weight of its own, what a product uses through a Transpose (a head
            tied to the embeddings): only a product whose factor is a stored weight is quantised by tools.

    Raises:
        ExportError: The file does not hold its weights, packed ones do not fit together, or the graph is too large.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    stored = {tensor.name: tensor for tensor in _initializers(model)}
    weights = {name: _weight(tensor) for name, tensor in stored.items()}
    proto.graph.ClearField("initializer")
    weights |= unpack_graph(proto, stored)
    _widen_graph(proto.graph)
    _drop_casts(proto.graph, weights)
    if fold_transposes:
        _fold_transposes(proto.graph, weights)
    used = {name for node in proto.graph.node for name in node.input} | {v.name for v in proto.graph.output}
    kept = [weight for weight in weights.values() if weight.name in used]
    large = [weight for weight in kept if tensor_bytes(weight.shape, weight.dtype) > _INLINE_BYTES]
    small = [weight for weight in kept if tensor_bytes(weight.shape, weight.dtype) <= _INLINE_BYTES]
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(one.load(), one.name) for one in small)
    write_model(proto, large, path, f"{path.name}.data", encoding="dense")


def has_transposed_weights(model: OnnxFile) -> bool:
    """Whether a weight of the dense form reaches a product through a Transpose. ``model``: that form."""
    names = {tensor.name for tensor in _initializers(model)}
    through = {
        node.output[0] for node in model.proto.graph.node if node.op_type == "Cast" and _source(node) in names
    }
    return any(
        node.op_type == "Transpose" and _source(node) in names | through for node in model.proto.graph.node
    )


def _source(node: onnx.NodeProto) -> str:
    """The first input; "" where the node has none, or gives nothing, as in a broken file."""
    return str(node.input[0]) if node.input and node.output else ""


def _initializers(model: OnnxFile) -> Iterator[StoredTensor]:
    """The constants that are initializers of the main graph, not values inside nodes."""
    dense = {tensor.name for tensor in model.proto.graph.initializer}
    inner = {name for node in model.proto.graph.node if node.op_type == "Constant" for name in node.output}
    for tensor in model.tensors:
        if tensor.name and (
            tensor.name in dense
            or (isinstance(tensor, (SparseTensor, PackedTensor)) and tensor.name not in inner)
        ):
            yield tensor


def _weight(tensor: StoredTensor) -> DenseWeight:
    """The constant in float32 where it is of a narrower floating type."""
    if tensor.dtype not in _HALF:
        return DenseWeight(tensor.name, tensor.shape, tensor.dtype, tensor.load)
    return DenseWeight(tensor.name, tensor.shape, TensorProto.FLOAT, lambda: tensor.load().astype(np.float32))


def _widen_graph(graph: onnx.GraphProto) -> None:
    """Make float32 of every float16 and bfloat16 that the graph names: ONNX Runtime's CPU has no fast halves.

    All of them change together, so what fitted before fits after. Constants inside of nodes are converted.
    """
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in _HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype") and attribute.i in _HALF:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type in _HALF:
                values = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(values, attribute.t.name))
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                _widen_graph(inner)


def _drop_casts(graph: onnx.GraphProto, weights: Weights) -> None:
    """Take out the casts of weights that now have the type they are cast to: a product's factor is then a weight."""
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        source = weights.get(_source(node)) if node.op_type == "Cast" else None
        if source is not None and [a.i for a in node.attribute if a.name == "to"] == [source.dtype]:
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)
    _rename_inputs(graph, renamed)


def _fold_transposes(graph: onnx.GraphProto, weights: Weights) -> None:
    """Replace each Transpose of a whole matrix by a weight that is stored so."""
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        source = weights.get(_source(node)) if node.op_type == "Transpose" else None
        if source is None or len(source.shape) != 2 or [list(a.ints) for a in node.attribute] == [[0, 1]]:
            continue
        name = f"{source.name}.transposed"
        weights[name] = dataclasses.replace(
            source, name=name, shape=source.shape[::-1], load=_transposing(source.load)
        )
        renamed[node.output[0]] = name
        graph.node.remove(node)
    _rename_inputs(graph, renamed)


def _transposing(load: Callable[[], NDArray[np.generic]]) -> Callable[[], NDArray[np.generic]]:
    return lambda: np.ascontiguousarray(load().T)


def _rename_inputs(graph: onnx.GraphProto, renamed: dict[str, str]) -> None:
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name in renamed:
                node.input[place] = renamed[name]
