"""The bench of bad input: what is made before a command line, and what must be so after it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest
from bad_inputs import Bench
from cli_fakes import Ended
from workshop import Workshop

Refusal = tuple[str, int]


def open_bench(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A model, two texts and an older output, to be spoiled, beside an empty folder for temporary files."""
    home = tmp_path / "bench"
    shutil.copytree(workshop.model, home / "model")
    shutil.copytree(workshop.file_output.out.parent, home / "out")
    for text in (workshop.texts.calibration, workshop.texts.evaluation):
        shutil.copy(text, home)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return Bench(home)


def contents(home: Path) -> dict[str, bytes | str]:
    """Every entry below ``home``: bytes of a file, target of a link, kind of anything else."""
    found: dict[str, bytes | str] = {}
    for path in sorted(home.rglob("*")):
        mode = path.lstat().st_mode
        if stat.S_ISREG(mode):
            found[str(path)] = path.read_bytes()
        else:
            found[str(path)] = str(path.readlink()) if stat.S_ISLNK(mode) else str(stat.S_IFMT(mode))
    return found


def check_text(ended: Ended, refusal: Refusal, says: str) -> None:
    """Two lines on stderr: the id and what is wrong, and what to do; nothing on stdout."""
    lines = ended.err.splitlines()
    assert (lines[0].split("  ")[0], ended.code) == refusal, ended.err
    assert len(lines) == 2, ended.err
    assert lines[1].startswith("  do this: ")
    assert says in ended.err
    assert ended.out == ""


def check_json(ended: Ended, refusal: Refusal) -> None:
    """One object on stdout with the same."""
    error = json.loads(ended.out)["error"]
    assert error.keys() == {"id", "message", "remedy", "exit_code"}
    assert (error["id"], error["exit_code"], ended.code) == (*refusal, refusal[1])
    assert "Traceback" not in ended.err


@contextmanager
def nothing_changes(bench: Bench) -> Iterator[None]:
    """Meanwhile no file of the bench is made, changed or removed, and none is left among the temporary ones."""
    before = contents(bench.home)
    yield
    assert contents(bench.home) == before
    assert os.listdir(tempfile.gettempdir()) == []


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Meanwhile no longer than this: a reader that waits for ever is interrupted, where the system can do that."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def too_slow(_: int, __: FrameType | None) -> None:
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, too_slow)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
