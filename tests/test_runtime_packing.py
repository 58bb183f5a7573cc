"""The packed format: its bytes, what it refuses, and that nothing is lost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from runtime_samples import DTYPES, random_packed

from blockpress_runtime.packing import PackedMatrix, PackingError, ValueType, check, dequantize, pack, unpack


def slow_tensors(weights: Any, dtype: ValueType) -> tuple[list[int], list[int], list[int]]:
    """Mask bytes, stored elements and offsets as FORMAT.md describes them, weight by weight; integers only."""
    rows, columns = weights.shape
    mask, elements, offsets = [], [], [0]
    for n in range(rows):
        row_bytes = [0] * -(-columns // 8)
        for start in range(0, columns, 64):
            piece = []
            for k in range(start, min(columns, start + 64)):
                if weights[n, k] != 0:
                    row_bytes[k // 8] |= 1 << (k % 8)
                    piece.append(int(weights[n, k]))
            if dtype == "int4":
                halves = [q + 8 for q in piece] + [8] * (len(piece) % 2)
                piece = [halves[i] + 16 * halves[i + 1] for i in range(0, len(halves), 2)]
            elements += piece
        mask += row_bytes
        if n % 16 == 15 or n == rows - 1:
            offsets.append(len(elements))
    return mask, elements, offsets


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (16, 64), (17, 65), (33, 130), (40, 200)])
def test_packing_is_that_of_the_format_byte_by_byte(dtype: ValueType, shape: tuple[int, int]) -> None:
    """Mask, values, padding and offsets are those of a loop over the weights."""
    stored = unpack(random_packed(*shape, dtype))
    packed = pack(stored, dtype)
    mask, elements, offsets = slow_tensors(stored, dtype)
    assert packed.mask.ravel().tolist() == mask
    assert packed.values.tolist() == elements + [0] * 64
    assert packed.offsets.tolist() == offsets


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.02, 0.5, 1.0])
def test_unpacking_gives_back_every_weight(dtype: ValueType, density: float) -> None:
    """What was packed comes back bit for bit, at every value type and density."""
    for rows, columns in ((1, 1), (3, 64), (18, 63), (50, 257)):
        packed = random_packed(rows, columns, dtype, density=density)
        weights = unpack(packed)
        assert np.array_equal(unpack(pack(weights, dtype)), weights)
        assert np.count_nonzero(weights) == np.unpackbits(packed.mask).sum()


def test_blocks_of_rows_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    """A matrix that is packed in many blocks of rows has the bytes of one that is packed at once."""
    for dtype in DTYPES:
        whole = random_packed(100, 130, dtype)
        weights = unpack(whole)
        monkeypatch.setattr("blockpress_runtime.packing._BLOCK_WEIGHTS", 1)
        parts = pack(weights, dtype)
        assert parts.values.tobytes() == whole.values.tobytes()
        assert np.array_equal(parts.offsets, whole.offsets)
        assert np.array_equal(unpack(parts), weights)
        monkeypatch.undo()


def test_bfloat16_is_taken_as_bits_floats_and_ml_dtypes() -> None:
    """The three ways to hold bfloat16 weights in numpy pack to the same bytes; -0.0 is not stored."""
    floats = np.array([[1.5, 0.0, -2.0, -0.0, float("nan")]], np.float32)
    native = floats.astype(ml_dtypes.bfloat16)
    packs = [pack(weights, "bfloat16") for weights in (floats, native, native.view(np.uint16))]
    assert len({packed.values.tobytes() for packed in packs}) == 1
    assert packs[0].mask.tolist() == [[0b10101]]
    assert packs[0].values[:2].tolist() == [0x3FC0, 0xC000]


def test_scales_multiply_the_groups() -> None:
    """A weight is its integer times the scale of its row and group."""
    weights = np.ones((2, 130), np.int64)
    scales = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    dense = dequantize(pack(weights, "int8", scales, 64))
    assert dense[0].tolist() == [1.0] * 64 + [2.0] * 64 + [3.0] * 2
    assert dense[1].tolist() == [4.0] * 64 + [5.0] * 64 + [6.0] * 2
    assert (dequantize(pack(weights, "int8", np.full((1, 1), 7.0), 64)) == 7).all()


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "vector": ((np.ones(3), "float32"), "a matrix"),
    "no columns": ((np.ones((3, 0)), "float32"), "at least one column"),
    "unknown type": ((np.ones((3, 3)), "float64"), "value type"),
    "inexact float16": ((np.full((1, 1), 0.1, np.float32), "float16"), "not exact in float16"),
    "overflow": ((np.full((1, 1), 1e6, np.float32), "float16"), "not exact in float16"),
    "inexact bfloat16": ((np.full((1, 1), 0.1, np.float32), "bfloat16"), "not exact in bfloat16"),
    "integers as floats": ((np.ones((1, 1), np.int8), "float32"), "takes floats"),
    "floats as integers": ((np.ones((1, 1)), "int8"), "takes integers"),
    "-128": ((np.full((1, 1), -128), "int8"), "from -127 to 127"),
    "8 as int4": ((np.full((1, 1), 8), "int4"), "from -7 to 7"),
    "group of 32": ((np.ones((1, 64), np.int8), "int8", np.ones((1, 2)), 32), "multiple of 64"),
    "scales of other rows": (
        (np.ones((3, 64), np.int8), "int8", np.ones((2, 1))),
        "scales must have the shape",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_packing_refuses_what_the_format_cannot_hold(case: str) -> None:
    """The error says what was expected."""
    arguments, message = REFUSED[case]
    with pytest.raises(PackingError, match=message):
        pack(*arguments)


def broken(packed: PackedMatrix, tensor: str) -> PackedMatrix:
    """The matrix with one tensor that no longer fits the others."""
    array = getattr(packed, tensor).copy()
    if tensor == "mask":
        array[-1, -1] |= 0x80
    elif tensor == "offsets":
        array[1] += 1
    else:
        array = array[:-1]
    return replace(packed, **{tensor: array})


@pytest.mark.parametrize("tensor", ["mask", "values", "offsets", "scales"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_unpacking_refuses_tensors_that_do_not_fit(dtype: ValueType, tensor: str) -> None:
    """A bit past the last column, an offset, a length or a shape that is wrong is found before anything is read."""
    packed = random_packed(20, 70, dtype, group_size=64)
    packed = replace(packed, scales=np.ones((20, 2), np.float32), group_size=64)
    check(packed)
    with pytest.raises(PackingError, match=tensor):
        unpack(broken(packed, tensor))
