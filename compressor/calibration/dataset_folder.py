"""Whether a dataset's folder keeps to itself: the library that reads it follows any path and opens any file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from compressor.errors import InputRefused
from compressor.yaml_text import yaml_value
from exporters.plain_files import read_plain

__all__ = ["refuse_strays"]

_CARD = "README.md"  # its YAML names the files of each configuration
_LISTS = ("state.json", "dataset_dict.json", "dataset_info.json")  # of a dataset that was saved as such
_KEYS = ("data_files", "_data_files", "data_dir", "path", "filename", "splits")
_MAX_BYTES = 2**24


def refuse_strays(folder: Path) -> None:
    """Refuse a folder with links that lead out, entries that are no files, or a list that names files elsewhere.

    Raises:
        InputRefused: E-DATASET-ESCAPES, naming the entry.
    """
    home = os.path.realpath(folder)
    for place, folders, files in os.walk(folder):
        for name in sorted((*folders, *files)):
            path = Path(place) / name
            if os.path.islink(path) and not Path(os.path.realpath(path)).is_relative_to(home):
                raise _escapes(path, "is a link that leads out of the folder")
            if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                raise _escapes(path, "is no regular file")
            if name == _CARD or name in _LISTS:
                for named in _named_files(path):
                    if not _stays(named):
                        raise _escapes(path, f"names {named[:80]!r}, which is no path inside the folder")


def _named_files(path: Path) -> Iterator[str]:
    """The files that a list names."""
    try:
        text = read_plain(path, _MAX_BYTES).decode("utf-8")
        if path.name == _CARD:
            parts = text.split("---\n", 2)
            tree = yaml_value(parts[1]) if text.startswith("---\n") and len(parts) == 3 else None
        else:
            tree = json.loads(text)
        found = list(_texts(tree, wanted=False))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise _escapes(path, f"cannot be read: {(str(error).splitlines() or [''])[0][:160]}") from None
    yield from found


def _texts(tree: Any, *, wanted: bool) -> Iterator[str]:
    """Every text below a key that stands for files."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _texts(value, wanted=wanted or key in _KEYS)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, wanted=wanted)
    elif wanted and isinstance(tree, str):
        yield tree


def _stays(name: str) -> bool:
    relative = PurePosixPath(name.replace("\\", "/"))
    return not (relative.is_absolute() or ".." in relative.parts or name.startswith("~") or ":" in name)


def _escapes(path: Path, what: str) -> InputRefused:
    return InputRefused(
        "E-DATASET-ESCAPES",
        f"{path.name} {what}",
        "give the text as a .jsonl, .txt or .parquet file, or mend the folder if you trust it",
    )
