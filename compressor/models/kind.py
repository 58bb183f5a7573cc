"""What a folder that is no supported language model is instead, for the message that refuses it.

``optimum`` knows how to tell the libraries and tasks apart; it is asked on this path only, since importing it
takes about a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.models.registry import class_names

__all__ = ["describe_kind", "library_of"]


def library_of(folder: Path) -> str | None:
    """The library that a model folder belongs to, such as ``diffusers``; ``None`` where it cannot be told."""
    from optimum.exporters.tasks import TasksManager

    try:
        library = TasksManager.infer_library_from_model(str(folder))
    except Exception:  # nothing recognised: the refusal does without it
        return None
    return str(library)


def describe_kind(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Words for what the model is, such as "a transformers model for fill-mask", where that can be told."""
    library = library_of(folder)
    if library != "transformers":
        return f"a {library} model" if library else None
    task = _task_of(settings)
    return f"a transformers model for {task}" if task else None


def _task_of(settings: Mapping[str, Any]) -> str | None:
    import transformers
    from optimum.exporters.tasks import TasksManager

    for name in class_names(settings):
        model_class = getattr(transformers, name, None)
        if isinstance(model_class, type):
            try:
                return str(TasksManager.infer_task_from_model(model_class))
            except Exception:  # a class without a head has no task of its own
                return None
    return None
