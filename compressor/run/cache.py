"""The folder outside every output where locks and logs lie."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs

from compressor.errors import OutputRefused

CACHE_VARIABLE = "BLOCKPRESS_CACHE"


def cache_folder(*parts: str) -> Path:
    """The folder ``parts`` inside the user's cache folder, created if absent.

    ``BLOCKPRESS_CACHE`` names another folder to use.

    Raises:
        OutputRefused: The folder cannot be created.
    """
    chosen = os.environ.get(CACHE_VARIABLE)
    root = (
        Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("blockpress", appauthor=False)
    )
    folder = root.joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputRefused(
            "E-CACHE-NOT-WRITABLE",
            f"cannot create the cache folder {folder}: {error.strerror or error}",
            f"set {CACHE_VARIABLE} to a folder that you can write",
        ) from None
    return folder
