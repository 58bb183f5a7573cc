"""The product with a dense int8 matrix: by the operator, by the function that stands for it, and against float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from int8_samples import ELEMENT_TYPES, exact_int8_product, model_of, parts_of
from onnx import TensorProto
from runtime_samples import Floats, needs_library, open_session

TOLERANCE = 1e-6  # of the sum of |w||x|
SHAPES = [(1, 1), (5, 3), (16, 64), (17, 63), (33, 100), (48, 257), (300, 128), (20, 4200)]


def stock_session(model: onnx.ModelProto) -> Any:
    """A session without the library, which runs the function."""
    onnx.checker.check_model(model)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def check(y: Any, x: Floats, parts: dict[str, Any], activation_bits: int) -> None:
    """y is what float64 gives, of x rounded where it is."""
    exact, terms = exact_int8_product(x, parts, activation_bits)
    assert y.shape == exact.shape
    assert y.dtype == np.float32
    assert (np.abs(y - exact) <= TOLERANCE * terms).all()


def some_x(*shape: int) -> Floats:
    x = np.random.default_rng(shape).standard_normal(shape).astype(np.float32)
    if x.size:
        x.reshape(-1, shape[-1])[-1] = 0
    return x


@needs_library
@pytest.mark.parametrize("activation_bits", [8, 32])
@pytest.mark.parametrize("shape", SHAPES)
def test_product_is_that_of_the_integers(shape: tuple[int, int], activation_bits: int) -> None:
    """Few rows of x and many, sizes that are no whole vectors and strips, a row of zeros."""
    parts = parts_of(*shape)
    session = open_session(model_of(parts, activation_bits))
    for rows in (1, 2, 3, 4, 5, 40):
        x = some_x(rows, shape[1])
        check(session.run(None, {"x": x})[0], x, parts, activation_bits)


@pytest.mark.parametrize("activation_bits", [8, 32])
@pytest.mark.parametrize("leading", [(), (3,), (0,), (2, 0), (2, 3)])
def test_function_computes_the_same(leading: tuple[int, ...], activation_bits: int) -> None:
    """Without the library, any leading axes, none and empty ones too."""
    parts = parts_of(33, 100)
    x = some_x(*leading, 100)
    model = model_of(parts, activation_bits, leading=len(leading))
    check(stock_session(model).run(None, {"x": x})[0], x, parts, activation_bits)


@needs_library
@pytest.mark.parametrize("leading", [(), (0,), (2, 0), (2, 3)])
def test_operator_takes_any_leading_axes(leading: tuple[int, ...]) -> None:
    """None, several, and empty ones."""
    parts = parts_of(33, 100)
    x = some_x(*leading, 100)
    session = open_session(model_of(parts, 8, leading=len(leading)))
    check(session.run(None, {"x": x})[0], x, parts, 8)


@needs_library
def test_matrix_may_change_from_run_to_run() -> None:
    """A matrix, scales and bias that are inputs of the graph; one bias for all, and no row at all."""
    x = some_x(3, 100)
    session = open_session(model_of(parts_of(33, 100), 8, fed=tuple(ELEMENT_TYPES)))
    for parts in (parts_of(33, 100), {**parts_of(33, 100), "bias": np.ones(33, np.float32)}):
        check(session.run(None, {"x": x, **parts})[0], x, parts, 8)
    for rows, bias in ((0, 0), (33, 1)):
        parts = {**parts_of(rows, 100), "bias": np.full(bias, 0.5, np.float32)}
        check(open_session(model_of(parts, 8)).run(None, {"x": x})[0], x, parts, 8)


@needs_library
def test_row_that_is_not_finite_gives_nan() -> None:
    """With rounded activations, in that row alone."""
    x = some_x(3, 64)
    x[1, 5] = np.inf
    y = open_session(model_of(parts_of(20, 64), 8)).run(None, {"x": x})[0]
    assert np.isnan(y[1]).all()
    assert np.isfinite(y[[0, 2]]).all()


@needs_library
@pytest.mark.parametrize(
    ("name", "array", "type_", "message"),
    [
        ("weight", np.zeros((20, 64), np.uint8), TensorProto.UINT8, r"tensor\(uint8\).*weight"),
        ("weight", np.zeros((20, 64, 1), np.int8), TensorProto.INT8, "weight must have 2 axes, but has 3"),
        ("weight", np.zeros((20, 0), np.int8), TensorProto.INT8, "1 to 2147483647 columns, but has 0"),
        ("weight", np.zeros((1, 140000), np.int8), TensorProto.INT8, "int32 sums would overflow"),
        ("scales", np.zeros(19, np.float32), TensorProto.FLOAT, r"scales must have the shape \(20\), but"),
        ("scales", np.zeros((20, 1), np.float32), TensorProto.FLOAT, "scales must have 1 axes, but has 2"),
        (
            "bias",
            np.zeros(19, np.float32),
            TensorProto.FLOAT,
            r"bias must have the shape \(20\) or \(1\), but",
        ),
    ],
)
def test_matrix_that_breaks_a_rule_is_refused(name: str, array: Any, type_: int, message: str) -> None:
    """With an error that says which, when the model is loaded."""
    parts = {**parts_of(20, 64), name: array}
    with pytest.raises(Exception, match=message):
        open_session(model_of(parts, 8, types={name: type_}))


@needs_library
def test_other_activation_bits_and_widths_of_x_are_refused() -> None:
    """7 bits when the model is loaded; an x that the matrix does not fit at the call."""
    with pytest.raises(Exception, match="Int8MatMul: activation_bits must be 32 or 8, but is 7"):
        open_session(model_of(parts_of(20, 64), 7))
    session = open_session(model_of(parts_of(20, 64), 8))
    with pytest.raises(Exception, match="the last axis of x must be 64, but is 65"):
        session.run(None, {"x": some_x(2, 65)})
