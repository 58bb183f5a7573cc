"""What every command does around its call: check the installation, log to a file, show progress."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from compressor.cli.displays import Display, LiveDisplay, NoDisplay, PlainDisplay
from compressor.cli.packages import check_packages
from compressor.cli.styles import is_terminal
from compressor.errors import ReportedError
from compressor.progress import Event, Notice
from compressor.run.logs import add_log_file

# Read by the libraries when they are loaded. What they have to say goes to the log file.
QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}


class Session:
    """One command at work: its progress, and at the end its result."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self._told: set[str] = set()

    def progress(self, event: Event) -> None:
        """Show an event of the pipeline."""
        if isinstance(event, Notice):
            self._told.add(event.message)
        self.display.show(event)

    def result(self, text: str, notices: Iterable[str] = ()) -> None:
        """Print results on stdout, and before them on stderr the notices that were no events.

        A reader of stdout that is gone (``| head``) has seen enough: that changes no exit code.
        """
        for message in notices:
            if message not in self._told:
                self.display.show(Notice(message))
        self.display.close()
        try:
            print(text, flush=True)
        except BrokenPipeError:
            sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - lives as long as the process


@contextmanager
def open_session(command: str, *, quiet: bool, verbose: bool) -> Iterator[Session]:
    """A session for ``command``; everything global that it changed is put back at its end.

    Raises:
        UsageError: The installation is damaged.
    """
    check_packages()
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    session = Session(_display(quiet=quiet, verbose=verbose))
    with _logging(command, verbose and not quiet):
        try:
            yield session
        finally:
            session.display.close()


def _display(*, quiet: bool, verbose: bool) -> Display:
    if quiet:
        return NoDisplay()
    if is_terminal(sys.stderr):
        return LiveDisplay(sys.stderr, every_block=verbose)
    return PlainDisplay(sys.stderr)


@contextmanager
def _logging(command: str, verbose: bool) -> Iterator[None]:
    """Send warnings and logs to a file, with ``-v`` to stderr too."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    with suppress(ReportedError, OSError):  # validate and inspect work without a place for logs
        add_log_file(command)
    echo = logging.StreamHandler(sys.stderr)
    echo.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    if verbose:
        root.addHandler(echo)
    try:
        yield
    finally:  # the log file stays open: a failure may still have to write its traceback
        root.removeHandler(echo)
        root.setLevel(level)
        logging.captureWarnings(False)
