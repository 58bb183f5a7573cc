"""Packed weights of a model file: which constants make one up, and its numbers when asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from exporters.int8_function import is_int8_product
from exporters.manifest import Encoding
from exporters.masks import BoolArray, nonzero_mask
from exporters.packed_function import (
    WEIGHT_INPUTS,
    is_expert_product,
    is_packed_product,
    weight_inputs,
)
from exporters.packed_nodes import MASK, NO_SCALES, SCALES
from exporters.packing import (
    FORMAT_VERSION,
    PIECE_COLUMNS,
    PackedMatrix,
    dequantize,
    groups_of,
    packed_error,
    unpack_matrix,
)
from exporters.protobuf import text
from exporters.stored import DenseTensor, StoredTensor

__all__ = ["PackedTensor", "has_integer_weights", "rounds_inputs", "with_packed"]

_VALUE_TYPES = {
    TensorProto.FLOAT: TensorProto.FLOAT,
    TensorProto.FLOAT16: TensorProto.FLOAT16,
    TensorProto.BFLOAT16: TensorProto.BFLOAT16,
    TensorProto.INT8: TensorProto.INT8,
    TensorProto.UINT8: TensorProto.INT4,
}
_MASK, _VALUES, _OFFSETS, _SCALES = range(4)  # of a weight's inputs


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A packed weight: ``shape`` is (outputs, inputs), or (experts, outputs, inputs), ``dtype`` what its values are.

    Attributes:
        parts: The constants mask, values, offsets and scales.
        group_size: Columns that share a scale.
    """

    parts: tuple[DenseTensor, DenseTensor, DenseTensor, DenseTensor]
    group_size: int

    @property
    def encoding(self) -> Encoding:
        """How it is stored."""
        return "packed"

    @property
    def data_files(self) -> tuple[Path, ...]:
        """The external files in which it lies."""
        return tuple(dict.fromkeys(path for part in self.parts for path in part.data_files))

    def load(self) -> NDArray[np.generic]:
        """The weights in ``shape``; integers times their scales, float32.

        Raises:
            ExportError: E-ONNX-PACKED: its parts make no sense.
        """
        numbers = self._numbers()
        scales = np.asarray(self.parts[3].load(), np.float32)
        rows, columns = numbers.shape
        if scales.shape not in ((1, 1), (rows, groups_of(columns, self.group_size))):
            raise packed_error(self.name, f"scales of shape {list(scales.shape)}")
        if scales.shape == (1, 1):
            plain = self.dtype not in (TensorProto.INT8, TensorProto.INT4) and scales[0, 0] == 1
            return (numbers if plain else np.asarray(numbers, np.float32) * scales).reshape(self.shape)
        return dequantize(numbers, scales, self.group_size).reshape(self.shape)

    def nonzero(self) -> BoolArray:
        """Where the weights are not zero; a stored zero is zero."""
        return nonzero_mask(self._numbers()).reshape(self.shape)

    def _numbers(self) -> NDArray[np.generic]:
        """The stored numbers, experts one below the other."""
        mask, values, offsets = (part.load() for part in self.parts[:3])
        packed = PackedMatrix(
            np.asarray(mask, np.uint8),
            values,
            np.asarray(offsets, np.int64),
            self.shape[-1],
            self.dtype == TensorProto.INT4,
        )
        return unpack_matrix(packed, self.name)


def with_packed(
    nodes: Sequence[onnx.NodeProto], constants: Sequence[StoredTensor]
) -> tuple[StoredTensor, ...]:
    """The constants of a graph, those that make up a packed weight as one, in the place of its mask.

    Raises:
        ExportError: E-ONNX-PACKED: a product with a packed weight lacks parts, or is of another format.
    """
    by_name = {tensor.name: tensor for tensor in constants}
    packed: dict[str, PackedTensor] = {}
    inside: set[str] = set()
    for node in filter(is_packed_product, nodes):
        weights = weight_inputs(node)
        if len(weights) != len(node.output) or any(len(inputs) != len(WEIGHT_INPUTS) for inputs in weights):
            counted = f"{len(node.input)} inputs and {len(node.output)} outputs"
            raise packed_error(text(node.name), f"{node.op_type} with {counted}")
        for inputs in weights:
            inputs = [text(name) for name in inputs]
            packed[inputs[_MASK]] = _packed_tensor(node, inputs, by_name)
            inside.update(inputs[_VALUES:_SCALES])
            if inputs[_SCALES] != NO_SCALES:
                inside.add(inputs[_SCALES])
    return tuple(packed.get(t.name, t) for t in constants if t.name not in inside)


def has_integer_weights(constants: Iterable[StoredTensor]) -> bool:
    """Whether some weights, packed or not, are integers times scales, as an export of int8 or int4 writes them."""
    constants = list(constants)
    names = {tensor.name for tensor in constants}
    integers = [t for t in constants if t.dtype in (TensorProto.INT8, TensorProto.INT4)]
    return any(isinstance(t, PackedTensor) or f"{t.name}{SCALES}" in names for t in integers)


def rounds_inputs(nodes: Sequence[onnx.NodeProto]) -> bool:
    """Whether a product of the graph, with packed or int8 weights, rounds its inputs."""
    own = (node for node in nodes if is_packed_product(node) or is_int8_product(node))
    return any(_integer(node, "activation_bits", 32) != 32 for node in own) or any(
        node.op_type == "MatMulInteger" for node in nodes
    )


def _packed_tensor(
    node: onnx.NodeProto, inputs: Sequence[str], by_name: Mapping[str, StoredTensor]
) -> PackedTensor:
    name = inputs[_MASK].removesuffix(MASK)
    version = _integer(node, "format_version", 0)
    if version != FORMAT_VERSION:
        raise packed_error(name, f"format version {version}, this version reads {FORMAT_VERSION}")
    parts = [by_name.get(inputs[place]) for place in (_MASK, _VALUES, _OFFSETS, _SCALES)]
    dense = tuple(part for part in parts if isinstance(part, DenseTensor))
    if len(dense) != len(parts):
        raise packed_error(name, "mask, values, offsets or scales are no constants of the file")
    mask, values, offsets, scales = dense
    types = (mask.dtype, offsets.dtype, scales.dtype)
    if types != (TensorProto.UINT8, TensorProto.INT64, TensorProto.FLOAT) or values.dtype not in _VALUE_TYPES:
        raise packed_error(name, "a part has another type than the format says")
    ranks = tuple(len(part.shape) for part in dense)
    if ranks != (2, 1, 1, 2):
        raise packed_error(name, f"parts of {', '.join(map(str, ranks))} axes, the format says 2, 1, 1, 2")
    columns, group_size = _integer(node, "columns", 0), _integer(node, "group_size", 0)
    if columns < 1 or mask.shape[1] != -(-columns // 8):
        raise packed_error(name, f"mask of shape {list(mask.shape)} for {columns} columns")
    if group_size < 0 or group_size % PIECE_COLUMNS:
        raise packed_error(name, f"groups of {group_size} columns")
    rows: tuple[int, ...] = (mask.shape[0],)
    if is_expert_product(node):
        expert_rows = _integer(node, "expert_rows", 0)
        if expert_rows < 1 or mask.shape[0] % expert_rows:
            raise packed_error(name, f"{mask.shape[0]} rows for experts of {expert_rows}")
        rows = (mask.shape[0] // expert_rows, expert_rows)
    own = dense if inputs[_SCALES] != NO_SCALES else dense[:3]
    return PackedTensor(
        name=name,
        shape=(*rows, columns),
        dtype=_VALUE_TYPES[values.dtype],
        stored_bytes=sum(part.stored_bytes for part in own),
        input_axis=-1,
        parts=(mask, values, offsets, scales),
        group_size=group_size,
    )


def _integer(node: onnx.NodeProto, name: str, default: int) -> int:
    found = (helper.get_attribute_value(a) for a in node.attribute if a.name == name)
    value = next(found, default)
    return value if isinstance(value, int) else default
