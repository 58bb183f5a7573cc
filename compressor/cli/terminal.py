"""What the streams can do: move a cursor, show colours, go away."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

import click

_STDOUT, _STDERR = 1, 2
_THOUSANDS = "\u202f"  # a space by which numbers are grouped; it moves nothing


def printable(text: str) -> str:
    """``text`` on one line: what moves a cursor or ends a line is spelled out, as names in files may hold it."""
    return "".join(
        sign if sign.isprintable() or sign == _THOUSANDS else sign.encode("unicode_escape").decode("ascii")
        for sign in text
    )


def json_text(tree: object, indent: int | None = 1) -> str:
    """``tree`` as JSON that moves no cursor either: readable, but what is not printable as ``\\u`` and its number."""
    text = json.dumps(tree, indent=indent, ensure_ascii=False)
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign in ("\n", _THOUSANDS) else json.dumps(sign)[1:-1] for sign in text
    )


def is_terminal(stream: IO[str]) -> bool:
    """Whether ``stream`` is a terminal that moves its cursor."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _styled(text: str, stream: IO[str], colour: str) -> str:
    if not is_terminal(stream) or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=colour, bold=True)


def bold_red(text: str, stream: IO[str]) -> str:
    """``text``, red where ``stream`` shows colours."""
    return _styled(text, stream, "red")


def bold_green(text: str, stream: IO[str]) -> str:
    """``text``, green where ``stream`` shows colours."""
    return _styled(text, stream, "green")


def bold_yellow(text: str, stream: IO[str]) -> str:
    """``text``, yellow where ``stream`` shows colours."""
    return _styled(text, stream, "yellow")


@contextmanager
def stdout_of_its_own() -> Iterator[None]:
    """Keep stdout for what the command itself prints: a native library's own words (tokenizers has some) go to stderr.

    Without effect where stdout is not the process's own, as in a test that captures it.
    """
    own = sys.stdout
    if not _is_descriptor(own, _STDOUT) or not _is_descriptor(sys.stderr, _STDERR):
        yield
        return
    own.flush()
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with open(kept, "w", encoding=own.encoding, errors=own.errors, closefd=False) as sys.stdout:
            yield
    finally:
        sys.stdout = own
        os.dup2(kept, _STDOUT)
        os.close(kept)


def _is_descriptor(stream: IO[str] | None, descriptor: int) -> bool:
    try:
        return stream is not None and stream.fileno() == descriptor
    except (OSError, ValueError):  # no file, or closed
        return False


def discard_stdout() -> None:
    """Send what is still to be printed nowhere: the reader of stdout is gone (``| head``)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
