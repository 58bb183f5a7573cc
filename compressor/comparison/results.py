"""What a comparison found out: its cells, and the document that ``compare.json`` holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from compressor.comparison.failures import CellFailure
from compressor.errors import InputRefused
from compressor.report.nonfinite import finite_tree, restore_numbers
from compressor.report.schema import (
    CalibrationFacts,
    LearningRateFacts,
    ModelFacts,
    PeakMemory,
    PerplexityProtocol,
)
from validators.checks import TaskResult

SCHEMA_VERSION = 1


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TextPerplexity(_Part):
    """Perplexity on one text: of the dense model, of the pruned one, and of the one that the cell ends with."""

    dense: float
    pruned: float
    recovered: float


class Seconds(_Part):
    """Wall seconds of what a method does.

    Attributes:
        pruning: Statistics and masks; where masks are shared, those of the pass that made them.
        recovery: The repair of all blocks, trials of learning rates included.
        finish: The end-to-end stage; None without one.
        cell: The whole cell in this comparison, with opening the model and measuring perplexity.
    """

    pruning: float
    recovery: float
    finish: float | None = None
    cell: float

    @property
    def method(self) -> float:
        """What the method costs by itself: pruning, recovery and finish."""
        return self.pruning + self.recovery + (self.finish or 0.0)


class Losses(_Part):
    """How well the recovery did by what it minimises, to see over-fitting.

    Attributes:
        unit: What is minimised; block by block it is the squared error as a share of the targets' mean square.
        heldout_before: Held-out windows, before the repair.
        heldout: Held-out windows, the weights that were kept.
        calibration: Calibration windows, the last epoch; None for a method that does not train.
    """

    unit: str
    heldout_before: float
    heldout: float
    calibration: float | None = None


class BlockFigures(_Part):
    """One block: held-out and calibration losses as mean squared errors, steps, seconds."""

    index: int
    heldout_before: float | None = None
    heldout: float | None = None
    calibration: float | None = None
    best_step: int | None = None
    steps: int | None = None
    seconds: float


class FinishFigures(_Part):
    """The end-to-end stage: its loss on held-out windows before and after, its learning rate, steps."""

    method: str
    loss: str
    heldout_before: float
    heldout: float
    calibration: float | None = None
    learning_rate: LearningRateFacts
    best_step: int
    steps: int


class Figures(_Part):
    """What one cell measured; ``perplexity`` is by the name of the text, its recipe's digest is ``compress run``'s."""

    recipe_sha256: str
    perplexity: dict[str, TextPerplexity]
    sparsity: float
    losses: Losses | None = None
    seconds: Seconds
    peak_memory_bytes: PeakMemory = PeakMemory()
    trained_parameters: int | None = None
    learning_rate: LearningRateFacts | None = None
    finish: FinishFigures | None = None
    blocks: tuple[BlockFigures, ...] = ()
    notices: tuple[str, ...] = ()


class Scores(_Part):
    """What zero-shot tasks gave on one model, and the wall seconds that they took."""

    results: tuple[TaskResult, ...]
    seconds: float


class TaskFacts(_Part):
    """The zero-shot tasks that models were scored on.

    Attributes:
        names: What was asked for: tasks, groups or tags.
        folder: Name of the folder of local tasks.
        folder_sha256: Digest of what lies in it.
        limit: Documents per task, the first ones; None: all.
        max_tokens: Tokens that the model was given at once.
        lm_eval: Version of lm-eval-harness.
        dense: Scores of the dense model.
    """

    names: tuple[str, ...]
    folder: str | None = None
    folder_sha256: str | None = None
    limit: int | None = None
    max_tokens: int
    lm_eval: str
    dense: Scores | None = None


class CellRow(_Part):
    """One cell: what it is, and what it measured or why it failed. A cell not yet made has neither.

    One that failed while its tasks were run has both.

    Attributes:
        table: Which table of the grid it belongs to; "" in a grid of one.
        pruner: How weights were chosen.
        recovery: How kept weights were repaired.
        target: ``"0.5"``, or ``"2:4"``.
        target_sparsity: The share of zeros that this means.
        variant: Its settings' name; "" without variants.
        settings: Recipe settings that its table and variant add to those of the whole grid.
        masks: Whether it started from the shared pruned model or pruned along its own repaired blocks.
        fingerprint: Digest of all that decides its figures; names its file in the state folder.
        scores: Of the model that it ends with; None without tasks.
    """

    table: str = ""
    pruner: str
    recovery: str
    target: str
    target_sparsity: float
    variant: str = ""
    settings: dict[str, Any] = {}
    masks: Literal["shared", "own"] = "own"
    fingerprint: str | None = None
    figures: Figures | None = None
    scores: Scores | None = None
    failure: CellFailure | None = None

    @property
    def status(self) -> Literal["done", "failed", "open"]:
        """Whether the cell was made."""
        if self.failure is not None:
            return "failed"
        return "open" if self.figures is None else "done"

    @property
    def method(self) -> str:
        """What is compared: recovery and variant."""
        return f"{self.recovery} · {self.variant}" if self.variant else self.recovery


class Comparison(_Part):
    """The whole document. Equal grids on equal inputs give equal ones but for seconds, memory and versions."""

    schema_version: Literal[1] = 1
    command: Literal["compare"] = "compare"
    model: ModelFacts
    device: str
    texts: dict[str, PerplexityProtocol]
    calibration: CalibrationFacts
    isolated: bool
    cells: tuple[CellRow, ...]
    recipe: dict[str, Any]
    tasks: TaskFacts | None = None
    versions: dict[str, str] = {}
    notices: tuple[str, ...] = ()

    def tree(self) -> dict[str, Any]:
        """The document as JSON-ready dicts and lists, with each cell's status and ``nonfinite`` as its last key."""
        fields = self.model_dump()
        for row, cell in zip(fields["cells"], self.cells, strict=True):
            row["status"] = cell.status
        tree, nonfinite = finite_tree(fields)
        return {**tree, "nonfinite": nonfinite}

    def to_json(self) -> str:
        """The document as indented JSON, valid by RFC 8259 whatever was measured."""
        return json.dumps(self.tree(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


Measured = TypeVar("Measured", Figures, Scores)


def measured_tree(measured: Figures | Scores) -> dict[str, Any]:
    """One cell's figures, or one model's scores, as JSON-ready dicts and lists."""
    tree, nonfinite = finite_tree(measured.model_dump())
    return {**tree, "nonfinite": nonfinite}


def measured_from_tree(kind: type[Measured], tree: Mapping[str, Any]) -> Measured:
    """The figures or scores that :func:`measured_tree` turned into dicts and lists.

    Raises:
        ValueError: It is something else.
    """
    fields = json.loads(json.dumps(dict(tree)))
    restore_numbers(fields, fields.pop("nonfinite", {}))
    return kind.model_validate(fields)


def comparison_from_tree(tree: Mapping[str, Any]) -> Comparison:
    """The document that :meth:`Comparison.tree` turned into dicts and lists.

    Raises:
        InputRefused: It has another schema version, or is something else.
    """
    version = tree.get("schema_version")
    if version != SCHEMA_VERSION:
        raise InputRefused(
            "E-REPORT-SCHEMA",
            f"compare.json has schema {version}; this version reads {SCHEMA_VERSION}",
            "run compress compare again",
        )
    try:
        fields = json.loads(json.dumps(dict(tree)))
        restore_numbers(fields, fields.pop("nonfinite", {}))
        for row in fields["cells"]:
            row.pop("status", None)
        return Comparison.model_validate(fields)
    except (ValidationError, ValueError, KeyError, TypeError, AttributeError) as error:
        first = str(error).splitlines()[0]
        raise InputRefused(
            "E-REPORT-UNREADABLE", f"compare.json: {first}", "run compress compare again"
        ) from None
