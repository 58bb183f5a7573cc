"""The exported file in other releases of ONNX Runtime.

``BLOCKPRESS_ORT_PYTHONS`` lists Python interpreters, separated by the system's path separator, each in an
environment of its own with another release of onnxruntime, for instance the oldest and the newest that can
be installed::

    python3.11 -m venv old && old/bin/pip install "onnxruntime==1.20.1" "numpy<2.3"
    python3.11 -m venv new && new/bin/pip install onnxruntime
    BLOCKPRESS_ORT_PYTHONS=old/bin/python:new/bin/python pytest tests/test_ort_versions.py

Without the variable there is nothing to compare with, and the tests are skipped.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx_samples import pruned_matrix, run_product, weight_of, write_product

PYTHONS = [python for python in os.environ.get("BLOCKPRESS_ORT_PYTHONS", "").split(os.pathsep) if python]
RUN = """
import sys, numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
columns = int(sys.argv[2])
rows = numpy.arange(2 * columns, dtype=numpy.float32).reshape(2, columns) % 5 - 2
numpy.save(sys.argv[3], session.run(None, {"x": rows})[0])
print(onnxruntime.__version__)
"""

pytestmark = pytest.mark.skipif(
    not PYTHONS, reason="BLOCKPRESS_ORT_PYTHONS names no interpreters with other onnxruntime releases"
)


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int8])
@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64)], ids=["matrix", "experts"])
def test_sparse_file_gives_the_same_numbers_in_every_release(
    tmp_path: Path, python: str, dtype: type, shape: tuple[int, ...]
) -> None:
    """The file of this project, run by another release, gives bit for bit what the installed one gives."""
    weights = [weight_of(f"w{i}", pruned_matrix(shape, 0.9, i, dtype)) for i in range(2)]
    path, rows = write_product(tmp_path, weights, "sparse")
    assert {row.encoding for row in rows} == {"sparse"}
    command = [python, "-c", RUN, str(path), "64", str(tmp_path / "y.npy")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "y.npy"), run_product(path, 64))
