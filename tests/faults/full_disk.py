"""A disk that is full from some write on: builds ``full_disk.c`` and says how a run is told of it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SOURCE = Path(__file__).with_name("full_disk.c")


def build_full_disk(folder: Path) -> dict[str, str]:
    """Variables of a process whose writes can fail, the library being in ``folder``; none without a compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return {}
    library = folder / "full_disk.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return {"LD_PRELOAD": str(library)}


def full_from(number: int, folder: Path) -> Mapping[str, str]:
    """Variables of a run whose ``number``-th write below ``folder``, and each one after it, fails."""
    return {"FULL_DISK": str(folder), "FULL_DISK_FROM": str(number)}
