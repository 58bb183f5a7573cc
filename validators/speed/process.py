"""The parent's end of a worker process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, cast

from validators.errors import ValidationError, ValidationFailure, ValidationResourceError, refusal

_TAIL = 20_000


class WorkerProcess:
    """A worker that is asked one thing at a time. A context: at its end the process is gone."""

    def __init__(self, label: str) -> None:
        """Start the process.

        Args:
            label: What it works on, for error messages.
        """
        self._label = label
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        search_path = [os.path.abspath(entry) for entry in sys.path]
        with self._errors_path.open("wb") as errors:
            # In a folder of its own, because "-m" looks in the current directory first; in a session of its own,
            # because Ctrl-C is for the parent, who ends its children.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "validators.speed.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder.name,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )

    @property
    def _errors_path(self) -> Path:
        return Path(self._folder.name) / "stderr.txt"

    def __enter__(self) -> WorkerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        self._folder.cleanup()

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer; it sleeps before and after.

        Raises:
            ReportedError: The worker's own refusal.
            ValidationError: E-BENCH-CRASHED: native code crashed.
            ValidationResourceError: E-VALIDATE-MEMORY: the process was killed.
            ValidationFailure: E-BENCH-BROKEN: a bug in the worker.
        """
        requests, answers = cast("IO[str]", self._process.stdin), cast("IO[str]", self._process.stdout)
        with suppress(BrokenPipeError):  # it has crashed: there will be no answer
            requests.write(json.dumps({"do": what, **arguments}) + "\n")
            requests.flush()
        line = answers.readline()
        if not line.endswith("\n"):
            raise self._death()
        outcome = json.loads(line)
        if "error" in outcome:
            raise refusal(**outcome["error"])
        if "broken" in outcome:
            raise self._broken(outcome["broken"])
        return cast("dict[str, Any]", outcome["answer"])

    def _death(self) -> ValidationError:
        """The error for a worker that ended without a word."""
        code = self._process.wait()
        if code == -getattr(signal, "SIGKILL", 9):
            return ValidationResourceError(
                "E-VALIDATE-MEMORY",
                f"{self._label}: its process was killed, most likely because memory ran out",
                "measure fewer models at once, or on a larger machine",
            )
        if code < 0 or code >= 0xC0000000:  # Windows reports a crash as an exit code such as 0xC0000005
            return ValidationError(
                "E-BENCH-CRASHED",
                f"{self._label}: its process crashed (exit code {code})",
                "look whether compress validate passes the file; export it again if it does not",
            )
        tail = self._errors_path.read_text(encoding="utf-8", errors="replace")[-_TAIL:]
        return self._broken(tail)

    def _broken(self, child_traceback: str) -> ValidationFailure:
        last_line = child_traceback.strip().rpartition("\n")[2]
        failure = ValidationFailure(
            "E-BENCH-BROKEN",
            f"{self._label}: the measurement itself failed: {last_line[:300]}",
            "this is a bug: please report it with the log",
        )
        failure.__cause__ = RuntimeError(f"in the child process:\n{child_traceback}")
        return failure
