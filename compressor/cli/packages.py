"""Start-up checks that the three packages are ours: others have these names, and pip overwrites silently."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
from pathlib import Path

PACKAGES = ("compressor", "exporters", "validators")
FOREIGN = {"compressor": "django-compressor", "exporters": "exporters", "validators": "validators"}
HOME = Path(__file__).resolve().parents[2]


def misplaced_package() -> str | None:
    """The package that Python would not load from this distribution's folder; None when all three are in place.

    Imports nothing of the project, because what it would import may be somebody else's.
    """
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        places = list(spec.submodule_search_locations or ()) if spec is not None else []
        if not places or Path(places[0]).resolve() != HOME / package:
            return package
    return None


def overwritten_package() -> str | None:
    """The package whose ``__init__.py`` is not the one that was installed; an editable install records none."""
    from importlib import metadata

    try:
        files = metadata.distribution("blockpress").files or []
    except metadata.PackageNotFoundError:
        return None  # run from the source folder
    for file in files:
        if file.parts[0] not in PACKAGES or file.parts[1:] != ("__init__.py",) or file.hash is None:
            continue
        place = Path(str(file.locate())).resolve()
        if place == HOME.joinpath(*file.parts) and _sha256(place) != file.hash.value:
            return file.parts[0]
    return None


def shadowed_text(package: str) -> tuple[str, str, str]:
    """Id, message and remedy of the error that names ``package``."""
    return (
        "E-PACKAGE-SHADOWED",
        f"the package {package} of blockpress is hidden or overwritten by another distribution",
        f"install blockpress into an environment of its own, without {FOREIGN[package]}",
    )


def _sha256(path: Path) -> str:
    """The digest in the form that installers record."""
    digest = hashlib.sha256(path.read_bytes()).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
