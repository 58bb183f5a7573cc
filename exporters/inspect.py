"""What an .onnx file consists of: per weight its zeros, its N:M pattern and its bytes by encoding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.encoding import census_of_mask, encoding_bytes, used_encodings
from exporters.fragments import dtype_name
from exporters.manifest import Encoding
from exporters.masks import BoolArray
from exporters.read import OnnxFile, read_model
from exporters.stored import StoredTensor

GROUP_LENGTHS = (4, 8, 16, 32)
_FULL_GROUPS = 0.9  # share of the places a pattern leaves that must hold values, to tell it from chance


@dataclass(frozen=True)
class WeightRow:
    """One weight of a model file.

    Attributes:
        name: Initializer name.
        shape: Shape as stored, for a linear's weight often (in, out) where PyTorch has (out, in); (out, in) if packed.
        dtype: Numpy's name of the type.
        encoding: How it is stored.
        nnz: Elements that are not zero.
        sparsity: Share of zeros.
        pattern: N:M pattern that holds ("2:4": at most 2 of each 4 are not zero), "" when none does.
        pattern_axis: Axis along which the pattern holds, -1 or -2; None without a pattern.
        input_axis: Axis along which the linear's inputs run, -1 or -2; None where the graph does not tell.
        stored_bytes: Bytes in the files, header included.
        bytes_by_encoding: Exact bytes for ``dense``, ``sparse`` (absent where not possible), ``packed`` (where it
            is) and ``bitmask`` (no more than an estimate); for the encoding in use the bytes found.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    encoding: Encoding
    nnz: int
    sparsity: float
    pattern: str
    pattern_axis: int | None
    input_axis: int | None
    stored_bytes: int
    bytes_by_encoding: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """A model file: its weights and their totals.

    Attributes:
        file: Name of the .onnx file.
        file_bytes: Size of the .onnx file and of each data file, by name.
        metadata: The file's ``metadata_props``.
        weights: Constants with at least two sides longer than one.
        other_tensors: Number of the other constants: vectors and single numbers.
        other_bytes: Their bytes in the files.
    """

    file: str
    file_bytes: Mapping[str, int]
    metadata: Mapping[str, str]
    weights: tuple[WeightRow, ...]
    other_tensors: int
    other_bytes: int

    @property
    def elements(self) -> int:
        """Elements of all weights."""
        return sum(math.prod(row.shape) for row in self.weights)

    @property
    def nnz(self) -> int:
        """Elements of all weights that are not zero."""
        return sum(row.nnz for row in self.weights)

    @property
    def sparsity(self) -> float:
        """Share of zeros over all weights; 0 without weights."""
        return 1 - self.nnz / self.elements if self.elements else 0.0

    @property
    def tensors_by_encoding(self) -> dict[str, int]:
        """Number of weights by the encoding in use."""
        kinds = used_encodings(row.encoding for row in self.weights)
        return {kind: sum(row.encoding == kind for row in self.weights) for kind in kinds}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all weights in the files."""
        return sum(row.stored_bytes for row in self.weights)

    @property
    def bytes_by_encoding(self) -> dict[str, int]:
        """Bytes of all weights if all used one encoding; a weight that cannot be sparse counts dense."""
        return {
            kind: sum(row.bytes_by_encoding.get(kind, row.bytes_by_encoding["dense"]) for row in self.weights)
            for kind in (*used_encodings(row.encoding for row in self.weights), "bitmask")
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, totals included, as values that JSON has."""
        totals = {
            "elements": self.elements,
            "nnz": self.nnz,
            "sparsity": self.sparsity,
            "tensors_by_encoding": self.tensors_by_encoding,
            "stored_bytes": self.stored_bytes,
            "bytes_by_encoding": self.bytes_by_encoding,
        }
        return {**dataclasses.asdict(self), "totals": totals}


def inspect_model(path: Path, progress: Callable[[int, int], None] | None = None) -> Inspection:
    """The weights of any .onnx file and their totals; one weight is in memory at a time.

    Args:
        path: The file; its external data lies beside it.
        progress: Called with (constants read, constants in all).

    Raises:
        ExportError: As ``read_model``.
    """
    model = read_model(path)
    weights, others = [], []
    for done, tensor in enumerate(model.tensors, start=1):
        if math.prod(tensor.shape) and sum(side > 1 for side in tensor.shape) >= 2:
            weights.append(_row(tensor, f"{model.path.name}.data"))
        else:
            others.append(tensor)
        if progress is not None:
            progress(done, len(model.tensors))
    return Inspection(
        file=model.path.name,
        file_bytes=_file_bytes(model),
        metadata=model.metadata,
        weights=tuple(weights),
        other_tensors=len(others),
        other_bytes=sum(tensor.stored_bytes for tensor in others),
    )


def find_pattern(nonzero: BoolArray, axes: Iterable[int]) -> tuple[str, int | None]:
    """The N:M pattern that holds along one of ``axes``, and that axis; ("", None) when none does.

    Groups of 4, 8, 16 and 32 are tried, shortest first, with the smallest N that holds. Few values in a
    matrix keep to many patterns by chance, so nine tenths of the places that N:M leaves must hold values.
    """
    nnz = int(np.count_nonzero(nonzero))
    if nnz == nonzero.size:
        return "", None
    for length in GROUP_LENGTHS:
        for axis in axes:
            kept = _most_kept(nonzero, axis, length)
            if 0 < kept < length and nnz >= _FULL_GROUPS * nonzero.size * kept / length:
                return f"{kept}:{length}", axis
    return "", None


def _most_kept(nonzero: BoolArray, axis: int, length: int) -> int:
    """The most values in any group of ``length`` along ``axis``; ``length`` where groups do not divide it."""
    side = nonzero.shape[axis]
    if not nonzero.size or side % length:
        return length
    position = nonzero.ndim + axis
    grouped = nonzero.reshape(*nonzero.shape[:position], -1, length, *nonzero.shape[position + 1 :])
    return int(grouped.sum(axis=position + 1, dtype=np.uint8).max())


def _row(tensor: StoredTensor, location: str) -> WeightRow:
    """The row of one weight; ``location`` names the data file that encodings not in use would need."""
    nonzero = tensor.nonzero()
    census = census_of_mask(tensor.name, tensor.dtype, nonzero)
    axes = (tensor.input_axis,) if tensor.input_axis is not None else (-1, -2)
    pattern, pattern_axis = find_pattern(nonzero, axes)
    return WeightRow(
        name=tensor.name,
        shape=tensor.shape,
        dtype=dtype_name(tensor.dtype),
        encoding=tensor.encoding,
        nnz=census.nnz,
        sparsity=1 - census.nnz / census.size,
        pattern=pattern,
        pattern_axis=pattern_axis,
        input_axis=tensor.input_axis,
        stored_bytes=tensor.stored_bytes,
        bytes_by_encoding={**encoding_bytes(census, location), tensor.encoding: tensor.stored_bytes},
    )


def _file_bytes(model: OnnxFile) -> dict[str, int]:
    """Size of the model file and of each data file that a constant names."""
    paths = {model.path.name: model.path}
    for tensor in model.tensors:
        paths |= {str(path.relative_to(model.path.parent)): path for path in tensor.data_files}
    return {name: path.stat().st_size for name, path in paths.items()}
