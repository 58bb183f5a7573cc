"""What the child process tells its parent: one JSON object per line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ValidationProgress:
    """How far a stage is. ``total`` is 0 where it cannot be told.

    Attributes:
        stage: "manifest", "structure", "tasks", "load", "parity", "perplexity", "tasks-onnx", "lm-eval",
            "reference", "tasks-recovered", "divergence" or "dense".
        done: Steps done.
        total: Steps in all.
    """

    stage: str
    done: int = 0
    total: int = 0


OnProgress = Callable[[ValidationProgress], None]


def ignore(progress: ValidationProgress) -> None:
    """Take no notice."""
