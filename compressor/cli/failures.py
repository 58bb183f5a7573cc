"""The one place where errors become text and exit codes."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import signal
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from compressor.cli.terminal import bold_red, json_text, printable
from compressor.run.logs import redacted
from exporters.errors import ReportedError

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"os error (\d+)")  # safetensors writes by itself, and tells the number in its message
_MEMORY_PHRASES = ("out of memory", "can't allocate memory", "DefaultCPUAllocator", "std::bad_alloc")


class Interrupted(KeyboardInterrupt):
    """A signal that asks to stop at once."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@dataclass(frozen=True)
class Failure:
    """What the user is told of an error."""

    id: str
    message: str
    remedy: str
    exit_code: int


def describe_failure(error: BaseException) -> Failure:
    """The text and the exit code for any exception; one that nobody foresaw is traced in the log file."""
    if isinstance(error, ReportedError):
        return Failure(
            error.error_id,
            printable(redacted(error.message)),
            printable(redacted(error.remedy)),
            error.exit_code,
        )
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx is not None else "compress"
        return Failure("E-USAGE", _one_line(error.format_message()), f"see {path} --help", 2)
    if isinstance(error, click.ClickException):
        return Failure("E-USAGE", _one_line(error.format_message()), "see compress --help", 2)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGINT
        name = signal.Signals(signum).name
        return Failure("E-INTERRUPTED", f"stopped by {name}", "run the same command again", 128 + signum)
    if isinstance(error, SystemExit):
        return Failure("E-INTERNAL", "a library ended the program", "report it", 1)
    return _resources(error) or _unforeseen(error)


def _resources(error: BaseException) -> Failure | None:
    """The failure where memory or disk space is what lacked."""
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        where = f" ({error.filename})" if error.filename else ""
        return Failure(
            "E-DISK-FULL", f"{error.strerror}{where}", "free space, or give an --out on another disk", 5
        )
    told = _OS_ERROR.search(str(error)) if type(error).__name__ == "SafetensorError" else None
    if told is not None and int(told[1]) in _NO_SPACE:
        return Failure(
            "E-DISK-FULL", _one_line(str(error)), "free space, or give an --out on another disk", 5
        )
    memory = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if memory or (
        isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _MEMORY_PHRASES)
    ):
        detail = _one_line(str(error)) or "the allocation was refused"
        return Failure(
            "E-OUT-OF-MEMORY",
            f"not enough memory: {detail}",
            "lower --batch-size, --seqlen or --num-calibration-samples, or use a larger machine",
            5,
        )
    return None


def _unforeseen(error: BaseException) -> Failure:
    log = _log_traceback(error)
    where = f"send the log file {log} with a report" if log else "report it"
    return Failure(
        "E-INTERNAL", f"a bug in blockpress: {type(error).__name__}: {_one_line(str(error))}", where, 1
    )


def _log_traceback(error: BaseException) -> Path | None:
    """Write the traceback to the log of this run, or to a new one; its path, None where that fails."""
    from compressor.run.logs import add_log_file, current_log_file

    with contextlib.suppress(ReportedError, OSError):
        path = current_log_file() or add_log_file("failure")
        logging.getLogger("compressor").error("unforeseen error", exc_info=error)
        return path
    return None


def _one_line(text: str) -> str:
    line = printable(redacted(" ".join(text.split())))
    return line if len(line) <= 500 else f"{line[:497]}..."


def print_failure(failure: Failure, *, as_json: bool) -> None:
    """Print the failure: one JSON object on stdout, or three lines on stderr."""
    with contextlib.suppress(OSError, ValueError):
        if as_json:
            sys.stdout.write(json_text({"error": asdict(failure)}, None) + "\n")
            return
        print(f"{bold_red(failure.id, sys.stderr)}  {failure.message}", file=sys.stderr)
        print(f"  do this: {failure.remedy}", file=sys.stderr)
