"""The Python package: sessions with the library, what is said when something is missing, and memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from runtime_samples import (
    attributes_of,
    exact_product,
    model_of,
    needs_library,
    open_session,
    random_packed,
    tensors_of,
)
from versions.cases import move_out

from blockpress_runtime import BlockpressRuntimeError, library, session

X = np.ones((1, 70), np.float32)


def small_model() -> onnx.ModelProto:
    packed = random_packed(20, 70, "int8")
    return model_of(tensors_of(packed), attributes_of(packed))


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(library.__file__).parents[1]), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@needs_library
def test_session_runs_a_model_from_a_path_or_text(tmp_path: Path) -> None:
    """One call opens the model; the options of InferenceSession pass through."""
    path = tmp_path / "model.onnx"
    path.write_bytes(small_model().SerializeToString())
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    results = [
        opened.run(None, {"x": X})[0]
        for opened in (
            session(path),
            session(str(path), sess_options=options, providers=["CPUExecutionProvider"]),
        )
    ]
    assert np.array_equal(*results)


@needs_library
def test_library_exports_three_functions_and_needs_no_onnxruntime() -> None:
    """A C interface and nothing else: RegisterCustomOps, and the library's version and kernels."""
    import ctypes

    loaded = ctypes.CDLL(str(library.library_path()))
    loaded.BlockpressRuntimeVersion.restype = ctypes.c_char_p
    loaded.BlockpressRuntimeIsa.restype = ctypes.c_char_p
    assert loaded.BlockpressRuntimeVersion().count(b".") == 2
    assert loaded.BlockpressRuntimeIsa() in (b"scalar", b"avx2", b"avx2-128", b"avx512", b"neon")
    assert loaded.RegisterCustomOps


def test_missing_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path at which it was expected, and how to get it."""
    monkeypatch.setattr(library, "_NAMES", {sys.platform: "nowhere.so"})
    with pytest.raises(BlockpressRuntimeError, match=r"expected at .*nowhere\.so.*install"):
        session("model.onnx")


@needs_library
def test_library_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no library: the path and what ONNX Runtime says."""
    (tmp_path / "broken.so").write_text("no library")
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "broken.so")
    with pytest.raises(BlockpressRuntimeError, match=r"cannot load .*broken\.so"):
        session("model.onnx")


def test_missing_onnxruntime_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which package to install."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(BlockpressRuntimeError, match="pip install onnxruntime"):
        session("model.onnx")


RUN = """
import sys
import numpy
from blockpress_runtime import session
opened = session(sys.argv[1])
numpy.save(sys.argv[2], opened.run(None, {"x": numpy.ones((1, 70), numpy.float32)})[0])
"""


@needs_library
def test_environment_variable_chooses_the_kernels(tmp_path: Path) -> None:
    """`scalar` runs everywhere; a name that means nothing is refused when the model is loaded."""
    path, result = tmp_path / "model.onnx", tmp_path / "y.npy"
    packed = random_packed(20, 70, "int8")
    path.write_bytes(model_of(tensors_of(packed), attributes_of(packed)).SerializeToString())
    done = run_python(RUN, str(path), str(result), BLOCKPRESS_RUNTIME_ISA="scalar")
    assert done.returncode == 0, done.stderr
    exact, terms = exact_product(X, packed)
    assert (np.abs(np.load(result) - exact) <= 1e-6 * terms).all()
    done = run_python(RUN, str(path), str(result), BLOCKPRESS_RUNTIME_ISA="sse9")
    assert done.returncode == 1
    assert "BLOCKPRESS_RUNTIME_ISA must be scalar, avx2, avx2-128, avx512 or neon" in done.stderr


MEASURE = """
import sys
import numpy, onnxruntime
from blockpress_runtime import library_path, session

def anonymous_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session(sys.argv[1], sess_options=options)
before = anonymous_kib()
opened = session(sys.argv[2], sess_options=options)
for _ in range(2):
    opened.run(None, {"x": numpy.ones((1, 4096), numpy.float32)})
print(anonymous_kib() - before)
"""


@needs_library
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel does not tell anonymous memory"
)
def test_weights_are_used_where_they_lie(tmp_path: Path) -> None:
    """A session on 19 MB of packed weights in the external file takes next to no memory of its own."""
    small = tmp_path / "small.onnx"
    small.write_bytes(small_model().SerializeToString())
    packed = random_packed(4096, 4096, "float16")
    tensors = tensors_of(packed)
    move_out(tensors, tmp_path / "large.data")
    large = tmp_path / "large.onnx"
    large.write_bytes(model_of(tensors, attributes_of(packed)).SerializeToString())
    done = run_python(MEASURE, str(small), str(large))
    assert done.returncode == 0, done.stderr
    # Less than the mask alone: neither it nor the values are copied.
    assert int(done.stdout) * 1024 < packed.mask.nbytes


@needs_library
def test_session_options_may_be_registered_twice(tmp_path: Path) -> None:
    """ONNX Runtime refuses a domain that is there already; the same options for two models are no such case."""
    path = tmp_path / "model.onnx"
    path.write_bytes(small_model().SerializeToString())
    options = onnxruntime.SessionOptions()
    results = [session(path, sess_options=options).run(None, {"x": X})[0] for _ in range(2)]
    assert np.array_equal(*results)


@needs_library
def test_sessions_come_and_go() -> None:
    """Registering and dropping many times leaves working sessions."""
    model = small_model()
    first = open_session(model).run(None, {"x": X})[0]
    for _ in range(20):
        assert np.array_equal(open_session(model).run(None, {"x": X})[0], first)
