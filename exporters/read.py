"""An .onnx file read by hand: its graph, and its constants one at a time, expanded only when asked for.

Works on files of any tool. ``onnx.load`` leaves the external values of sparse initializers unloaded and turns
inline indices into Python numbers, so the sparse initializers are cut out of the file's bytes before the rest
is parsed. Everything in the file is doubted: sizes are bounded before anything is allocated.
"""

from __future__ import annotations

import dataclasses
import itertools
import mmap
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]  # ships no type information
from onnx import SparseTensorProto, TensorProto

from exporters.axes import input_axes
from exporters.errors import ExportError
from exporters.packed_read import with_packed
from exporters.protobuf import LENGTH_DELIMITED, Field, fields, text
from exporters.stored import StoredTensor, dense_tensor, malformed, sparse_tensor

MAX_MODEL_BYTES = 2**31 - 1
_MODEL_GRAPH = 7
_GRAPH_SPARSE_INITIALIZER = 15


@dataclass(frozen=True)
class OnnxFile:
    """A model file that was read: its message without the sparse initializers, and all its constants.

    Attributes:
        path: The file.
        proto: The model without ``sparse_initializer``; dense initializers stored inline are inside.
        metadata: Its ``metadata_props``.
        tensors: Constants: dense initializers, sparse initializers, constants inside nodes, each in the
            file's order. The parts of a packed weight are one. Strings are left out.
    """

    path: Path
    proto: onnx.ModelProto
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]


def read_model(path: Path) -> OnnxFile:
    """The model in ``path``; values are read when a constant is asked for them.

    Raises:
        ExportError: E-ONNX-NOT-FOUND, E-ONNX-TRUNCATED, E-ONNX-CORRUPT, E-ONNX-TOO-LARGE,
            E-ONNX-TENSOR-MALFORMED, E-ONNX-SPARSE-INDICES, E-ONNX-PACKED, E-ONNX-DATA-* (see
            ``exporters.external``).
    """
    path = Path(path)
    try:
        with _open(path) as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            proto, places = _parse(content)
            metadata = {text(entry.key): text(entry.value) for entry in proto.metadata_props}
            constants = tuple(_tensors(proto, path, places))
            return OnnxFile(path, proto, metadata, with_packed(proto.graph.node, constants))
    except EOFError as error:
        raise ExportError(
            "E-ONNX-TRUNCATED", f"{path}: the file is cut: {error}", "copy the file again, or export again"
        ) from error
    except (ValueError, DecodeError) as error:
        raise _corrupt(path, str(error)) from error


def _open(path: Path) -> BinaryIO:
    """The model file opened for reading, its size checked."""
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ExportError(
            "E-ONNX-NOT-FOUND", f"{path}: {error.strerror or error}", "give the path of an .onnx file"
        ) from error
    refused = _refusal(path, os.fstat(descriptor))
    if refused is not None:
        os.close(descriptor)
        raise refused
    return os.fdopen(descriptor, "rb")


def _refusal(path: Path, status: os.stat_result) -> ExportError | None:
    """Why the file at ``path`` cannot be a model, from its type and size alone."""
    if not stat.S_ISREG(status.st_mode):
        return ExportError(
            "E-ONNX-NOT-FOUND", f"{path}: not a regular file", "give the path of an .onnx file"
        )
    if status.st_size == 0:
        return ExportError("E-ONNX-TRUNCATED", f"{path}: the file is empty", "copy it again, or export again")
    if status.st_size > MAX_MODEL_BYTES:
        return ExportError(
            "E-ONNX-TOO-LARGE",
            f"{path}: {status.st_size} bytes, protobuf allows {MAX_MODEL_BYTES}",
            "export the model with its weights in external data",
        )
    return None


def _parse(content: mmap.mmap) -> tuple[onnx.ModelProto, list[Field]]:
    """The model without sparse initializers, and where these lie in the file.

    Raises:
        EOFError: The file is cut.
        ValueError, DecodeError: The bytes are no ONNX model.
    """
    proto, places = onnx.ModelProto(), []
    for field in fields(content, 0, len(content)):
        if field.number != _MODEL_GRAPH or field.wire_type != LENGTH_DELIMITED:
            proto.MergeFromString(content[field.begin : field.end])
            continue
        begin = field.payload  # of the stretch between two sparse initializers
        for part in fields(content, field.payload, field.end):
            if part.number == _GRAPH_SPARSE_INITIALIZER and part.wire_type == LENGTH_DELIMITED:
                proto.graph.MergeFromString(content[begin : part.begin])
                places.append(part)
                begin = part.end
        proto.graph.MergeFromString(content[begin : field.end])
    if not proto.graph.node or not proto.opset_import:
        raise ValueError("it holds no graph with nodes and an opset; it is no ONNX model, or it is cut")
    return proto, places


def _tensors(proto: onnx.ModelProto, path: Path, places: Iterable[Field]) -> Iterator[StoredTensor]:
    """The constants of the model."""
    folder = path.parent
    dense = [dense_tensor("", tensor, folder) for tensor in proto.graph.initializer if _is_numeric(tensor)]
    sparse = [sparse_tensor("", partial(_read_sparse, path, place), folder) for place in places]
    axes = input_axes(proto.graph, {tensor.name: len(tensor.shape) for tensor in (*dense, *sparse)})
    for tensor in (*dense, *sparse):
        yield dataclasses.replace(tensor, input_axis=axes.get(tensor.name))
    bodies = [proto.graph.node, *(function.node for function in proto.functions)]
    for name, message in itertools.chain.from_iterable(_constants(nodes) for nodes in bodies):
        if isinstance(message, SparseTensorProto):
            yield sparse_tensor(name, partial(_given, message), folder)
        elif _is_numeric(message):
            yield dense_tensor(name, message, folder)


def _constants(nodes: Iterable[onnx.NodeProto]) -> Iterator[tuple[str, TensorProto | SparseTensorProto]]:
    """The tensors inside the nodes, also of inner graphs, with the name of the node's first output."""
    for node in nodes:
        name = text(next(iter(node.output), node.name))
        for attribute in node.attribute:
            tensors = [attribute.t] if attribute.HasField("t") else []
            sparse = [attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []
            graphs = [attribute.g] if attribute.HasField("g") else []
            for graph in (*graphs, *attribute.graphs):
                for inner in (*graph.initializer, *graph.sparse_initializer):
                    yield "", inner
                yield from _constants(graph.node)
            for message in (*tensors, *attribute.tensors, *sparse, *attribute.sparse_tensors):
                yield name, message


def _is_numeric(tensor: TensorProto) -> bool:
    """Whether the constant holds numbers. Strings are passed over, but may not come from other files."""
    if tensor.data_type == TensorProto.STRING and tensor.data_location == TensorProto.EXTERNAL:
        raise malformed(text(tensor.name), "strings in external data")
    return bool(tensor.data_type != TensorProto.STRING)


def _given(message: SparseTensorProto) -> SparseTensorProto:
    return message


def _read_sparse(path: Path, place: Field) -> SparseTensorProto:
    """The sparse initializer that lies at ``place`` of the file."""
    with _open(path) as stream:
        stream.seek(place.payload)
        content = stream.read(place.end - place.payload)
    try:
        return SparseTensorProto.FromString(content)
    except DecodeError as error:
        raise _corrupt(path, str(error)) from error


def _corrupt(path: Path, reason: str) -> ExportError:
    return ExportError(
        "E-ONNX-CORRUPT",
        f"{path}: not a readable ONNX model: {reason}",
        "copy the file again, or export again",
    )
