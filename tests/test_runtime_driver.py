"""The kernels under the address and undefined-behaviour sanitizers, on random and on damaged matrices."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).parent.parent / "runtime"


def build_driver(folder: Path) -> Path:
    """The driver, built in ``folder``; the test is skipped where it cannot be."""
    own = str(Path(sys.executable).parent)
    cmake = shutil.which("cmake", path=os.pathsep.join([own, os.environ["PATH"]]))
    if cmake is None or not any(map(shutil.which, [os.environ.get("CXX") or "c++", "g++", "clang++"])):
        pytest.skip("cmake or a C++ compiler is missing")
    configured = _run([cmake, "-S", str(RUNTIME), "-B", str(folder), "-DBLOCKPRESS_DRIVER=ON"])
    if "sanitizers are missing" in configured.stdout + configured.stderr:
        pytest.skip("the C++ compiler has no sanitizers")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = _run([cmake, "--build", str(folder)])
    assert built.returncode == 0, built.stdout + built.stderr
    assert "warning:" not in built.stdout + built.stderr
    return folder / "driver"


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_kernels_stay_within_their_tensors(tmp_path: Path) -> None:
    """Every kernel set of this machine gives the right numbers, and no read or write is out of bounds."""
    driver = build_driver(tmp_path)
    done = _run([str(driver), "--rounds", "150", "--seed", "1"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "scalar: 150 rounds" in done.stdout
