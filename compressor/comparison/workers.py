"""Who makes a cell: a process of its own, or this one."""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Protocol

from compressor import progress as events
from compressor.comparison.failures import CellFailure, failure_of, out_of_memory
from compressor.comparison.request import CellRequest, ScoringRequest
from compressor.comparison.results import Figures, Measured, Scores, measured_from_tree
from compressor.errors import ReportedError, StoppedSafely
from compressor.opening import OpenModel, open_model
from compressor.progress import Event, Progress

Stop = Callable[[], bool]

_LOG = logging.getLogger("compressor")
_POLL_S = 0.1
_STDERR_TAIL_BYTES = 20_000
_GONE = (ProcessLookupError, BrokenPipeError)  # it has ended: fine


class CellFailed(Exception):
    """A cell came to no end; ``opening`` where it was the model that could not be opened, as for every cell."""

    def __init__(self, failure: CellFailure, *, opening: bool) -> None:
        super().__init__(failure.message)
        self.failure, self.opening = failure, opening


class Worker(Protocol):
    """Makes cells, one after the other."""

    def make(self, request: CellRequest, stop: Stop, progress: Progress) -> Figures:
        """The figures of one cell.

        Raises:
            CellFailed: It came to no end.
            StoppedSafely: ``stop`` said so.
        """
        ...

    def score(self, request: ScoringRequest, stop: Stop, progress: Progress) -> Scores:
        """What zero-shot tasks give on a model.

        Raises:
            CellFailed: It came to no end.
            StoppedSafely: ``stop`` said so.
        """
        ...

    def close(self) -> None:
        """Let go of what is held between cells."""
        ...


class ThisProcess:
    """Makes cells here and keeps the model open between them: quick on small models, but no cell's memory is told."""

    def __init__(self) -> None:
        self._opened: dict[str, OpenModel] = {}

    def make(self, request: CellRequest, stop: Stop, progress: Progress) -> Figures:
        """The figures of one cell.

        Raises:
            CellFailed: It came to no end.
            StoppedSafely: ``stop`` said so.
        """
        from compressor.comparison.cell import run_cell

        started, opening = time.perf_counter(), True
        try:
            opened = self._open(request)
            opening = False
            return run_cell(request, opened, started=started, stop=stop, progress=progress)
        except StoppedSafely:
            raise
        except Exception as error:
            raise CellFailed(failure_of(error), opening=opening) from error

    def score(self, request: ScoringRequest, stop: Stop, progress: Progress) -> Scores:
        """What zero-shot tasks give on a model.

        Raises:
            CellFailed: It came to no end.
            StoppedSafely: ``stop`` said so.
        """
        from compressor.comparison.scored_model import score_model

        try:
            return score_model(request, stop=stop, progress=progress)
        except StoppedSafely:
            raise
        except Exception as error:
            raise CellFailed(failure_of(error), opening=False) from error

    def _open(self, request: CellRequest) -> OpenModel:
        dtype = request.recipe.export.dtype
        if dtype not in self._opened:
            self._opened[dtype] = open_model(
                request.model,
                dtype=dtype,
                device=request.device,
                revision=request.revision,
                trust_remote_code=request.trust_remote_code,
            )
        return self._opened[dtype]

    def close(self) -> None:
        """Let go of the weights."""
        for opened in self._opened.values():
            opened.source.close()
        self._opened.clear()


class OwnProcess:
    """Makes each cell in a process of its own (``compressor.comparison.child``), so that peak memory is the cell's."""

    def __init__(self) -> None:
        self._server: _Server | None = None

    def make(self, request: CellRequest, stop: Stop, progress: Progress) -> Figures:
        """The figures of one cell.

        Raises:
            CellFailed: It came to no end; also when the system killed it.
            StoppedSafely: ``stop`` said so.
        """
        return self._ask(Figures, {"cell": request.model_dump(mode="json")}, stop, progress)

    def score(self, request: ScoringRequest, stop: Stop, progress: Progress) -> Scores:
        """What zero-shot tasks give on a model.

        Raises:
            CellFailed: It came to no end; also when the system killed it.
            StoppedSafely: ``stop`` said so.
        """
        return self._ask(Scores, {"scoring": request.model_dump(mode="json")}, stop, progress)

    def _ask(self, kind: type[Measured], asked: dict[str, Any], stop: Stop, progress: Progress) -> Measured:
        if self._server is None or not self._server.alive:
            self.close()
            self._server = _Server()
        try:
            return measured_from_tree(kind, self._server.answer(asked, stop, progress))
        except (CellFailed, StoppedSafely):
            raise
        except BaseException:  # a second signal: the cell must not go on alone
            self.close()
            raise

    def close(self) -> None:
        """End the process that makes cells."""
        if self._server is not None:
            self._server.close()
            self._server = None


class _Server:
    """The running process that makes cells."""

    def __init__(self) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="compare-")
        folder = Path(self._scratch.name)
        search_path = [os.path.abspath(entry) for entry in sys.path]
        settings = folder / "settings.json"
        settings.write_text(json.dumps({"sys_path": search_path, "folder": os.getcwd()}), encoding="utf-8")
        self._stderr_path = folder / "stderr.txt"
        self._lines: queue.Queue[dict[str, Any] | None] = queue.Queue()
        with self._stderr_path.open("wb") as stderr:
            # In its folder, because "-m" looks in the current directory first; in a session of its own, because Ctrl-C
            # is for this process, which asks the cell to stop.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "compressor.comparison.child", str(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._receive, args=(self._process.stdout,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it can make another cell."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it, with the cell that it may be making."""
        with suppress(*_GONE):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(*_GONE):
                    pipe.close()
        self._scratch.cleanup()

    def answer(self, request: dict[str, Any], stop: Stop, progress: Progress) -> dict[str, Any]:
        """Pass progress on until what is asked for has ended; then what it measured, or its failure raised."""
        self._stderr_from = self._stderr_path.stat().st_size
        self._write(json.dumps(request).encode() + b"\n")
        outcome: dict[str, Any] = {}
        asked, code = False, None
        while code is None and (line := self._next_line()) is not None:
            if not asked and stop():
                self._write(b"\n")
                asked = True
            kind = line.get("event")
            if kind == "progress":
                progress(_event(line["kind"], line["fields"]))
            elif kind == "ended":
                code = line["code"]
            elif kind in ("done", "failed"):
                outcome = line
        if outcome.get("event") == "done":
            measured: dict[str, Any] = outcome["measured"]
            return measured
        if outcome.get("event") == "failed":
            raise self._failed(CellFailure.model_validate(outcome["failure"]), outcome["stage"])
        raise CellFailed(self._death(self._process.wait() if code is None else code), opening=False)

    def _failed(self, failure: CellFailure, stage: str) -> CellFailed | StoppedSafely:
        if failure.error_id == "E-STOPPED":
            return StoppedSafely(failure.error_id, failure.message, failure.remedy)
        if failure.exit_code == ReportedError.exit_code:
            _LOG.error("in the process of a cell:\n%s", self._stderr_tail())
        return CellFailed(failure, opening=stage == "open")

    def _next_line(self) -> dict[str, Any] | None:
        """The next line, an empty one when there was none for a while, None at the end."""
        try:
            return self._lines.get(timeout=_POLL_S)
        except queue.Empty:
            return None if not self.alive and self._lines.empty() else {}

    def _receive(self, stdout: IO[bytes]) -> None:
        for line in stdout:
            with suppress(ValueError):  # a line cut off by a crash
                self._lines.put(json.loads(line))
        self._lines.put(None)

    def _write(self, line: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(*_GONE):
            self._process.stdin.write(line)
            self._process.stdin.flush()

    def _stderr_tail(self) -> str:
        """The end of what was printed since the cell began."""
        with self._stderr_path.open("rb") as stderr:
            size = self._stderr_path.stat().st_size
            stderr.seek(max(self._stderr_from, size - _STDERR_TAIL_BYTES))
            return stderr.read().decode("utf-8", errors="replace")

    def _death(self, code: int) -> CellFailure:
        """The failure of a cell whose process ended without a word."""
        tail = self._stderr_tail()
        _LOG.error("the process of a cell ended with %s:\n%s", code, tail)
        if code == -getattr(signal, "SIGKILL", 9) or "bad_alloc" in tail:
            return out_of_memory("the system killed the cell's process, most likely because memory ran out")
        last_line = tail.strip().rpartition("\n")[2] or "without a word"
        return CellFailure(
            error_id="E-COMPARE-BROKEN",
            message=f"the cell's process ended with {code}: {last_line[:300]}",
            remedy="this is a bug: please report it with the log",
            exit_code=1,
        )


def _event(kind: str, fields: dict[str, Any]) -> Event:
    """The event that crossed as a name and its fields."""
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    event: Event = getattr(events, kind)(**values)
    return event
