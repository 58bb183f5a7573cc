"""Initializers as bytes of a GraphProto: the messages of onnx.proto without the weights themselves.

A dense initializer is a TensorProto whose values lie in the external data file. A sparse one is a
SparseTensorProto: values (non-zero only) in the external data file, linear INT64 indices inline as packed
varints in ``int64_data``, which takes about 4 bytes an index where ``raw_data`` takes 8. Indices in
external data are legal in no release of the checker, and ONNX Runtime up to 1.24 fails on them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx
from onnx import TensorProto

from exporters.protobuf import field_head

_GRAPH_INITIALIZER = 5
_GRAPH_SPARSE_INITIALIZER = 15
_SPARSE_VALUES = 1
_SPARSE_INDICES = 2
_TENSOR_INT64_DATA = 7

_PACKED_BITS = {
    getattr(TensorProto, name): bits
    for name, bits in {"INT4": 4, "UINT4": 4, "FLOAT4E2M1": 4, "INT2": 2, "UINT2": 2}.items()
    if hasattr(TensorProto, name)
}


def dtype_name(dtype: int) -> str:
    """Numpy's name of an ONNX element type: float32, bfloat16, …"""
    return str(onnx.helper.tensor_dtype_to_np_dtype(dtype).name)


def tensor_bytes(shape: Sequence[int], dtype: int) -> int:
    """Bytes of a tensor's values in a file; types below one byte are packed."""
    bits = _PACKED_BITS.get(dtype) or 8 * onnx.helper.tensor_dtype_to_np_dtype(dtype).itemsize
    return -(-math.prod(shape) * int(bits) // 8)


def dense_initializer(name: str, shape: Sequence[int], dtype: int, location: str, offset: int) -> bytes:
    """The graph's field for a dense initializer with its values at ``offset`` of the file ``location``."""
    tensor: bytes = _external_tensor(name, shape, dtype, location, offset).SerializeToString(
        deterministic=True
    )
    return field_head(_GRAPH_INITIALIZER, len(tensor)) + tensor


def sparse_initializer_head(
    name: str, shape: Sequence[int], dtype: int, nnz: int, index_bytes: int, location: str, offset: int
) -> bytes:
    """The graph's field for a sparse initializer up to its packed indices, which follow it."""
    values: bytes = _external_tensor(name, [nnz], dtype, location, offset).SerializeToString(
        deterministic=True
    )
    dims: bytes = onnx.SparseTensorProto(dims=shape).SerializeToString(deterministic=True)
    indices: bytes = TensorProto(dims=[nnz], data_type=TensorProto.INT64).SerializeToString(
        deterministic=True
    )
    indices += field_head(_TENSOR_INT64_DATA, index_bytes)
    body = field_head(_SPARSE_VALUES, len(values)) + values + dims
    body += field_head(_SPARSE_INDICES, len(indices) + index_bytes) + indices
    return field_head(_GRAPH_SPARSE_INITIALIZER, len(body) + index_bytes) + body


def _external_tensor(name: str, shape: Sequence[int], dtype: int, location: str, offset: int) -> TensorProto:
    """A TensorProto whose values lie in an external file."""
    tensor = TensorProto(name=name, dims=shape, data_type=dtype, data_location=TensorProto.EXTERNAL)
    span = {"location": location, "offset": offset, "length": tensor_bytes(shape, dtype)}
    for key, value in span.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor
