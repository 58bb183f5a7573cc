"""A graph and its weights written as .onnx and external data, one weight in memory at a time.

The graph's message is written first and the initializers follow it inside the same GraphProto, so the file
is one ordinary ModelProto. Their lengths must be known before its first byte; therefore every weight is
loaded twice, once to count its zeros and once to write it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters.axes import input_axes
from exporters.encoding import (
    INLINE_BUDGET_BYTES,
    EncodingMode,
    TensorCensus,
    encoding_bytes,
    is_pruned,
    plan_encodings,
    take_census,
)
from exporters.errors import ExportError
from exporters.fragments import dense_initializer, dtype_name, sparse_initializer_head, tensor_bytes
from exporters.manifest import Encoding, TensorRow
from exporters.masks import nonzero_mask
from exporters.protobuf import field_head, packed_indices

MAX_IR_VERSION = 10  # ONNX Runtime 1.20 refuses newer ones
MAX_MODEL_BYTES = 2**31 - 1  # protobuf's limit for one message
PAGE_BYTES = 4096
_SMALL_ALIGNMENT = 64
_MODEL_GRAPH = 7
_CHUNK_ELEMENTS = 2**20


class GraphWeight(Protocol):
    """A weight of the graph that is loaded when asked for, the same each time."""

    @property
    def name(self) -> str:
        """Initializer name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored in the graph."""

    @property
    def dtype(self) -> int:
        """ONNX element type."""

    @property
    def transposed(self) -> bool:
        """Whether the graph stores the parameter with its last two axes swapped."""

    @property
    def load(self) -> Callable[[], NDArray[np.generic]]:
        """Loads the values in the stored shape and type."""


@dataclass(frozen=True)
class _Placed:
    """A weight, how it is encoded, and where its values begin in the data file."""

    weight: GraphWeight
    census: TensorCensus
    encoding: Encoding
    offset: int


def write_model(
    proto: onnx.ModelProto,
    weights: Sequence[GraphWeight],
    onnx_path: Path,
    data_name: str,
    *,
    encoding: EncodingMode = "auto",
    metadata: Mapping[str, str] | None = None,
    pruned: Collection[str] | None = None,
    inline_budget: int = INLINE_BUDGET_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[TensorRow, ...]:
    """Write ``onnx_path`` and, beside it, ``data_name``; return one row per weight, in their order.

    Equal inputs give equal bytes. Existing files are overwritten: atomic publishing is the caller's part.

    Args:
        proto: The graph without these weights. Not changed.
        weights: Weights to add as initializers, each loaded twice.
        onnx_path: The model file.
        data_name: Name of the external data file, without a folder.
        encoding: See ``plan_encodings``.
        metadata: Entries for ``metadata_props``; replaces entries of the same key.
        pruned: Names of the weights that pruning gave zeros; None: see ``is_pruned``.
        inline_budget: Bytes of indices allowed in the model file.
        progress: Called with (loads done, loads in all).

    Raises:
        ExportError: E-EXPORT-TOO-LARGE: the model file would exceed protobuf's 2 GiB.
    """
    _check_names(proto, weights, data_name)
    report = _Counter(progress, 2 * len(weights))
    censuses = []
    for weight in weights:
        censuses.append(take_census(weight.name, int(weight.dtype), _load(weight)))
        report.advance()
    plan = plan_encodings(censuses, encoding, location=data_name, pruned=pruned, inline_budget=inline_budget)
    placed = list(_place(weights, censuses, plan))
    envelope, graph = _serialize(proto, metadata or {})
    graph_bytes = len(graph) + sum(len(_head(part, data_name)) + _index_bytes(part) for part in placed)
    onnx_bytes = len(envelope) + len(field_head(_MODEL_GRAPH, graph_bytes)) + graph_bytes
    if onnx_bytes > MAX_MODEL_BYTES:
        raise ExportError(
            "E-EXPORT-TOO-LARGE",
            f"{onnx_path.name}: the graph needs {onnx_bytes} bytes, protobuf allows {MAX_MODEL_BYTES}",
            "use --encoding auto or dense, which keep indices out of the model file",
        )
    with onnx_path.open("wb") as model, (onnx_path.parent / data_name).open("wb") as data:
        model.write(envelope + field_head(_MODEL_GRAPH, graph_bytes) + graph)
        for part in placed:
            _write_weight(part, data_name, model, data)
            report.advance()
        for stream in (model, data):
            stream.flush()
            os.fsync(stream.fileno())
    axes = input_axes(proto.graph, {weight.name: len(weight.shape) for weight in weights})
    return tuple(_row(part, data_name, axes.get(part.weight.name), pruned) for part in placed)


class _Counter:
    """Counts loads and tells the progress callback."""

    def __init__(self, progress: Callable[[int, int], None] | None, total: int) -> None:
        self.progress, self.done, self.total = progress, 0, total

    def advance(self) -> None:
        """One load more."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _check_names(proto: onnx.ModelProto, weights: Sequence[GraphWeight], data_name: str) -> None:
    """Raise ValueError for what would make an invalid file: an initializer twice, a data file elsewhere."""
    names = [weight.name for weight in weights] + [tensor.name for tensor in proto.graph.initializer]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
    if twice:
        raise ValueError(f"initializers given twice: {sorted(twice)}")
    if Path(data_name).name != data_name:
        raise ValueError(f"the data file lies beside the model, its name has no folder: {data_name!r}")


def _load(weight: GraphWeight) -> NDArray[np.generic]:
    """The weight's values, contiguous, checked against its declared shape and type."""
    values = weight.load()
    declared = (tuple(weight.shape), dtype_name(int(weight.dtype)))
    if (values.shape, values.dtype.name) != declared:
        raise ValueError(f"{weight.name}: declared {declared}, loaded {(values.shape, values.dtype.name)}")
    if values.nbytes != tensor_bytes(values.shape, int(weight.dtype)):
        raise ValueError(
            f"{weight.name}: {values.dtype.name} values are packed in files and cannot be streamed"
        )
    return np.ascontiguousarray(values)


def _place(
    weights: Sequence[GraphWeight], censuses: Sequence[TensorCensus], plan: Mapping[str, Encoding]
) -> Iterator[_Placed]:
    """Give each weight its place in the data file; large dense ones begin on a page, to be mapped."""
    end = 0
    for weight, census in zip(weights, censuses, strict=True):
        encoding = plan[weight.name]
        shape = (census.nnz,) if encoding == "sparse" else census.shape
        size_bytes = tensor_bytes(shape, census.dtype)
        alignment = PAGE_BYTES if encoding == "dense" and size_bytes >= PAGE_BYTES else _SMALL_ALIGNMENT
        offset = -(-end // alignment) * alignment
        yield _Placed(weight, census, encoding, offset)
        end = offset + size_bytes


def _serialize(proto: onnx.ModelProto, metadata: Mapping[str, str]) -> tuple[bytes, bytes]:
    """The model's fields without the graph, and the graph."""
    envelope = onnx.ModelProto()
    envelope.CopyFrom(proto)
    envelope.ClearField("graph")
    envelope.ir_version = min(proto.ir_version or MAX_IR_VERSION, MAX_IR_VERSION)
    entries = {entry.key: entry.value for entry in proto.metadata_props} | dict(metadata)
    envelope.ClearField("metadata_props")
    for key, value in entries.items():
        envelope.metadata_props.add(key=key, value=value)
    return envelope.SerializeToString(deterministic=True), proto.graph.SerializeToString(deterministic=True)


def _head(part: _Placed, location: str) -> bytes:
    """The initializer's field in the graph, for a sparse one up to its indices."""
    census = part.census
    if part.encoding == "dense":
        return dense_initializer(census.name, census.shape, census.dtype, location, part.offset)
    return sparse_initializer_head(
        census.name, census.shape, census.dtype, census.nnz, census.index_bytes, location, part.offset
    )


def _index_bytes(part: _Placed) -> int:
    return part.census.index_bytes if part.encoding == "sparse" else 0


def _write_weight(part: _Placed, location: str, model: BinaryIO, data: BinaryIO) -> None:
    """Write one weight: its header and indices to ``model``, its values to ``data``."""
    flat = _load(part.weight).reshape(-1)
    model.write(_head(part, location))
    data.write(bytes(part.offset - data.tell()))
    if part.encoding == "dense":
        data.write(flat.view(np.uint8).data)
        return
    nonzero = nonzero_mask(flat)
    index_bytes = sum(model.write(piece) for piece in packed_indices(nonzero))
    for start in range(0, flat.size, _CHUNK_ELEMENTS):
        chunk = slice(start, start + _CHUNK_ELEMENTS)
        data.write(flat[chunk][nonzero[chunk]].view(np.uint8).data)
    if (index_bytes, int(np.count_nonzero(nonzero))) != (part.census.index_bytes, part.census.nnz):
        raise RuntimeError(f"{part.weight.name}: loaded twice, and its zeros differ")


def _row(part: _Placed, location: str, axis: int | None, pruned: Collection[str] | None) -> TensorRow:
    """The manifest's row for a weight that was written."""
    census, sizes = part.census, encoding_bytes(part.census, location, part.offset)
    return TensorRow(
        name=census.name,
        shape=census.shape,
        dtype=dtype_name(census.dtype),
        transposed=part.weight.transposed,
        input_axis=axis,
        pruned=is_pruned(census, pruned),
        nnz=census.nnz,
        encoding=part.encoding,
        mask_sha256=census.mask_sha256,
        bytes_by_encoding=sizes,
        stored_bytes=sizes[part.encoding],
    )
