"""Small files read without trust in what lies at their path."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def read_plain(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most ``limit_bytes`` bytes.

    A named pipe would wait for a writer and a device may never end, so neither is read.

    Raises:
        OSError: It is missing, cannot be read, is no regular file, or is larger.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL in the path, or half a character
        raise OSError(str(error)) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):  # first: no stream can be made of a folder
        os.close(descriptor)
        raise OSError("not a regular file")
    with os.fdopen(descriptor, "rb") as stream:
        content = stream.read(limit_bytes + 1)  # files below /proc tell no size
    if len(content) > limit_bytes:
        raise OSError(f"larger than {limit_bytes} bytes")
    return content


def is_spelled(name: str) -> bool:
    """Whether ``name`` holds whole characters only; JSON can spell half of one, which no file's name has."""
    return not any("\ud800" <= sign <= "\udfff" for sign in name)
