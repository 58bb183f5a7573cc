"""The packed format: its bytes, and what a reader refuses."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from packed_samples import FLOATS, LARGEST, runtime_packing, sample

from exporters.errors import ExportError
from exporters.packing import PackedMatrix, check_packed, pack_matrix, unpack_matrix, value_elements

KINDS = (*FLOATS, *LARGEST)
SHAPES = ((1, 1), (16, 64), (37, 70), (50, 200), (3, 8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_packing_agrees_with_the_runtime_byte_for_byte(kind: str, shape: tuple[int, int]) -> None:
    """Two implementations of the same page write the same bytes, and both give the matrix back."""
    made = sample(*shape, kind, sparsity=0.4)
    scales = None if kind in FLOATS else made.scales
    other = runtime_packing().pack(made.stored, kind, scales)
    for ours, theirs in (
        (made.packed.mask, other.mask),
        (made.packed.values, other.values),
        (made.packed.offsets, other.offsets),
    ):
        assert ours.tobytes() == theirs.tobytes()
        assert ours.shape == theirs.shape
    assert np.array_equal(unpack_matrix(made.packed, "w"), made.stored)
    tail = 64 // made.packed.values.itemsize
    assert value_elements(made.stored != 0, int4=kind == "int4") == len(made.packed.values) - tail


def test_packing_writes_the_bytes_that_the_page_describes() -> None:
    """Three int4 weights: the first in the low half of a byte, the unused half byte is 8, 64 zeros behind."""
    W = np.zeros((1, 70), np.int8)
    W[0, [1, 5, 69]] = -7, 3, 1
    packed = pack_matrix(W, int4=True)
    assert packed.mask.tolist() == [[0b100010, 0, 0, 0, 0, 0, 0, 0, 0b100000]]
    assert packed.values.tolist() == [11 << 4 | 1, 8 << 4 | 9, *[0] * 64]
    assert packed.offsets.tolist() == [0, 2]


def test_packing_takes_negative_zero_for_zero() -> None:
    """What a mask leaves out is zero, with either sign."""
    packed = pack_matrix(np.array([[-0.0, 1.0]], np.float32))
    assert packed.mask.tolist() == [[0b10]]


def _longer(packed: PackedMatrix) -> PackedMatrix:
    return replace(packed, values=np.append(packed.values, np.int8(0)))


def _changed(packed: PackedMatrix, name: str, place: tuple[int, ...] | int, value: int) -> PackedMatrix:
    array = getattr(packed, name).copy()
    array[place] = value
    return replace(packed, **{name: array})


DAMAGES = {
    "bit behind the last column": lambda p: _changed(p, "mask", (3, -1), 0xFF),
    "bit more than values": lambda p: _changed(p, "mask", (0, 0), p.mask[0, 0] ^ 1),
    "offset moved": lambda p: _changed(p, "offsets", 1, p.offsets[1] + 1),
    "offset falls": lambda p: _changed(p, "offsets", 1, -1),
    "offsets from 1": lambda p: replace(p, offsets=p.offsets + 1),
    "offset missing": lambda p: replace(p, offsets=p.offsets[:-1]),
    "values cut": lambda p: replace(p, values=p.values[:-1]),
    "value more": _longer,
    "end not zero": lambda p: _changed(p, "values", -1, 1),
    "columns wrong": lambda p: replace(p, columns=p.columns + 8),
    "no columns": lambda p: replace(p, columns=0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_packing_refuses_parts_that_do_not_fit(damage: str) -> None:
    """A mask, offset or length that leads elsewhere is found before a value is read."""
    packed = sample(20, 70, "int8").packed
    check_packed(packed, "w")
    with pytest.raises(ExportError) as refused:
        unpack_matrix(DAMAGES[damage](packed), "w")
    assert refused.value.error_id == "E-ONNX-PACKED"
