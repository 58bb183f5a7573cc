"""Log files in the cache folder: named by time, bounded in number, free of access tokens."""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path

from compressor.run.cache import cache_folder

KEPT_LOGS = 50
_TOKEN = re.compile(r"\b(hf_[A-Za-z0-9]{8,})\b")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RedactingFormatter(logging.Formatter):
    """Formats records, tracebacks included, with access tokens blotted out."""

    def format(self, record: logging.LogRecord) -> str:
        """The line without tokens of the model hub."""
        return redacted(super().format(record))


def redacted(text: str) -> str:
    """``text`` with what is, or looks like, an access token of the model hub blotted out."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, "hf_***")
    return _TOKEN.sub("hf_***", text)


def add_log_file(command: str) -> Path:
    """Send everything that is logged to a new file, in addition to where it goes already; the file's path.

    Meant for programs, such as the command line: a library leaves logging to its caller.

    Raises:
        OutputRefused: The cache folder cannot be created.
        OSError: The file cannot be created.
    """
    folder = cache_folder("logs")
    for old in sorted(folder.glob("*.log"))[: -KEPT_LOGS + 1]:
        old.unlink(missing_ok=True)
    path = folder / f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}-{command}.log"
    remove_log_file()
    log_file = logging.FileHandler(path, encoding="utf-8")
    log_file.set_name(_NAME)
    log_file.setFormatter(RedactingFormatter(_FORMAT))
    logging.getLogger().addHandler(log_file)
    return path


def current_log_file() -> Path | None:
    """The file of ``add_log_file``, where one is open."""
    found = _open_file()
    return Path(found.baseFilename) if found is not None else None


def remove_log_file() -> None:
    """Close the file of ``add_log_file``."""
    found = _open_file()
    if found is not None:
        logging.getLogger().removeHandler(found)
        found.close()


_NAME = "blockpress log file"


def _open_file() -> logging.FileHandler | None:
    for candidate in logging.getLogger().handlers:
        if isinstance(candidate, logging.FileHandler) and candidate.get_name() == _NAME:
            return candidate
    return None
