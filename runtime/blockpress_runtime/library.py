"""The operator library, and sessions of ONNX Runtime that have it."""

from __future__ import annotations

import sys
from os import PathLike, fspath
from pathlib import Path
from typing import Any

# An entry that only this module reads: ONNX Runtime makes no session where a domain is registered twice.
_REGISTERED = "blockpress_runtime.registered"
_NAMES = {"win32": "blockpress_runtime.dll", "darwin": "libblockpress_runtime.dylib"}


class BlockpressRuntimeError(RuntimeError):
    """What is missing in the installation, and how to get it."""


def library_path() -> Path:
    """The shared library with the operators of domain ``blockpress``.

    Raises:
        BlockpressRuntimeError: It was not built.
    """
    path = Path(__file__).with_name(_NAMES.get(sys.platform, "libblockpress_runtime.so"))
    if not path.is_file():
        raise BlockpressRuntimeError(
            f"the operator library was expected at {path}, but is not there: install blockpress-runtime from a wheel, "
            "or with a C++ compiler from its folder (pip install ./runtime)"
        )
    return path


def register(session_options: Any) -> None:
    """Give the sessions made with these ``onnxruntime.SessionOptions`` the operators of domain ``blockpress``.

    Doing it again changes nothing.

    Raises:
        BlockpressRuntimeError: The library was not built, or ONNX Runtime cannot load it.
    """
    path = library_path()
    if _has_entry(session_options):
        return
    try:
        session_options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
        raise BlockpressRuntimeError(f"ONNX Runtime cannot load {path}: {error}") from error
    session_options.add_session_config_entry(_REGISTERED, "1")


def session(path: str | PathLike[str], **options: Any) -> Any:
    """An ``onnxruntime.InferenceSession`` of the model, with the operators of domain ``blockpress``.

    Args:
        path: The ``.onnx`` file.
        options: What InferenceSession takes: ``sess_options`` (they get the operators), ``providers``, and so on.

    Raises:
        BlockpressRuntimeError: ONNX Runtime is not installed, or the library was not built.
    """
    ort = import_onnxruntime()
    session_options = options.pop("sess_options", None) or ort.SessionOptions()
    register(session_options)
    options.setdefault("providers", ["CPUExecutionProvider"])
    return ort.InferenceSession(fspath(path), session_options, **options)


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        BlockpressRuntimeError: It is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise BlockpressRuntimeError(
            f"ONNX Runtime is not installed ({error}): pip install onnxruntime, or onnxruntime-gpu"
        ) from error
    return onnxruntime


def _has_entry(session_options: Any) -> bool:
    try:
        return bool(session_options.get_session_config_entry(_REGISTERED))
    except Exception:  # how ONNX Runtime says that there is none
        return False
