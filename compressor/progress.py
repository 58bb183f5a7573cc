"""What a run tells while it works: small frozen events, handed to one callback. Nothing here prints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class RunStarted:
    """The model is open and the plan is known."""

    model: str
    architecture: str
    num_blocks: int
    prunable_weights: int
    checkpoint_dtype: str
    export_dtype: str
    device: str
    pattern: str
    pruner: str
    recovery: str


@dataclass(frozen=True)
class TextReady:
    """Calibration or evaluation windows are cut."""

    role: str  # "calibration" or "evaluation"
    source: str
    windows: int
    window_tokens: int
    heldout_windows: int = 0


@dataclass(frozen=True)
class LearningRateChosen:
    """The probe on held-out windows settled the learning rate."""

    lr: float
    tried: tuple[float, ...]
    block: int


@dataclass(frozen=True)
class BlockProgress:
    """A repair step count inside one block."""

    index: int
    total: int
    step: int
    steps: int


@dataclass(frozen=True)
class BlockFinished:
    """A block is committed. Losses are held-out mean squared errors of the block's output; None without a repair."""

    index: int
    total: int
    loss_before: float | None
    loss_after: float | None
    best_step: int
    steps: int
    elapsed_s: float


@dataclass(frozen=True)
class StageStarted:
    """A stage without an inner counter begins: "open", "export", "validate", "report", "publish"."""

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not an error."""

    message: str
    shortfall: bool = False  # the result is less than what was asked for


Event = RunStarted | TextReady | LearningRateChosen | BlockProgress | BlockFinished | StageStarted | Notice
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore every event."""
