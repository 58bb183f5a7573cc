"""Which entries of a model's folder may be opened: plain files that lie in it."""

from __future__ import annotations

import os
from pathlib import Path

from compressor.errors import InputRefused

__all__ = ["is_plain_name", "refuse_strays"]

# What this program or transformers reads of a model's folder, by ending or by beginning.
_READ_SUFFIXES = (".json", ".safetensors", ".model", ".jinja", ".txt", ".py")
_READ_PREFIXES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
_FOLDERS = ("additional_chat_templates",)  # that transformers looks into


def refuse_strays(folder: Path) -> None:
    """Refuse a folder in which a file that would be read is none, or is a link to somewhere else.

    A link would let a downloaded folder copy any file of this machine into the output, as a licence say. The
    hub's own cache is made of links to the ``blobs`` of the same repository, which are allowed.

    Raises:
        InputRefused: E-MODEL-FILE-ESCAPES, naming the entry.
    """
    home = Path(os.path.realpath(folder))
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    for place in (folder, *(folder / name for name in _FOLDERS)):
        for name in sorted(os.listdir(place)) if os.path.isdir(place) else ():
            if _is_read(name) or place != folder or name in _FOLDERS:
                _refuse_stray(place / name, allowed)


def is_plain_name(name: object) -> bool:
    """Whether ``name`` is the name of a file in a folder on every system, and no path."""
    return (
        isinstance(name, str)
        and 0 < len(os.fsencode(name.encode("utf-8", "replace"))) <= 255
        and name.isprintable()
        and name not in (".", "..")
        and not any(sign in name for sign in "/\\:")
    )


def _is_read(name: str) -> bool:
    return name.lower().endswith(_READ_SUFFIXES) or name.upper().startswith(_READ_PREFIXES)


def _refuse_stray(path: Path, allowed: list[Path]) -> None:
    target = Path(os.path.realpath(path))
    if os.path.islink(path) and not any(target.is_relative_to(root) for root in allowed):
        raise _escapes(path, "is a link that leads out of the folder")
    if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
        raise _escapes(path, "is no regular file")


def _escapes(path: Path, what: str) -> InputRefused:
    return InputRefused(
        "E-MODEL-FILE-ESCAPES",
        f"{path.name} {what}",
        "copy the file itself into the model's folder, if you trust where it comes from",
    )
