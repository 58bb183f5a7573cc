"""The operators of two and three weights: what the operator of one gives for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from runtime_samples import (
    Floats,
    attributes_of,
    model_of_several,
    multiply,
    needs_library,
    open_session,
    random_packed,
    tensors_of,
)

from blockpress_runtime.packing import PackedMatrix, ValueType

pytestmark = needs_library

COLUMNS = 130


def some_rows(count: int, columns: int = COLUMNS) -> Floats:
    return np.random.default_rng(1).standard_normal((count, columns)).astype(np.float32)


def matrices(
    rows: tuple[int, ...], columns: int = COLUMNS, dtypes: Sequence[ValueType] = ("int8",) * 3
) -> list[PackedMatrix]:
    return [random_packed(n, columns, dtype, seed=n) for n, dtype in zip(rows, dtypes, strict=False)]


def check_same(packed: list[PackedMatrix], x: Floats, bits: int, threads: int = 1) -> None:
    """The bits that each matrix gives alone, the second one with a bias."""
    biases = [some_rows(1, matrix.rows)[0] if number == 1 else None for number, matrix in enumerate(packed)]
    weights = [tensors_of(matrix, bias) for matrix, bias in zip(packed, biases, strict=True)]
    session = open_session(model_of_several(weights, attributes_of(packed[0], bits)), threads)
    results = session.run(None, {"x": x})
    assert len(results) == len(packed)
    for y, matrix, bias in zip(results, packed, biases, strict=True):
        np.testing.assert_array_equal(y, multiply(x, matrix, bias, bits))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("rows", [(20, 37), (16, 1, 48), (0, 40, 3), (0, 0, 0)])
def test_each_weight_gives_what_it_gives_alone(rows: tuple[int, ...], bits: int) -> None:
    """Any numbers of rows, none too, with few and many rows of x, and with none."""
    packed = matrices(rows)
    for count in (1, 5, 17, 0):
        check_same(packed, some_rows(count), bits)


def test_weights_may_be_of_different_types() -> None:
    """Each weight says its own."""
    check_same(matrices((20, 21, 22), dtypes=("float32", "bfloat16", "float16")), some_rows(3), 32)
    check_same(matrices((20, 33), dtypes=("int8", "int4")), some_rows(6), 8)


@pytest.mark.parametrize("count", [1, 40])
def test_threads_share_the_strips_of_all_weights(count: int) -> None:
    """So many weights that tasks begin in one matrix and end in the next: the same bits."""
    check_same(matrices((403, 1100, 37), 1024), some_rows(count, 1024), 8, threads=2)


def test_weights_that_are_fed_give_the_same() -> None:
    """A tensor that comes with every call: the weights are then checked at every call."""
    packed = matrices((20, 37))
    weights = [tensors_of(matrix) for matrix in packed]
    x = some_rows(2)
    session = open_session(model_of_several(weights, attributes_of(packed[0]), fed=("mask2",)))
    for y, matrix in zip(session.run(None, {"x": x, "mask2": packed[1].mask}), packed, strict=True):
        np.testing.assert_array_equal(y, multiply(x, matrix))
    broken = packed[1].mask.copy()
    broken[0, 0] ^= 1
    with pytest.raises(Exception, match=r"SparseMatMul2: weight 2 of 2: offsets\[1\] must be"):
        session.run(None, {"x": x, "mask2": broken})


@pytest.mark.parametrize(("rows", "number"), [((20, 37), 2), ((20, 37, 5), 3)])
def test_broken_weight_is_named_when_the_model_is_loaded(rows: tuple[int, ...], number: int) -> None:
    """Each weight is checked, and has the columns of the operator."""
    packed = matrices(rows)
    packed[number - 1] = random_packed(7, COLUMNS + 8, "int8")
    weights = [tensors_of(matrix) for matrix in packed]
    with pytest.raises(
        Exception, match=f"SparseMatMul{number}: weight {number} of {number}: mask must have 17 bytes"
    ):
        open_session(model_of_several(weights, attributes_of(packed[0])))
