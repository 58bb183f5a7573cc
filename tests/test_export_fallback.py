"""The operator of packed weights as a function in standard operators, in stock ONNX Runtime."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from packed_samples import expected, product_model, products_model, sample
from runtime_samples import library_path, needs_library

CASES = [
    ("float32", 0, 32),
    ("float16", 0, 32),
    ("bfloat16", 0, 32),
    ("int8", 0, 8),
    ("int8", 128, 32),
    ("int4", 64, 8),
    ("int4", 64, 32),
]

# A child process, so that its peak is that of the product.
_PEAK = """
import resource, sys
import numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
x = np.ones((1, 1024), np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
session.run(None, {"x": x})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize(("kind", "group_size", "activation_bits"), CASES)
def test_fallback_computes_what_the_format_says(kind: str, group_size: int, activation_bits: int) -> None:
    """Every value type, grouped and not, with inputs rounded and not, gives x Wᵀ + bias; a row of zeros too."""
    made = sample(37, 200, kind, group_size)
    x = np.random.default_rng(1).normal(size=(2, 3, 200)).astype(np.float32)
    x[1, 2] = 0
    y = run(product_model(made, activation_bits, leading=2), x)
    np.testing.assert_allclose(y, expected(made, x, activation_bits), atol=2e-5)


@pytest.mark.parametrize("shape", [(70,), (0, 70), (3, 0, 70), (2, 1, 5, 70)])
def test_fallback_takes_any_leading_axes(shape: tuple[int, ...]) -> None:
    """None, several, and empty ones; opset 23 runs the same function."""
    made = sample(17, 70, "int4", 64)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    y = run(product_model(made, 8, opset=23, leading=len(shape) - 1), x)
    assert y.shape == (*shape[:-1], 17)
    np.testing.assert_allclose(y, expected(made, x, 8) if x.size else np.empty(y.shape), atol=2e-5)


@pytest.mark.parametrize(("kind", "group_size", "activation_bits"), CASES)
@pytest.mark.parametrize("rows", [(37, 20), (5, 64, 17)])
def test_fallback_of_several_weights(
    rows: tuple[int, ...], kind: str, group_size: int, activation_bits: int
) -> None:
    """An output for each weight."""
    weights = [sample(count, 200, kind, group_size, seed=count) for count in rows]
    x = np.random.default_rng(1).normal(size=(2, 3, 200)).astype(np.float32)
    model = products_model(weights, activation_bits)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for y, made in zip(session.run(None, {"x": x}), weights, strict=True):
        np.testing.assert_allclose(y, expected(made, x, activation_bits), atol=2e-5)


def test_fallback_lets_no_nan_pass_for_a_number() -> None:
    """A row with a NaN or an infinity gives NaN everywhere, the rows beside it their numbers."""
    made = sample(9, 64, "int8")
    x = np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32)
    x[0, 5], x[2, 6] = np.nan, np.inf
    y = run(product_model(made, 8, leading=1), x)
    assert np.isnan(y[[0, 2]]).all()
    np.testing.assert_allclose(y[1], expected(made, x[1:2], 8)[0], atol=2e-5)


@pytest.mark.skipif(sys.platform == "win32", reason="resource is of POSIX")
def test_fallback_unpacks_strip_by_strip(tmp_path: Path) -> None:
    """The product with a matrix of 64 MiB in float32 takes less memory than that matrix."""
    pytest.importorskip("resource")
    path = tmp_path / "product.onnx"
    onnx.save(product_model(sample(2 * 8192, 1024, "int8"), 8, leading=1), path)
    child = subprocess.run(
        [sys.executable, "-c", _PEAK, str(path)], capture_output=True, text=True, check=True
    )
    kib = int(child.stdout) // (1024 if sys.platform == "darwin" else 1)
    assert kib < 48 * 1024


@needs_library
def test_library_takes_the_place_of_the_fallback() -> None:
    """Registered, the operator runs and not the function: one that rounds the inputs, here, against the attribute."""
    made = sample(37, 200, "int8")
    model = product_model(made, 32, leading=1)
    model.functions[0].CopyFrom(product_model(made, 8, leading=1).functions[0])
    x = np.random.default_rng(1).normal(size=(3, 200)).astype(np.float32)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected(made, x, 32), atol=2e-5)
    np.testing.assert_allclose(run(model, x), expected(made, x, 8), atol=2e-5)


@needs_library
@pytest.mark.parametrize("count", [1, 2, 3])
def test_library_has_every_operator(tmp_path: Path, count: int) -> None:
    """Registered, none is taken apart into its function."""
    model = products_model([sample(20, 64, "int8", seed=seed) for seed in range(count)], 8)
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library_path()))
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (node,) = onnx.load(tmp_path / "optimised.onnx").graph.node
    assert (node.domain, node.op_type) == ("blockpress", model.graph.node[0].op_type)
