"""The packed format of FORMAT.md in numpy: one bit per weight and the non-zero values. Its reference implementation.

packed = pack(weights, "int8", scales)
assert (unpack(packed) == weights).all()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
ValueType = Literal["float32", "float16", "bfloat16", "int8", "int4"]

STRIP_ROWS = 16
PIECE_COLUMNS = 64
PADDING_BYTES = 64

_MAX_COLUMNS = 2**31 - 1
_LARGEST = {"int8": 127, "int4": 7}
# numpy knows no bfloat16 and no int4: the bits of the one are held as uint16, two of the other in a uint8.
_STORED: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "int4": np.uint8,
}
_BLOCK_WEIGHTS = 1 << 22  # weights that are worked on at once: what bounds the memory beside the result
_BITS = np.array([byte.bit_count() for byte in range(256)], np.uint8)


class PackingError(ValueError):
    """A matrix that the format cannot hold, or tensors that break its rules."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix W (rows, columns) as the tensors of FORMAT.md.

    Attributes:
        columns: Columns of W.
        dtype: What a stored value is.
        group_size: Columns that share a scale; 0 for a whole row.
        mask: uint8 (rows, ⌈columns / 8⌉).
        values: (V,): float32, float16, uint16 (the bits of bfloat16), int8, or uint8 (two int4 each).
        offsets: int64 (⌈rows / 16⌉ + 1,).
        scales: float32 (rows, groups), or (1, 1).
    """

    columns: int
    dtype: ValueType
    group_size: int
    mask: NDArray[np.uint8]
    values: Array
    offsets: NDArray[np.int64]
    scales: NDArray[np.float32]

    @property
    def rows(self) -> int:
        """Rows of W."""
        return int(self.mask.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the four tensors."""
        return self.mask.nbytes + self.values.nbytes + self.offsets.nbytes + self.scales.nbytes


def pack(weights: Array, dtype: ValueType, scales: Array | None = None, group_size: int = 0) -> PackedMatrix:
    """The matrix W in the packed format; nothing is rounded.

    Args:
        weights: (rows, columns). For the float types floats that the type holds exactly; for bfloat16 also uint16, its
            bits. For int8 integers from -127 to 127, for int4 from -7 to 7. Zeros (-0.0 too) are not stored.
        dtype: What a stored value is.
        scales: (rows, ⌈columns / group_size⌉), or (1, 1): by what the stored values are multiplied; by 1 without them.
        group_size: Columns that share a scale, a multiple of 64; 0 for a whole row.

    Raises:
        PackingError: The format cannot hold it, and why.
    """
    if dtype not in get_args(ValueType):
        raise PackingError(f"the value type must be one of {', '.join(get_args(ValueType))}, not {dtype!r}")
    if weights.ndim != 2 or not 1 <= weights.shape[1] <= _MAX_COLUMNS:
        raise PackingError(f"a matrix of at least one column was expected, got the shape {weights.shape}")
    rows, columns = weights.shape
    row_scales = np.ones((1, 1), np.float32) if scales is None else np.ascontiguousarray(scales, np.float32)
    _check_scales(row_scales.shape, rows, columns, group_size)

    mask = np.empty((rows, -(-columns // 8)), np.uint8)
    strip_elements = np.zeros(-(-rows // STRIP_ROWS), np.int64)
    chunks: list[Array] = []
    for block in _row_blocks(rows, columns):
        stored = _stored(weights[block], dtype)
        # -0.0 of bfloat16 is the one zero that its bits do not show.
        nonzero = (stored & 0x7FFF) != 0 if dtype == "bfloat16" else stored != 0
        mask[block] = np.packbits(nonzero, axis=1, bitorder="little")
        chunks.append(_int4_pieces(stored, nonzero) if dtype == "int4" else stored[nonzero])
        strips = slice(block.start // STRIP_ROWS, -(-block.stop // STRIP_ROWS))
        starts = np.arange(0, block.stop - block.start, STRIP_ROWS)
        strip_elements[strips] = np.add.reduceat(_row_elements(mask[block], dtype), starts)
    padding = PADDING_BYTES // np.dtype(_STORED[dtype]).itemsize
    values = np.concatenate([*chunks, np.zeros(padding, _STORED[dtype])])
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(strip_elements)])
    return PackedMatrix(columns, dtype, group_size, mask, values, offsets, row_scales)


def unpack(packed: PackedMatrix) -> Array:
    """The stored values where they belong, zeros elsewhere: (rows, columns), not multiplied by the scales.

    In the type of ``values``; int8 for int4, uint16 (bits) for bfloat16.

    Raises:
        PackingError: The tensors break a rule of the format.
    """
    check(packed)
    weights = np.zeros(
        (packed.rows, packed.columns), np.int8 if packed.dtype == "int4" else packed.values.dtype
    )
    for block in _row_blocks(packed.rows, packed.columns):
        first, last = packed.offsets[[block.start // STRIP_ROWS, -(-block.stop // STRIP_ROWS)]]
        values = packed.values[first:last]
        bits = np.unpackbits(packed.mask[block], axis=1, count=packed.columns, bitorder="little").view(
            np.bool_
        )
        if packed.dtype == "int4":
            weights[block] = _from_int4_pieces(values, bits)
        else:
            weights[block][bits] = values
    return weights


def dequantize(packed: PackedMatrix) -> NDArray[np.float32]:
    """W in float32: the stored values times their scales.

    Raises:
        PackingError: The tensors break a rule of the format.
    """
    stored = unpack(packed)
    if packed.dtype == "bfloat16":
        weights = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        weights = stored.astype(np.float32)
    groups = packed.scales.shape[1]
    if groups == 1:
        return weights * packed.scales
    for group in range(groups):
        columns = slice(group * packed.group_size, (group + 1) * packed.group_size)
        weights[:, columns] *= packed.scales[:, group : group + 1]
    return weights


def check(packed: PackedMatrix) -> None:
    """Do nothing where the tensors keep every rule that FORMAT.md tells a reader to check.

    Raises:
        PackingError: The first rule that they break.
    """
    rows, columns = packed.rows, packed.columns
    if packed.dtype not in get_args(ValueType):
        raise PackingError(
            f"the value type must be one of {', '.join(get_args(ValueType))}, not {packed.dtype!r}"
        )
    if not 1 <= columns <= _MAX_COLUMNS:
        raise PackingError(f"columns must be from 1 to {_MAX_COLUMNS}, not {columns}")
    _check_tensor("mask", packed.mask, np.uint8, 2)
    _check_tensor("values", packed.values, _STORED[packed.dtype], 1)
    _check_tensor("offsets", packed.offsets, np.int64, 1)
    _check_tensor("scales", packed.scales, np.float32, 2)
    if packed.mask.shape[1] != -(-columns // 8):
        raise PackingError(f"mask must have {-(-columns // 8)} bytes in a row, has {packed.mask.shape[1]}")
    _check_scales(packed.scales.shape, rows, columns, packed.group_size)
    if columns % 8 and (packed.mask[:, -1] >> (columns % 8)).any():
        raise PackingError(f"mask has bits set beyond the {columns} columns")
    expected = _offsets(packed.mask, packed.dtype)
    if packed.offsets.shape != expected.shape or (packed.offsets != expected).any():
        raise PackingError("offsets are not those that the bits of mask give")
    padding = PADDING_BYTES // packed.values.itemsize
    if len(packed.values) != int(expected[-1]) + padding:
        raise PackingError(
            f"values must have {int(expected[-1])} elements and {padding} of padding, has {len(packed.values)}"
        )


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole strips, each of about _BLOCK_WEIGHTS weights."""
    height = max(1, _BLOCK_WEIGHTS // (columns * STRIP_ROWS)) * STRIP_ROWS
    for start in range(0, rows, height):
        yield slice(start, min(rows, start + height))


def _check_tensor(name: str, tensor: Array, dtype: type[np.generic], axes: int) -> None:
    if tensor.dtype != dtype or tensor.ndim != axes:
        raise PackingError(
            f"{name} must be {np.dtype(dtype)} with {axes} axes, is {tensor.dtype} with {tensor.ndim}"
        )


def _check_scales(shape: tuple[int, ...], rows: int, columns: int, group_size: int) -> None:
    if group_size < 0 or group_size % PIECE_COLUMNS:
        raise PackingError(f"group_size must be 0 or a multiple of {PIECE_COLUMNS}, not {group_size}")
    groups = -(-columns // group_size) if group_size else 1
    if shape not in ((rows, groups), (1, 1)):
        raise PackingError(f"scales must have the shape ({rows}, {groups}) or (1, 1), not {shape}")


def _stored(weights: Array, dtype: ValueType) -> Array:
    """The weights in the type in which they are stored (int8 for int4)."""
    if dtype in _LARGEST:
        largest = _LARGEST[dtype]
        if not np.issubdtype(weights.dtype, np.integer):
            raise PackingError(f"{dtype} takes integers, got {weights.dtype}")
        if weights.size and (weights.min() < -largest or weights.max() > largest):
            raise PackingError(f"{dtype} takes integers from -{largest} to {largest}")
        return weights.astype(np.int8)
    if dtype == "bfloat16":
        return _bfloat16_bits(weights)
    if not np.issubdtype(weights.dtype, np.floating) and weights.dtype.name != "bfloat16":
        raise PackingError(f"{dtype} takes floats, got {weights.dtype}")
    with np.errstate(over="ignore"):
        stored = weights.astype(_STORED[dtype])
    if stored.dtype != weights.dtype and not np.array_equal(
        stored.astype(weights.dtype), weights, equal_nan=True
    ):
        raise PackingError(f"the weights ({weights.dtype}) are not exact in {dtype}: round them first")
    return stored


def _bfloat16_bits(weights: Array) -> NDArray[np.uint16]:
    """The bits of bfloat16 weights: given as such, as ml_dtypes' type, or as floats that it holds exactly."""
    if weights.dtype == np.uint16:
        return weights
    if weights.dtype.name == "bfloat16":
        return weights.view(np.uint16)
    bits = _stored(weights, "float32").view(np.uint32)
    if (bits & 0xFFFF).any():
        raise PackingError(f"the weights ({weights.dtype}) are not exact in bfloat16: round them first")
    return (bits >> 16).astype(np.uint16)


def _row_elements(mask: NDArray[np.uint8], dtype: ValueType) -> NDArray[np.int64]:
    """Elements of ``values`` that each row takes."""
    counts = _BITS[mask]
    if dtype != "int4":
        return np.asarray(counts.sum(axis=1, dtype=np.int64))
    piece_bytes = PIECE_COLUMNS // 8
    starts = np.arange(0, mask.shape[1], piece_bytes)
    in_pieces = np.add.reduceat(counts, starts, axis=1)  # at most 64 each
    return np.asarray(((in_pieces + 1) // 2).sum(axis=1, dtype=np.int64))


def _offsets(mask: NDArray[np.uint8], dtype: ValueType) -> NDArray[np.int64]:
    """What ``offsets`` must be."""
    rows, row_bytes = mask.shape
    blocks = [_row_elements(mask[block], dtype) for block in _row_blocks(rows, row_bytes * 8)]
    offsets = np.zeros(-(-rows // STRIP_ROWS) + 1, np.int64)
    if rows:
        elements = np.concatenate(blocks)
        offsets[1:] = np.cumsum(np.add.reduceat(elements, np.arange(0, rows, STRIP_ROWS)))
    return offsets


def _with_fillers(bits: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The bits in pieces (pieces, 65): 64 columns, and whether the piece ends with an unused half byte."""
    rows, columns = bits.shape
    pieces = -(-columns // PIECE_COLUMNS)
    padded = np.zeros((rows, pieces * PIECE_COLUMNS), np.bool_)
    padded[:, :columns] = bits
    padded = padded.reshape(-1, PIECE_COLUMNS)
    odd = np.count_nonzero(padded, axis=1) % 2 == 1
    return np.concatenate([padded, odd[:, None]], axis=1)


def _int4_pieces(weights: NDArray[np.int8], nonzero: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The bytes of int4 weights (rows, columns)."""
    rows, columns = weights.shape
    used = _with_fillers(nonzero)
    halves = np.zeros((rows, len(used) // rows * PIECE_COLUMNS), np.int8)
    halves[:, :columns] = weights
    filled = np.zeros(used.shape, np.int8)  # a filler is the half byte of 0
    filled[:, :PIECE_COLUMNS] = halves.reshape(-1, PIECE_COLUMNS)
    nibbles = (filled[used] + 8).astype(np.uint8)
    return np.asarray(nibbles[0::2] | nibbles[1::2] << 4)


def _from_int4_pieces(values: NDArray[np.uint8], nonzero: NDArray[np.bool_]) -> NDArray[np.int8]:
    """The int4 weights (rows, columns) of their bytes."""
    rows, columns = nonzero.shape
    used = _with_fillers(nonzero)
    nibbles = np.empty(2 * len(values), np.int8)
    nibbles[0::2] = (values & 15).astype(np.int8) - 8
    nibbles[1::2] = (values >> 4).astype(np.int8) - 8
    filled = np.zeros(used.shape, np.int8)
    filled[used] = nibbles
    return filled[:, :PIECE_COLUMNS].reshape(rows, -1)[:, :columns]
