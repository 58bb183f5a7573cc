"""The output lock: one run per output."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from compressor.errors import OutputRefused
from compressor.run import logs
from compressor.run.cache import cache_folder
from compressor.run.lock import hold_output, lock_path
from compressor.run.output import reserve_output

HOLDER = """
import sys
from pathlib import Path
from compressor.run.output import reserve_output
with reserve_output(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
print("torch" in sys.modules)
"""


def test_lock_turns_a_second_run_away_naming_the_first(tmp_path: Path) -> None:
    """Another process on one output is refused, exit 6, naming pid and host, before torch is loaded."""
    out = tmp_path / "sparse.onnx"
    command = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as first:
        assert first.stdout is not None
        assert first.stdin is not None
        assert first.stdout.readline() == "held\n"
        with pytest.raises(OutputRefused) as refused, reserve_output(out):
            pass
        first.stdin.close()
        assert first.stdout.read() == "False\n"
    assert (refused.value.error_id, refused.value.exit_code) == ("E-OUTPUT-LOCKED", 6)
    assert f"pid {first.pid} on {socket.gethostname()}" in refused.value.message
    with reserve_output(out):
        pass  # free again


def test_lock_of_a_killed_run_is_free(tmp_path: Path) -> None:
    """A lock dies with its process; what it left behind turns nobody away."""
    out = tmp_path / "sparse.onnx"
    code = HOLDER.replace("sys.stdin.read()", "import os; os._exit(9)")
    killed = subprocess.run(
        [sys.executable, "-c", code, str(out)], check=False, cwd=Path(__file__).parents[1]
    )
    assert killed.returncode == 9
    with reserve_output(out) as plan:
        assert plan.target == out


def test_lock_may_be_entered_again_by_its_holder(tmp_path: Path) -> None:
    """The command line and the pipeline take the same lock, one inside the other."""
    out = tmp_path / "sparse.onnx"
    with hold_output(out):
        with hold_output(out):
            pass
        assert refused_in_thread(out)
    assert not refused_in_thread(out)


def refused_in_thread(out: Path) -> bool:
    """Whether another thread is refused the lock of ``out``."""
    refusals: list[OutputRefused] = []

    def attempt() -> None:
        try:
            with hold_output(out):
                pass
        except OutputRefused as error:
            refusals.append(error)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return bool(refusals)


def test_lock_is_one_for_all_spellings_of_a_path(tmp_path: Path) -> None:
    """A symlinked parent and the folder form of the same ONNX file share a lock."""
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    assert lock_path(tmp_path / "alias" / "model.onnx") == lock_path(tmp_path / "real" / "model.onnx")
    assert lock_path(tmp_path / "real" / "other.onnx") != lock_path(tmp_path / "real" / "model.onnx")


def test_lock_leaves_nothing_beside_the_output(tmp_path: Path, cache_of_its_own: Path) -> None:
    """Lock files lie in the cache folder, not where the user looks."""
    with reserve_output(tmp_path / "sparse.onnx"):
        assert list(tmp_path.iterdir()) == []
    assert list((cache_of_its_own / "locks").iterdir())


def test_cache_that_cannot_be_made_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache path below a file is refused with the variable that moves it."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("BLOCKPRESS_CACHE", os.fspath(tmp_path / "file" / "cache"))
    with pytest.raises(OutputRefused) as refused:
        cache_folder()
    assert refused.value.error_id == "E-CACHE-NOT-WRITABLE"
    assert "BLOCKPRESS_CACHE" in refused.value.remedy


def test_cache_keeps_a_bounded_number_of_logs(cache_of_its_own: Path) -> None:
    """The oldest log goes when there are too many."""
    folder = cache_of_its_own / "logs"
    folder.mkdir()
    for number in range(logs.KEPT_LOGS + 5):
        (folder / f"20200101-0000{number:02}-1-run.log").touch()
    newest = logs.add_log_file("run")
    logs.remove_log_file()
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == logs.KEPT_LOGS
    assert names[-1] == newest.name
    assert "20200101-000000-1-run.log" not in names
