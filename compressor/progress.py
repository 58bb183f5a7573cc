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
    finish: str = "none"


@dataclass(frozen=True)
class TextReady:
    """Calibration or evaluation windows are cut."""

    role: str  # "calibration" or "evaluation"
    source: str
    windows: int
    window_tokens: int
    heldout_windows: int = 0


@dataclass(frozen=True)
class EstimateReady:
    """What the run will take: memory and disk against what is free, and time; each in one line."""

    resources: str
    time: str


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
class FinetuningProgress:
    """A step of an end-to-end stage ("recovery" or "finish"); ``trial`` while its learning rate is sought."""

    stage: str
    step: int
    steps: int
    lr: float
    trial: bool


@dataclass(frozen=True)
class FinetuningFinished:
    """All blocks were tuned together. Losses are those that were minimised, on held-out windows."""

    stage: str
    method: str
    loss: str
    loss_before: float
    loss_after: float
    best_step: int
    steps: int
    lr: float
    tried: tuple[float, ...]
    trained_parameters: int
    elapsed_s: float


@dataclass(frozen=True)
class CellProgress:
    """Where cell ``number`` of a comparison is; ``left_s`` for all cells, None before one is done."""

    number: int
    total: int
    label: str
    detail: str = ""
    left_s: float | None = None


@dataclass(frozen=True)
class CellFinished:
    """A cell of a comparison is measured: its perplexity and the pruned model's, or the id and message of its error."""

    number: int
    total: int
    label: str
    elapsed_s: float
    pruned: float | None = None
    recovered: float | None = None
    error_id: str | None = None
    error: str | None = None
    left_s: float | None = None


@dataclass(frozen=True)
class TaskProgress:
    """Zero-shot tasks run on a model: requests answered, and of how many."""

    done: int
    total: int


@dataclass(frozen=True)
class StageStarted:
    """A stage begins: "open", "recovery" or "finish" where they are end to end, "export", "validate", "publish".

    A comparison has "tasks", too: the dense model is scored.
    """

    name: str
    detail: str = ""


@dataclass(frozen=True)
class Notice:
    """Something the user should know that is not an error."""

    message: str
    shortfall: bool = False  # the result is less than what was asked for


Event = (
    RunStarted
    | TextReady
    | EstimateReady
    | LearningRateChosen
    | BlockProgress
    | BlockFinished
    | FinetuningProgress
    | FinetuningFinished
    | CellProgress
    | CellFinished
    | TaskProgress
    | StageStarted
    | Notice
)
Progress = Callable[[Event], None]


def silent(event: Event) -> None:
    """Ignore every event."""
