"""What may be asked of zero-shot tasks, checked before any work."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compressor.errors import UsageError
from validators.tasks import check_tasks


def check_task_options(tasks: Sequence[str], folder: str | Path | None, limit: int | None) -> None:
    """Refuse options of tasks without tasks, and tasks that cannot be loaded.

    Raises:
        UsageError: E-TASKS-NONE.
        ReportedError: E-LM-EVAL-MISSING, E-TASKS-FOLDER.
    """
    if tasks:
        check_tasks(folder)
    elif folder is not None or limit is not None:
        raise UsageError(
            "E-TASKS-NONE", "a folder or limit of tasks was given, but no task", "name tasks with --tasks"
        )
