"""The packed format: one bit per weight, then the weights that are not zero. ``runtime/FORMAT.md`` has every byte.

A matrix W has N rows (outputs) and K columns (inputs). Both directions work strip by strip, so that the temporary
arrays stay small beside the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.errors import ExportError
from exporters.masks import BoolArray, nonzero_mask

FORMAT_VERSION = 1
STRIP_ROWS = 16  # rows between two offsets
PIECE_COLUMNS = 64  # columns whose int4 values begin at a whole byte
TAIL_BYTES = 64  # zeros behind the values, so that a kernel may load a whole vector at the last one
MAX_COLUMNS = 2**31 - 1
MAX_INT4 = 7  # -7 to 7
_STRIP_ELEMENTS = 2**20

# What the values are stored as, by the type that they stand for.
STORED_AS = {
    TensorProto.FLOAT: TensorProto.FLOAT,
    TensorProto.FLOAT16: TensorProto.FLOAT16,
    TensorProto.BFLOAT16: TensorProto.BFLOAT16,
    TensorProto.INT8: TensorProto.INT8,
    TensorProto.INT4: TensorProto.UINT8,
}


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix in the packed format.

    Attributes:
        mask: uint8 (N, ceil(K / 8)).
        values: (V,), 64 bytes of zeros at its end.
        offsets: int64 (ceil(N / 16) + 1,): elements of ``values`` before every sixteenth row.
        columns: K.
        int4: Whether an element of ``values`` holds two weights.
    """

    mask: NDArray[np.uint8]
    values: NDArray[np.generic]
    offsets: NDArray[np.int64]
    columns: int
    int4: bool


def pack_matrix(W: NDArray[np.generic], *, int4: bool = False) -> PackedMatrix:
    """Pack W (N, K): floats, or int8; with ``int4`` int8 from -7 to 7."""
    rows, columns = W.shape
    mask = np.empty((rows, -(-columns // 8)), np.uint8)
    elements = np.empty(rows, np.int64)  # of ``values``, per row
    pieces: list[NDArray[np.generic]] = []
    for strip in _strips(rows, columns):
        kept = nonzero_mask(W[strip])
        mask[strip] = np.packbits(kept, axis=1, bitorder="little")
        if int4:
            nibbles, elements[strip] = _int4_bytes(W[strip], kept)
            pieces.append(nibbles)
        else:
            pieces.append(W[strip][kept])
            elements[strip] = kept.sum(axis=1)
    dtype = np.dtype(np.uint8) if int4 else W.dtype
    pieces.append(np.zeros(TAIL_BYTES // dtype.itemsize, dtype))
    before = np.concatenate(([0], np.cumsum(elements)))
    offsets = before[[*range(0, rows, STRIP_ROWS), rows]]
    return PackedMatrix(mask, np.concatenate(pieces), offsets, columns, int4)


def unpack_matrix(packed: PackedMatrix, name: str) -> NDArray[np.generic]:
    """W (N, K): the stored numbers, int8 for int8 and int4 values; everything in the file is checked.

    Args:
        packed: Nothing in it is trusted but its types.
        name: Whose weight it is, for the error.

    Raises:
        ExportError: E-ONNX-PACKED.
    """
    rows = len(packed.mask)
    check_packed(packed, name)
    W = np.zeros((rows, packed.columns), np.int8 if packed.int4 else packed.values.dtype)
    for strip in _strips(rows, packed.columns):
        kept = _kept(packed, strip)
        begin = int(packed.offsets[strip.start // STRIP_ROWS])
        if packed.int4:
            places, nibble = _int4_places(kept)
            octets = packed.values[begin + places]
            W[strip][kept] = (octets.astype(np.int16) >> (4 * nibble) & 15).astype(np.int8) - 8
        else:
            W[strip][kept] = packed.values[begin : begin + int(np.count_nonzero(kept))]
    return W


def check_packed(packed: PackedMatrix, name: str) -> None:
    """Refuse tensors that do not fit each other.

    Raises:
        ExportError: E-ONNX-PACKED.
    """
    rows, offsets = len(packed.mask), packed.offsets
    if not 1 <= packed.columns <= MAX_COLUMNS or packed.mask.shape != (rows, -(-packed.columns // 8)):
        raise packed_error(name, f"mask of shape {list(packed.mask.shape)} for {packed.columns} columns")
    if packed.columns % 8 and bool((packed.mask[:, -1] >> (packed.columns % 8)).any()):
        raise packed_error(name, "bits behind the last column are not zero")
    if offsets.shape != (-(-rows // STRIP_ROWS) + 1,) or offsets[0] != 0:
        raise packed_error(name, f"offsets of shape {list(offsets.shape)} for {rows} rows, or not from 0")
    taken = np.zeros(len(offsets) - 1, np.int64)
    for strip in _strips(rows, packed.columns):
        kept = _kept(packed, strip)
        counts = _int4_counts(kept).sum(axis=1) if packed.int4 else kept.sum(axis=1)
        of_strip = np.arange(strip.start, min(strip.stop, rows)) // STRIP_ROWS
        np.add.at(taken, of_strip, counts)
    if not np.array_equal(np.diff(offsets), taken):
        raise packed_error(name, "offsets that are not what the mask takes")
    tail = TAIL_BYTES // packed.values.dtype.itemsize
    if packed.values.shape != (int(offsets[-1]) + tail,):
        raise packed_error(
            name, f"{packed.values.size} values, the mask takes {int(offsets[-1])} and {tail} zeros"
        )
    if packed.values[int(offsets[-1]) :].view(np.uint8).any():
        raise packed_error(name, "the zeros behind the values are not zero")


def packed_error(name: str, reason: str) -> ExportError:
    """The error for a packed weight whose parts make no sense."""
    return ExportError("E-ONNX-PACKED", f"{name}: packed weight: {reason}", "export the model again")


def value_elements(kept: BoolArray, *, int4: bool) -> int:
    """Elements of ``values`` for the kept places (N, K), without the zeros at the end."""
    if not int4:
        return int(np.count_nonzero(kept))
    return sum(int(_int4_counts(kept[strip]).sum()) for strip in _strips(*kept.shape))


def dequantize(q: NDArray[np.generic], scales: NDArray[np.float32], group_size: int) -> NDArray[np.float32]:
    """q * scale, float32 (N, K), for scales (N, G) of groups of ``group_size`` columns (0: whole rows)."""
    return np.asarray(q, np.float32) * spread_scales(scales, q.shape[1], group_size)


def spread_scales(scales: NDArray[np.float32], columns: int, group_size: int) -> NDArray[np.float32]:
    """Scales (N, G) as one per column, (N, K), or (N, 1) where a group is a whole row."""
    if not group_size:
        return scales
    return np.repeat(scales, group_size, axis=1)[:, :columns]


def groups_of(columns: int, group_size: int) -> int:
    """G: scales of a row."""
    return -(-columns // group_size) if group_size else 1


def _strips(rows: int, columns: int) -> Iterator[slice]:
    """Ranges of rows that begin where an offset stands."""
    step = STRIP_ROWS * max(1, _STRIP_ELEMENTS // (STRIP_ROWS * max(1, columns)))
    for start in range(0, rows, step):
        yield slice(start, start + step)


def _kept(packed: PackedMatrix, strip: slice) -> BoolArray:
    bits = np.unpackbits(packed.mask[strip], axis=1, count=packed.columns, bitorder="little")
    return bits.view(np.bool_)


def _in_pieces(kept: BoolArray) -> BoolArray:
    """(n, K) as (n, pieces, 64), the last piece filled up."""
    rows, columns = kept.shape
    filled = np.zeros((rows, math.ceil(columns / PIECE_COLUMNS) * PIECE_COLUMNS), np.bool_)
    filled[:, :columns] = kept
    return filled.reshape(rows, -1, PIECE_COLUMNS)


def _int4_counts(kept: BoolArray) -> NDArray[np.int64]:
    """Bytes of each piece, (n, pieces)."""
    return np.asarray((_in_pieces(kept).sum(axis=2, dtype=np.int64) + 1) // 2)


def _int4_places(kept: BoolArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For every kept weight in C order its byte, and whether it is the low (0) or the high half (1)."""
    pieces = _in_pieces(kept)
    counts = _int4_counts(kept).reshape(-1)
    begins = (np.cumsum(counts) - counts).reshape(pieces.shape[:2])
    ranks = np.cumsum(pieces, axis=2, dtype=np.int64) - 1
    ranks = ranks[pieces]
    return begins.repeat(pieces.sum(axis=2).reshape(-1)) + ranks // 2, ranks % 2


def _int4_bytes(q: NDArray[np.generic], kept: BoolArray) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The bytes of some rows, and how many each row takes."""
    counts = _int4_counts(kept)
    places, halves = _int4_places(kept)
    nibbles = np.full((int(counts.sum()), 2), 8, np.uint8)
    nibbles[places, halves] = (q[kept].astype(np.int16) + 8).astype(np.uint8)
    octets = np.asarray(nibbles[:, 0] | nibbles[:, 1] << 4, np.uint8)
    return octets, np.asarray(counts.sum(axis=1), np.int64)
