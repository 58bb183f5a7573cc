"""A comparison that nobody computed, for the tests of what is written of one."""

from __future__ import annotations

import math
from typing import Any

from compressor.comparison.failures import CellFailure
from compressor.comparison.results import (
    CellRow,
    Comparison,
    Figures,
    Losses,
    Scores,
    Seconds,
    TaskFacts,
    TextPerplexity,
)
from compressor.report.schema import (
    CalibrationFacts,
    LearningRateFacts,
    ModelFacts,
    PeakMemory,
    PerplexityProtocol,
)
from validators.checks import TaskResult

DENSE = 9.76


def figures(pruned: float, recovered: float, *, recovery_s: float = 0.0, text: str = "valid.txt") -> Figures:
    """What a cell measured, on one text."""
    trained = recovery_s > 0
    return Figures(
        recipe_sha256="ab" * 32,
        perplexity={text: TextPerplexity(dense=DENSE, pruned=pruned, recovered=recovered)},
        sparsity=0.5,
        losses=Losses(unit="share", heldout_before=0.1, heldout=0.02, calibration=0.015) if trained else None,
        seconds=Seconds(pruning=2.0, recovery=recovery_s, cell=recovery_s + 4.0),
        peak_memory_bytes=PeakMemory(host=700_000_000),
        trained_parameters=555_000 if trained else None,
        learning_rate=LearningRateFacts(chosen=0.01, tried=(0.003, 0.01, 0.03)) if trained else None,
    )


def cell(pruner: str, target: str, recovery: str, found: Figures | None = None, **changes: Any) -> CellRow:
    """One cell of the table."""
    share = 1 - int(target[0]) / int(target[-1]) if ":" in target else float(target)
    return CellRow(
        pruner=pruner,
        recovery=recovery,
        target=target,
        target_sparsity=share,
        figures=found,
        masks="shared",
        fingerprint="cd" * 32,
        **changes,
    )


def scores(accuracy: float, perplexity: float) -> Scores:
    """What two tasks gave on a model."""
    results = (
        TaskResult("piqa", "acc", accuracy, 0.0101, 1838, True),
        TaskResult("text", "word_perplexity", perplexity, None, 3, False),
    )
    return Scores(results=results, seconds=60.0)


def scored_comparison() -> Comparison:
    """A cell that was scored, one whose tasks failed and one that is not made yet."""
    failure = CellFailure(error_id="E-OUT-OF-MEMORY", message="too little", remedy="use less", exit_code=5)
    cells = (
        cell("wanda", "0.5", "none", figures(20.0, 20.0), scores=scores(0.7123, math.inf)),
        cell("wanda", "0.5", "ebft", figures(20.0, 10.0), failure=failure),
        cell("wanda", "2:4", "none"),
    )
    tasks = TaskFacts(
        names=("piqa", "text"),
        folder="mine",
        limit=2000,
        max_tokens=2048,
        lm_eval="0.4.13",
        dense=scores(0.7512, 12.345),
    )
    return sample_comparison(cells=cells, tasks=tasks)


def sample_comparison(**changes: Any) -> Comparison:
    """Two pruners, three targets, pruned only and repaired; one cell failed, one is infinite."""
    cells = []
    for pruner, worse in (("wanda", 1.0), ("sparsegpt", 0.9)):
        for target, pruned in (("0.5", 20.0), ("0.7", 300.0), ("2:4", 60.0)):
            cells.append(cell(pruner, target, "none", figures(pruned * worse, pruned * worse)))
            repaired = figures(pruned * worse, pruned * worse / 2, recovery_s=30.0)
            cells.append(cell(pruner, target, "ebft", repaired))
    cells.append(cell("magnitude", "0.7", "none", figures(math.inf, math.inf)))
    failure = CellFailure(
        error_id="E-GRID-METHOD",
        message="there is no recovery named spp",
        remedy="there are ebft",
        exit_code=2,
    )
    cells.append(cell("magnitude", "0.7", "spp", failure=failure))
    protocol = PerplexityProtocol(
        source="valid.txt",
        sha256="ef" * 32,
        window=256,
        stride=256,
        windows=64,
        tokens=16320,
        dtype="float32",
    )
    return Comparison(
        model=ModelFacts(name="tiny", architecture="Llama", parameters=1_300_000),
        device="cpu",
        texts={"valid.txt": protocol},
        calibration=CalibrationFacts(source="calib.txt", protocol={"sampler": "joined", "windows": 112}),
        isolated=True,
        cells=tuple(cells),
        recipe={"pruning": {"method": "wanda"}, "seed": 0},
        versions={"torch": "2.13"},
    ).model_copy(update=changes)
