"""What every command does around its call: check the installation, log to a file, show progress."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import NoReturn

from compressor.cli.displays import Display, LiveDisplay, NoDisplay, PlainDisplay
from compressor.cli.packages import overwritten_package, shadowed_text
from compressor.cli.terminal import discard_stdout, is_terminal
from compressor.cli.wording import describe
from compressor.errors import ReportedError, UsageError
from compressor.progress import Event, Notice
from compressor.run.launch import Launch, launched
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
    "ORT_DISABLE_TELEMETRY": "1",  # since 1.31 it otherwise keeps a session file and sends events
}


_LOG = logging.getLogger("compressor.cli")


class Session:
    """One command at work: its progress, and at the end its result."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self._told: set[str] = set()

    def progress(self, event: Event) -> None:
        """Show an event of the pipeline, and note it in the log."""
        if isinstance(event, Notice):
            self._told.add(event.message)
        for line in describe(event):
            _LOG.info(line)
        self.display.show(event)

    def result(self, text: str, notices: Iterable[str] = ()) -> None:
        """Print results on stdout, and before them on stderr the notices that were no events.

        A reader of stdout that is gone (``| head``) has seen enough: that changes no exit code.
        """
        for message in notices:
            if message not in self._told:
                self.progress(Notice(message))
        self.display.close()
        try:
            print(text, flush=True)
        except BrokenPipeError:
            discard_stdout()


@contextmanager
def open_session(command: str, *, quiet: bool, verbosity: int) -> Iterator[Session]:
    """A session for ``command``; what it changed of logging is put back at its end.

    Args:
        command: Name of the command, for the log file.
        quiet: Show no progress.
        verbosity: 1 shows what libraries warn of, and on a terminal a line per block (elsewhere there always is
            one); 2 shows what libraries log from INFO up.

    Raises:
        UsageError: The installation is damaged; or E-RANKS-COMMAND: several processes were started for a command that
            is the work of one.
    """
    foreign = overwritten_package()
    if foreign is not None:
        raise UsageError(*shadowed_text(foreign))
    launch = launched()
    if launch is not None and command != "run":
        refuse_launch(command, launch)
    follows = launch is not None and launch.rank > 0  # then rank 0 tells
    quiet = quiet or follows
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with (
        _display(quiet=quiet, every_block=verbosity > 0) as display,
        _logging(command, 0 if quiet else verbosity, to_file=not follows),
    ):
        yield Session(display)


def refuse_launch(command: str, launch: Launch) -> NoReturn:
    """Refuse to run a command in several processes.

    Raises:
        UsageError: E-RANKS-COMMAND.
    """
    raise UsageError(
        "E-RANKS-COMMAND",
        f"compress {command} is the work of one process, and {launch.world} were started",
        "start it without torchrun; compress run shares its work",
    )


@contextmanager
def _display(*, quiet: bool, every_block: bool) -> Iterator[Display]:
    display: Display
    if quiet:
        display = NoDisplay()
    elif is_terminal(sys.stderr):
        display = LiveDisplay(sys.stderr, every_block=every_block)
    else:
        display = PlainDisplay(sys.stderr)
    try:
        yield display
    finally:
        display.close()


@contextmanager
def _logging(command: str, verbosity: int, *, to_file: bool) -> Iterator[None]:
    """Send logs and warnings to a file, and to stderr too when asked. Progress is in the file, shown elsewhere."""
    root = logging.getLogger()
    levels = {root: root.level, _LOG: _LOG.level}
    root.setLevel(logging.INFO if verbosity > 1 else logging.WARNING)
    _LOG.setLevel(logging.INFO)
    logging.captureWarnings(True)
    with suppress(ReportedError, OSError):  # validate and inspect work without a place for logs
        if to_file:
            add_log_file(command)
    _LOG.info("compress %s", shlex.join(sys.argv[1:]))
    echo = logging.StreamHandler(sys.stderr)
    echo.addFilter(lambda record: record.name != _LOG.name)
    echo.setFormatter(
        logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    )
    if verbosity:
        root.addHandler(echo)
    try:
        yield
    finally:  # the log file stays open: a failure may still have to write its traceback
        root.removeHandler(echo)
        for logger, level in levels.items():
            logger.setLevel(level)
        logging.captureWarnings(False)
