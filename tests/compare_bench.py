"""Comparisons of the workshop's tiny model in this process, for the tests of what they measure and keep."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from workshop import Workshop

from compressor.comparing import ComparisonResult, compare
from compressor.comparison.grid import parse_grid
from compressor.progress import CellFinished, CellProgress, Event

LISTS = {"pruners": ["wanda", "sparsegpt"], "recoveries": ["none", "ebft"], "sparsities": [0.5]}


@dataclass
class Bench:
    """Comparisons of the workshop's model, in this process, with a recipe that takes a second."""

    workshop: Workshop
    events: list[Event] = field(default_factory=list)

    def run(self, out: Path, grid: dict[str, Any], **options: Any) -> ComparisonResult:
        """One comparison; ``events`` has what it told."""
        self.events.clear()
        texts = self.workshop.texts
        overrides = {
            "calibration.source": str(texts.calibration),
            "calibration.num_samples": 10,
            "calibration.seqlen": 24,
            "evaluation.source": str(texts.evaluation),
            "evaluation.max_windows": 8,
            "recovery.epochs": 1,
            "recovery.batch_size": 4,
            "recovery.lr": 1e-3,
            "recovery.window": "block",
            "finish.method": "none",
        }
        choices = {"isolate": False, "progress": self.events.append, **options}
        return compare(self.workshop.model, out, parse_grid(grid), overrides=overrides, **choices)

    def made(self) -> list[str]:
        """Labels of the cells that were made."""
        return [event.label for event in self.events if isinstance(event, CellFinished)]

    def began(self) -> bool:
        """Whether a cell has begun."""
        return any(isinstance(event, CellProgress) for event in self.events)
