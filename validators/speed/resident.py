"""Memory of this process as Linux tells it: what is its own, and which pages of a model's files it has."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

_KIB = 1024


def anonymous_bytes() -> int | None:
    """Resident memory that is not a file's pages; None where the system does not tell."""
    lines = _lines("/proc/self/status")
    return next((int(line.split()[1]) * _KIB for line in lines if line.startswith("RssAnon:")), None)


def mapped_bytes(files: Collection[Path]) -> int | None:
    """Resident pages of these files that are mapped into this process; None where the system does not tell.

    Other processes share them, and the system takes them back when it needs them.
    """
    lines = _lines("/proc/self/smaps")
    return resident_of(lines, {str(path.resolve()) for path in files}) if lines else None


def resident_of(smaps: Iterable[str], names: Collection[str]) -> int:
    """Bytes of ``Rss`` in the lines of an ``smaps`` file, over the mappings of the files named.

    A mapping begins with a line ``from-to rwxp offset device inode name``, where a name may hold spaces.
    """
    total, ours = 0, False
    for line in smaps:
        parts = line.split(maxsplit=5)
        if not parts[0].endswith(":"):
            ours = len(parts) == 6 and parts[5].rstrip("\n") in names
        elif ours and parts[0] == "Rss:":
            total += int(parts[1]) * _KIB
    return total


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.readlines()
    except OSError:
        return []
