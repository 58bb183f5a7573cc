"""What `make versions` runs in other releases of ONNX Runtime, run in the installed one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from runtime_samples import library_path, needs_library
from versions.cases import write_cases

CHECK = Path(__file__).with_name("versions") / "check.py"


def run_check(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CHECK), str(library_path()), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@needs_library
def test_check_of_a_release_passes_here_and_notices_wrong_numbers(tmp_path: Path) -> None:
    """All good models are right and all broken ones refused; a broken one among the good ones fails the check."""
    write_cases(tmp_path)
    done = run_check(tmp_path)
    assert done.returncode == 0, done.stderr
    _, _, right, refused, worst = json.loads(done.stdout)
    assert (right, refused) == (40, 3)
    assert worst <= 1e-6
    (tmp_path / "broken-bits.onnx").replace(tmp_path / "good-int8-8-256-inline.onnx")
    done = run_check(tmp_path)
    assert done.returncode == 1
    assert "good-int8-8-256-inline.onnx: " in done.stderr
