"""Write a file so that its path is absent, old or complete, whatever happens meanwhile."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, content: bytes) -> None:
    """Give ``path`` this content, flushed to the disk.

    Raises:
        OSError: It cannot be written; what was there is still there.
    """
    with replacing(path) as draft:
        draft.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to; what lies there in the end takes the place of ``path``.

    Raises:
        OSError: It cannot be flushed or moved; what was there is still there.
    """
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(descriptor)
    draft = Path(name)
    try:
        yield draft
        with draft.open("rb+") as stream:
            os.fsync(stream.fileno())
        draft.chmod(0o666 & ~_umask())
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _umask() -> int:
    """The mask of this program; there is no way to read it but to set it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def flush_folder(folder: Path) -> None:
    """Flush the names in ``folder`` to the disk: what was created, renamed or removed there.

    Raises:
        OSError: They cannot be flushed.
    """
    if os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
