"""Start-up check that the three packages are ours: others have these names, and pip overwrites silently."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from importlib import metadata
from pathlib import Path

from compressor.errors import UsageError

PACKAGES = ("compressor", "exporters", "validators")
FOREIGN = {"compressor": "django-compressor", "exporters": "exporters", "validators": "validators"}


def check_packages() -> None:
    """Return when compressor, exporters and validators all come from this distribution.

    Raises:
        UsageError: One of them is found elsewhere, or its ``__init__.py`` was overwritten.
    """
    home = Path(__file__).resolve().parents[2]
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        place = Path(places[0]).resolve() if places else None
        if place != home / package:
            raise _shadowed(
                package, f"is found at {place}, not at {home / package}" if place else "is missing"
            )
    for package, written in _recorded_digests(home).items():
        present = hashlib.sha256((home / package / "__init__.py").read_bytes()).digest()
        if base64.urlsafe_b64encode(present).rstrip(b"=").decode() != written:
            raise _shadowed(package, "was overwritten by another distribution")


def _shadowed(package: str, what: str) -> UsageError:
    return UsageError(
        "E-PACKAGE-SHADOWED",
        f"the package {package} of blockpress {what}",
        f"install blockpress into an environment of its own, without {FOREIGN[package]}",
    )


def _recorded_digests(home: Path) -> dict[str, str]:
    """Package to the sha256 of its ``__init__.py`` as installed; an editable install records none."""
    try:
        files = metadata.distribution("blockpress").files or []
    except metadata.PackageNotFoundError:
        return {}  # run from the source folder
    digests = {}
    for file in files:
        ours = file.parts[0] in PACKAGES and file.parts[1:] == ("__init__.py",) and file.hash is not None
        if ours and file.hash and Path(str(file.locate())).resolve() == home.joinpath(*file.parts):
            digests[file.parts[0]] = file.hash.value
    return digests
