"""The operator's numbers, against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from runtime_samples import (
    DTYPES,
    Floats,
    attributes_of,
    exact_product,
    model_of,
    multiply,
    needs_library,
    open_session,
    random_packed,
    rounded_rows,
    tensors_of,
)

from blockpress_runtime.packing import PackedMatrix, ValueType, pack

pytestmark = needs_library

TOLERANCE = 1e-6  # of the sum of |w||x|: float32 sums of some hundred terms stay well within
SHAPES = [(1, 1), (3, 7), (15, 64), (16, 65), (17, 128), (31, 130), (100, 255), (256, 256), (300, 300)]


def some_rows(count: int, columns: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((count, columns)).astype(np.float32)


def largest_error(y: Any, x: Any, packed: PackedMatrix, bias: Floats | None = None) -> float:
    exact, terms = exact_product(x, packed, bias)
    assert y.shape == exact.shape
    assert y.dtype == np.float32
    return float((np.abs(y - exact) / np.maximum(terms, 1e-30)).max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_decoded_weights(dtype: ValueType, shape: tuple[int, int]) -> None:
    """Any shape and value type, one row of x and several, with bias: what float64 gives."""
    packed = random_packed(*shape, dtype)
    bias = some_rows(1, shape[0], seed=1)[0]
    for count in (1, 5, 17):
        x = some_rows(count, shape[1])
        assert largest_error(multiply(x, packed, bias), x, packed, bias) <= TOLERANCE


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", [0.0, 0.01, 0.99, 1.0])
def test_product_at_every_density(dtype: ValueType, density: float) -> None:
    """Empty and full matrices, and nearly so."""
    packed = random_packed(33, 200, dtype, density=density)
    x = some_rows(3, 200)
    assert largest_error(multiply(x, packed), x, packed) <= TOLERANCE


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("group_size", [0, 64, 128])
def test_rounded_activations_are_multiplied_exactly(dtype: ValueType, group_size: int) -> None:
    """With 8 activation bits, y is the product of the integers that the format says, but for float32's rounding."""
    packed = random_packed(50, 300, dtype, group_size=group_size)
    x = some_rows(6, 300)
    x[2] = 0
    integers, step = rounded_rows(x)
    y = multiply(x, packed, activation_bits=8)
    assert largest_error(y, integers * step.astype(np.float64), packed) <= TOLERANCE


@pytest.mark.parametrize("rows", [5, 16, 600])
@pytest.mark.parametrize("low", [100, -127])
def test_weights_of_the_largest_size_do_not_overflow(rows: int, low: int) -> None:
    """Products that no int16 holds two of, with few and many rows of x, of x's largest size too: exact all the same."""
    generator = np.random.default_rng(0)
    W = generator.integers(low, 128, (37, 4200)).astype(np.int8)
    W[generator.random(W.shape) < 0.3] = 0
    packed = pack(W, "int8", np.full((37, 1), 0.01, np.float32))
    x = generator.choice([-127.0, 127.0], (rows, 4200)).astype(np.float32)
    x[::2] = np.sign(W[0]) * 127.0 + (W[0] == 0)
    assert largest_error(multiply(x, packed, activation_bits=8), x, packed) <= TOLERANCE


def test_ties_round_to_even() -> None:
    """Halves between two integers go to the even one, at a step of exactly 1."""
    packed = random_packed(1, 64, "int8", density=1.0)
    x = np.zeros((64, 64), np.float32)
    x[:, 0] = 127
    for row in range(1, 64):
        x[row, row] = row - 32.5
    integers, step = rounded_rows(x)
    assert (step == 1).all()
    assert integers[1, 1] == -32
    y = multiply(x, packed, activation_bits=8)
    assert largest_error(y, integers, packed) <= TOLERANCE


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_rounded_row_that_is_not_finite_gives_nan(value: float) -> None:
    """NaN or infinity in a row makes all its outputs NaN, and those of no other row."""
    packed = random_packed(20, 70, "int8")
    x = some_rows(3, 70)
    x[1, 69] = value
    y = multiply(x, packed, activation_bits=8)
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 1, 4), (0,), (2, 0, 3)])
def test_leading_axes_are_kept(leading: tuple[int, ...]) -> None:
    """x of any rank, with no rows too, gives y of the same leading axes."""
    packed = random_packed(20, 70, "float32")
    x = some_rows(int(np.prod(leading, dtype=int)), 70).reshape(*leading, 70)
    y = multiply(x, packed)
    assert y.shape == (*leading, 20)
    if y.size:
        assert largest_error(y, x, packed) <= TOLERANCE


def test_matrix_of_no_rows_gives_no_outputs() -> None:
    """N = 0 is a matrix too."""
    assert multiply(some_rows(3, 10), random_packed(0, 10, "float32")).shape == (3, 0)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in DTYPES if dtype != "bfloat16"]
)  # numpy has none to feed
def test_weights_that_are_fed_give_the_same(dtype: ValueType) -> None:
    """Tensors that come with every call instead of lying in the file: the same bits."""
    packed = random_packed(40, 100, dtype)
    x = some_rows(2, 100)
    tensors, attributes = tensors_of(packed), attributes_of(packed)
    session = open_session(model_of(tensors, attributes, fed=("mask", "values", "offsets", "scales")))
    fed = {
        "mask": packed.mask,
        "values": packed.values,
        "offsets": packed.offsets,
        "scales": packed.scales,
    }
    assert np.array_equal(session.run(None, {"x": x, **fed})[0], multiply(x, packed))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_threads_do_not_change_the_numbers(dtype: ValueType) -> None:
    """One and several threads give the same bits: a row's sum is one thread's."""
    packed = random_packed(2000, 600, dtype)
    x = some_rows(9, 600)
    for bits in (32, 8) if dtype == "int8" else (32,):
        one = multiply(x, packed, activation_bits=bits)
        assert np.array_equal(multiply(x, packed, activation_bits=bits, threads=3), one)


def test_two_sessions_are_apart() -> None:
    """Sessions of other weights in one process do not disturb each other."""
    matrices = [random_packed(40, 100, "int8", seed=seed) for seed in (1, 2)]
    sessions = [open_session(model_of(tensors_of(packed), attributes_of(packed))) for packed in matrices]
    x = some_rows(2, 100)
    for _ in range(2):
        for packed, session in zip(matrices, sessions, strict=True):
            assert largest_error(session.run(None, {"x": x})[0], x, packed) <= TOLERANCE
