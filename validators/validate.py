"""Validation of an ONNX file, carried out in a child process whose time and memory are watched."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import psutil

from validators.checks import CHECK_NAMES, ValidationReport
from validators.errors import (
    ValidationError,
    ValidationFailure,
    ValidationResourceError,
    ValidationUsageError,
    refusal,
)
from validators.events import OnProgress, ValidationProgress, ignore
from validators.request import ValidationRequest
from validators.tasks import check_tasks

_POLL_S = 0.1
_STDERR_TAIL_BYTES = 20_000
_CGROUP = Path("/sys/fs/cgroup")
_EXIT_S = 10.0
_GONE = (
    psutil.NoSuchProcess,
    psutil.ZombieProcess,
    ProcessLookupError,
    BrokenPipeError,
)  # it has ended: fine


def validate(request: ValidationRequest, on_progress: OnProgress | None = None) -> ValidationReport:
    """What an examination of the file found.

    Raises:
        ValidationUsageError: E-VALIDATE-NOTHING: nothing to compare with and not ``structure_only``;
            E-CHECK-NAME, E-VALIDATE-PATTERN, E-TASKS-FOLDER: the request names what there is not;
            E-TASKS-STRUCTURE.
        ReportedError: Whatever the examination refused, with its own id and exit code.
        ValidationError: E-VALIDATE-CRASHED: native code crashed on the file.
        ValidationResourceError: E-VALIDATE-MEMORY, E-VALIDATE-TIMEOUT.
        ValidationFailure: E-VALIDATE-BROKEN: a bug in the validation.
    """
    check_request(request)
    with _Child(request) as child:
        return child.report(on_progress or ignore)


def check_required(require: Sequence[str]) -> None:
    """Do nothing when every name is a check.

    Raises:
        ValidationUsageError: E-CHECK-NAME: a name is none.
    """
    for name in require:
        if name not in CHECK_NAMES:
            raise ValidationUsageError(
                "E-CHECK-NAME", f"there is no check named {name}", f"checks are {', '.join(CHECK_NAMES)}"
            )


def check_request(request: ValidationRequest) -> None:
    """Refuse what cannot be carried out, before any work.

    Raises:
        ValidationUsageError: See ``validate``.
    """
    check_required(request.require)
    if request.pattern is not None and re.fullmatch(r"\s*\d+\s*:\s*[1-9]\d*\s*", request.pattern) is None:
        raise ValidationUsageError(
            "E-VALIDATE-PATTERN", f"a pattern is N:M, got {request.pattern!r}", "give a pattern such as 2:4"
        )
    if request.tasks is not None:
        if request.structure_only:
            raise ValidationUsageError(
                "E-TASKS-STRUCTURE",
                "tasks run the model, which --structure-only leaves out",
                "give one of the two",
            )
        check_tasks(request.tasks.folder)
    measured = [request.known_perplexity.get(key) for key in ("recovered", "quantized")]
    known = request.windows_path is not None and any(value is not None for value in measured)
    sources = (request.reference_factory, request.masks_path, request.manifest_path)
    asked = request.structure_only or request.lm_eval or request.tasks is not None
    if not (known or any(sources) or asked):
        raise ValidationUsageError(
            "E-VALIDATE-NOTHING",
            f"{request.model_path}: nothing to compare with: no reference, no masks, no manifest",
            "give --reference FOLDER, or judge the file alone with --structure-only",
        )


class _Child:
    """The running child process of one request."""

    def __init__(self, request: ValidationRequest) -> None:
        self._request = request
        self._folder = tempfile.TemporaryDirectory(prefix="validate-")
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stage = "start"

    def __enter__(self) -> _Child:
        folder = Path(self._folder.name)
        search_path = [os.path.abspath(entry) for entry in sys.path]
        handed_on = {"request": self._request.to_json(), "sys_path": search_path, "folder": os.getcwd()}
        request_path = folder / "request.json"
        request_path.write_text(json.dumps(handed_on), encoding="utf-8")
        self._stderr_path = folder / "stderr.txt"
        with self._stderr_path.open("wb") as stderr:
            # In the folder of the request, because "-m" looks in the current directory first; in a session of
            # its own, because Ctrl-C is for the parent, who ends the child.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "validators.child", str(request_path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(search_path)},
                start_new_session=True,
            )
        assert self._process.stdout is not None
        threading.Thread(target=self._receive, args=(self._process.stdout,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._family():
            with suppress(*_GONE):
                process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(*_GONE):
                    pipe.close()
        self._folder.cleanup()

    def report(self, on_progress: OnProgress) -> ValidationReport:
        """Pass progress on until the child has ended; then its report, or its error raised."""
        outcome: dict[str, Any] | None = None
        for event in self._watched_events():
            if event["event"] == "progress":
                self._stage = event["stage"]
                on_progress(ValidationProgress(event["stage"], event["done"], event["total"]))
            else:
                outcome = event
        if outcome is None:
            raise self._death()
        if outcome["event"] == "error":
            parts = (outcome[name] for name in ("error_id", "message", "remedy", "exit_code"))
            raise refusal(*parts)
        if outcome["event"] == "broken":
            raise self._broken(outcome["traceback"])
        return ValidationReport.from_json(outcome["report"])

    def _receive(self, stdout: IO[bytes]) -> None:
        """Put the child's events into the queue, and None at their end."""
        for line in stdout:
            try:
                self._events.put(json.loads(line))
            except ValueError:
                continue  # a line cut off by a crash
        self._events.put(None)

    def _watched_events(self) -> Iterator[dict[str, Any]]:
        """The child's events until it ends, its time and memory watched meanwhile."""
        started = time.monotonic()
        limit_bytes = self._request.memory_limit_bytes or available_memory_bytes()
        next_look = started
        while True:
            try:
                event = self._events.get(timeout=_POLL_S)
            except queue.Empty:
                if self._process.poll() is not None and self._events.empty():
                    return  # ended, though something it started may hold its pipe open
            else:
                if event is None:
                    with suppress(subprocess.TimeoutExpired):  # said all, but does not end: __exit__ ends it
                        self._process.wait(_EXIT_S)
                    return
                yield event
            now = time.monotonic()
            if now < next_look:
                continue
            next_look = now + _POLL_S
            if now - started > self._request.time_limit_s:
                raise self._too_slow()
            used_bytes = self._resident_bytes()
            if used_bytes > limit_bytes:
                raise self._too_large(used_bytes, limit_bytes)

    def _family(self) -> list[psutil.Process]:
        """The child and all that it started, the child last."""
        with suppress(*_GONE):
            child = psutil.Process(self._process.pid)
            return [*child.children(recursive=True), child]
        return []

    def _resident_bytes(self) -> int:
        """Resident memory of the child and all that it started, mapped file pages included."""
        total = 0
        for process in self._family():
            with suppress(*_GONE):
                total += process.memory_info().rss
        return total

    def _stderr_tail(self) -> str:
        with self._stderr_path.open("rb") as stderr:
            stderr.seek(max(0, self._stderr_path.stat().st_size - _STDERR_TAIL_BYTES))
            return stderr.read().decode("utf-8", errors="replace")

    def _where(self) -> str:
        return f"{Path(self._request.model_path).name}: stage {self._stage}"

    def _death(self) -> ValidationError:
        """The error for a child that ended without a word."""
        code = self._process.returncode or 0
        tail = self._stderr_tail()
        if code == -getattr(signal, "SIGKILL", 9):
            return _out_of_memory(
                f"{self._where()}: the child was killed, most likely because memory ran out"
            )
        if "bad_alloc" in tail:
            return _out_of_memory(f"{self._where()}: the child could not allocate memory")
        # Windows reports a crash as an exit code such as 0xC0000005.
        if code < 0 or code >= 0xC0000000:
            in_torch = self._stage in ("reference", "dense")
            return ValidationError(
                "E-VALIDATE-CRASHED",
                f"{self._where()}: the child process crashed ({_signal_name(code)})",
                f"the {self._stage} model crashed, not the ONNX file: look at that model"
                if in_torch
                else "the file is most likely damaged: export it again",
            )
        return self._broken(tail)

    def _broken(self, child_traceback: str) -> ValidationFailure:
        last_line = child_traceback.strip().rpartition("\n")[2] or f"exit code {self._process.returncode}"
        failure = ValidationFailure(
            "E-VALIDATE-BROKEN",
            f"{self._where()}: the validation itself failed: {last_line[:300]}",
            "this is a bug: please report it with the log",
        )
        failure.__cause__ = RuntimeError(f"in the child process:\n{child_traceback}")
        return failure

    def _too_slow(self) -> ValidationResourceError:
        return ValidationResourceError(
            "E-VALIDATE-TIMEOUT",
            f"{self._where()}: not done after {self._request.time_limit_s:g} s",
            "use fewer windows with --max-eval-windows, or a faster --provider",
        )

    def _too_large(self, used_bytes: int, limit_bytes: int) -> ValidationResourceError:
        mib = 2**20
        return _out_of_memory(
            f"{self._where()}: needs more memory than the limit: {used_bytes / mib:.0f} MiB resident, "
            f"{limit_bytes / mib:.0f} MiB allowed"
        )


def available_memory_bytes() -> int:
    """Memory that this machine or container can still give."""
    available = int(psutil.virtual_memory().available)
    for limit_name, used_name in (
        ("memory.max", "memory.current"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),  # cgroup v1
    ):
        try:
            limit = int((_CGROUP / limit_name).read_text())
            used = int((_CGROUP / used_name).read_text())
        except (OSError, ValueError):  # no such limit here; "max" is no number
            continue
        available = min(available, max(0, limit - used))
    return available


def _out_of_memory(message: str) -> ValidationResourceError:
    return ValidationResourceError(
        "E-VALIDATE-MEMORY",
        message,
        "free memory, validate on a larger machine, or judge the file alone with --structure-only",
    )


def _signal_name(code: int) -> str:
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"exit code {code:#x}"
