"""One constant of an ONNX file: what it is, and its values when asked for. Nothing in the file is trusted."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import SparseTensorProto, TensorProto

from exporters.encoding import MAX_EXPANDED_BYTES
from exporters.errors import ExportError
from exporters.external import ExternalSpan, locate
from exporters.fragments import tensor_bytes
from exporters.manifest import Encoding
from exporters.masks import BoolArray, nonzero_mask
from exporters.protobuf import field_head, fields, text, unpack_varints

_INT64_DATA = 7
_NUMBERS = frozenset(onnx.helper.get_all_tensor_dtypes()) - {TensorProto.STRING, TensorProto.UNDEFINED}
_INDEX_DTYPES = {TensorProto.INT64, TensorProto.INT32, TensorProto.INT16, TensorProto.INT8}


@dataclass(frozen=True)
class StoredTensor(abc.ABC):
    """A constant of the model.

    Attributes:
        name: Initializer name; for a constant inside a node the name of the node's first output.
        shape: Shape of the whole tensor, also of a sparse one.
        dtype: ONNX element type.
        stored_bytes: Bytes in the files, header included.
        input_axis: Axis (-1 or -2) along which a matrix product sums; None where the graph does not tell.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    stored_bytes: int
    input_axis: int | None

    @property
    @abc.abstractmethod
    def encoding(self) -> Encoding:
        """How it is stored."""

    @property
    @abc.abstractmethod
    def data_files(self) -> tuple[Path, ...]:
        """The external files in which it lies; empty for one stored inline."""

    @abc.abstractmethod
    def load(self) -> NDArray[np.generic]:
        """The values, expanded to ``shape``.

        Raises:
            ExportError: The file does not hold them.
        """

    @abc.abstractmethod
    def nonzero(self) -> BoolArray:
        """Where the values are not zero, in ``shape``; negative zero is zero. Raises as ``load``."""


@dataclass(frozen=True)
class DenseTensor(StoredTensor):
    """A constant stored whole, inline in ``message`` or in the external ``span``."""

    message: TensorProto
    span: ExternalSpan | None

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return "dense"

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The external files in which it lies."""
        return (self.span.path,) if self.span else ()

    def load(self) -> NDArray[np.generic]:
        """The values in ``shape``."""
        return _values(self.name, self.message, self.span)

    def nonzero(self) -> BoolArray:
        """Where the values are not zero."""
        return nonzero_mask(self.load())


@dataclass(frozen=True)
class SparseTensor(StoredTensor):
    """A constant of which only some elements are stored; ``read`` gives its message from the file."""

    read: Callable[[], SparseTensorProto]
    span: ExternalSpan | None
    index_span: ExternalSpan | None

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return "sparse"

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The external files in which it lies."""
        return tuple(part.path for part in (self.span, self.index_span) if part)

    def load(self) -> NDArray[np.generic]:
        """The values, expanded to ``shape``."""
        places, values = self._elements()
        expanded = np.zeros(math.prod(self.shape), values.dtype)
        expanded[places] = values
        return expanded.reshape(self.shape)

    def nonzero(self) -> BoolArray:
        """Where the values are not zero; a stored zero is zero."""
        places, values = self._elements()
        expanded = np.zeros(math.prod(self.shape), np.bool_)
        expanded[places] = nonzero_mask(values)
        return expanded.reshape(self.shape)

    def _elements(self) -> tuple[NDArray[np.int64], NDArray[np.generic]]:
        """Linear index and value of each stored element, the indices checked."""
        message = self.read()
        values = _values(self.name, message.values, self.span)
        return _linear_indices(message, self.name, self.shape, self.index_span), values


def dense_tensor(name: str, message: TensorProto, folder: Path) -> DenseTensor:
    """The constant in ``message``, its size and place checked. ``name`` is used where the message has none.

    Raises:
        ExportError: E-ONNX-TENSOR-MALFORMED, E-ONNX-DATA-*.
        ValueError: A name is not UTF-8.
    """
    name = text(message.name) or name
    shape = _checked_shape(name, message.dims, message.data_type)
    span = _span(name, message, folder)
    stored = _field_bytes(message) + (span.size_bytes if span else 0)
    return DenseTensor(name, shape, message.data_type, stored, None, message, span)


def sparse_tensor(name: str, read: Callable[[], SparseTensorProto], folder: Path) -> SparseTensor:
    """The sparse constant that ``read`` gives, its sizes and places checked, its indices not yet.

    ``name`` is used where the message has none.

    Raises:
        ExportError: E-ONNX-TENSOR-MALFORMED, E-ONNX-SPARSE-INDICES, E-ONNX-DATA-*.
        ValueError: A name is not UTF-8.
    """
    message = read()
    values, indices = message.values, message.indices
    name = text(values.name) or name
    shape = _checked_shape(name, message.dims, values.data_type)
    if tensor_bytes(shape, values.data_type) > MAX_EXPANDED_BYTES:
        raise malformed(name, f"shape {list(shape)} expands to more than {MAX_EXPANDED_BYTES} bytes")
    count = _checked_shape(name, values.dims, values.data_type)
    index_shape = _checked_shape(name, indices.dims, TensorProto.INT64)
    if indices.data_type not in _INDEX_DTYPES:
        raise _bad_indices(name, f"their type is {TensorProto.DataType.Name(indices.data_type)}")
    if len(count) != 1 or index_shape not in {count, (*count, len(shape))}:
        raise _bad_indices(name, f"their shape is {list(index_shape)} for values {list(count)}")
    span, index_span = _span(name, values, folder), _span(name, indices, folder)
    stored = _field_bytes(message) + sum(part.size_bytes for part in (span, index_span) if part)
    return SparseTensor(name, shape, values.data_type, stored, None, read, span, index_span)


def malformed(name: str, reason: str) -> ExportError:
    """The error for a constant whose message makes no sense."""
    return ExportError("E-ONNX-TENSOR-MALFORMED", f"{name}: {reason}", "export the model again")


def _checked_shape(name: str, dims: Sequence[int], dtype: int) -> tuple[int, ...]:
    """The shape, if no side is negative and the type is one of numbers."""
    if any(side < 0 for side in dims):
        raise malformed(name, f"shape {list(dims)} has a negative side")
    if dtype not in _NUMBERS:
        raise malformed(name, f"element type {dtype}")
    return tuple(dims)


def _field_bytes(message: onnx.TensorProto | SparseTensorProto) -> int:
    """Bytes of the message as a field of the graph."""
    size_bytes = int(message.ByteSize())
    return len(field_head(1, size_bytes)) + size_bytes


def _span(name: str, message: TensorProto, folder: Path) -> ExternalSpan | None:
    """Where the values lie outside the message, None when they are inside; inline sizes are checked here."""
    size_bytes = tensor_bytes(message.dims, message.data_type)
    if message.data_location == TensorProto.EXTERNAL:
        return locate(name, message, folder, size_bytes)
    if message.HasField("raw_data") and len(message.raw_data) != size_bytes:
        raise malformed(name, f"{len(message.raw_data)} bytes, its shape needs {size_bytes}")
    return None


def _values(name: str, message: TensorProto, span: ExternalSpan | None) -> NDArray[np.generic]:
    """The values of a dense message in its shape."""
    shape = tuple(message.dims)
    if span is not None:
        octets = span.read()
        dtype: np.dtype[np.generic] = onnx.helper.tensor_dtype_to_np_dtype(message.data_type)
        if octets.size == math.prod(shape) * dtype.itemsize:
            return octets.view(dtype).reshape(shape)
        inline = TensorProto(dims=shape, data_type=message.data_type, raw_data=octets.tobytes())
        return np.asarray(onnx.numpy_helper.to_array(inline))  # several elements a byte
    if message.data_type == TensorProto.INT64 and message.int64_data:
        return _packed_int64(name, message).reshape(shape)
    try:
        return np.asarray(onnx.numpy_helper.to_array(message))
    except (ValueError, TypeError) as error:
        raise malformed(name, str(error)) from error


def _packed_int64(name: str, message: TensorProto) -> NDArray[np.int64]:
    """``int64_data`` without one Python number per element."""
    packed = message.SerializeToString(deterministic=True)
    parts = [
        unpack_varints(packed[field.payload : field.end])
        for field in fields(packed, 0, len(packed))
        if field.number == _INT64_DATA
    ]
    numbers = np.concatenate(parts)
    if numbers.size != math.prod(message.dims):
        raise malformed(name, f"{numbers.size} numbers, its shape needs {math.prod(message.dims)}")
    return numbers


def _linear_indices(
    message: SparseTensorProto, name: str, shape: tuple[int, ...], span: ExternalSpan | None
) -> NDArray[np.int64]:
    """The places of the stored elements in C order: in range, ascending, none twice.

    Raises:
        ExportError: E-ONNX-SPARSE-INDICES. ONNX Runtime would run such a file and give other numbers.
    """
    indices = _values(name, message.indices, span).astype(np.int64, copy=False)
    sides = np.array(shape, np.int64) if indices.ndim == 2 else np.array([math.prod(shape)], np.int64)
    coordinates = indices.reshape(len(indices), -1)
    if ((coordinates < 0) | (coordinates >= sides)).any():
        raise _bad_indices(name, f"some lie outside shape {list(shape)}")
    linear = np.ravel_multi_index(tuple(coordinates.T), shape) if indices.ndim == 2 else indices
    if (np.diff(linear) <= 0).any():
        raise _bad_indices(name, "they are not ascending, or one stands twice")
    return np.asarray(linear, np.int64)


def _bad_indices(name: str, reason: str) -> ExportError:
    return ExportError("E-ONNX-SPARSE-INDICES", f"{name}: sparse indices: {reason}", "export the model again")
