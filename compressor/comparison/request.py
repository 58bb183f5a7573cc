"""What one cell, or the scoring of one model, is given: JSON, so that it can cross to a process of its own."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.recipe import Recipe
from compressor.run.atomic import replacing


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class PrunedStart(_Part):
    """A pruned model that recoveries share: where it lies, what it cost, its perplexity by the name of the text."""

    folder: str
    pruning_s: float
    perplexity: dict[str, float]


class CellRequest(_Part):
    """One cell.

    Attributes:
        model: Folder or hub id.
        revision: Of a hub model.
        trust_remote_code: Whether code that comes with the checkpoint may run.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        recipe: All settings.
        windows: File of calibration and held-out windows; see :func:`save_windows`.
        evaluation: File of evaluation windows by the name of the text, in order.
        dense: Perplexity of the dense model by the name of the text, where it is known.
        dense_states: Folder of the dense model's hidden states for these windows.
        shared_bytes: What all such folders may take on the disk.
        start: The pruned model to start from; None prunes.
        record: Folder to keep the pruned model in; None keeps none.
        finished: Folder to write the model to that the cell ends with; None writes none.
    """

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    recipe: Recipe
    windows: str
    evaluation: dict[str, str]
    dense: dict[str, float] = {}
    dense_states: str
    shared_bytes: int
    start: PrunedStart | None = None
    record: str | None = None
    finished: str | None = None


class TaskChoice(_Part):
    """Zero-shot tasks of lm-eval.

    Attributes:
        names: Tasks, groups or tags.
        folder: A folder of local tasks, absolute.
        limit: Documents per task; None: all.
        max_tokens: Tokens that the model takes at once.
    """

    names: tuple[str, ...]
    folder: str | None = None
    limit: int | None = None
    max_tokens: int


class ScoringRequest(_Part):
    """A model as it is opened, a folder or hub id, and the tasks that it is scored on."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    device: str = "auto"
    tasks: TaskChoice


def save_windows(path: Path, **windows: Tensor) -> None:
    """Write token windows, each (N, T) int64, under their names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft:
        save_file({name: ids.to(torch.int64).contiguous() for name, ids in windows.items()}, draft)


def load_windows(path: str) -> dict[str, Tensor]:
    """The windows that :func:`save_windows` wrote."""
    windows: dict[str, Tensor] = load_file(path)
    return windows
