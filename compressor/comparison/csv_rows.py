"""A comparison as CSV, for spreadsheets and data frames."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence

from compressor.comparison.results import CellRow, Comparison
from compressor.comparison.table import gap_closed, learning_rate
from compressor.comparison.task_table import Measure, by_measure, measures_of
from validators.checks import TaskResult

CSV_COLUMNS = (
    "table",
    "pruner",
    "target",
    "target_sparsity",
    "recovery",
    "variant",
    "masks",
    "status",
    "text",
    "perplexity_dense",
    "perplexity_pruned",
    "perplexity_recovered",
    "gap_closed",
    "sparsity",
    "heldout_loss_before",
    "heldout_loss",
    "calibration_loss",
    "learning_rate",
    "finish_heldout_loss_before",
    "finish_heldout_loss",
    "finish_calibration_loss",
    "finish_learning_rate",
    "trained_parameters",
    "pruning_s",
    "recovery_s",
    "finish_s",
    "method_s",
    "cell_s",
    "peak_host_bytes",
    "peak_device_bytes",
    "recipe_sha256",
    "error_id",
    "error",
)

_FORMULA = ("=", "+", "-", "@", "|")


def csv_text(comparison: Comparison) -> str:
    """One line per cell and text; numbers in full, empty where there is none.

    Each metric of a task has four columns behind the others, the same in every line of a cell.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    measures = list(measures_of(comparison))
    dense = by_measure(comparison.tasks.dense if comparison.tasks is not None else None)
    writer.writerow([*CSV_COLUMNS, *map(_shown, _task_columns(measures))])
    for cell in comparison.cells:
        scores = list(_task_values(measures, by_measure(cell.scores), dense))
        for text in comparison.texts if cell.figures is not None else ("",):
            writer.writerow([_shown(value) for value in (*_csv_row(cell, text), *scores)])
    return stream.getvalue()


def _shown(value: object) -> object:
    """A spreadsheet takes a text that begins like a formula for one and computes it: an apostrophe stops it."""
    if isinstance(value, str) and value.lstrip().startswith(_FORMULA):
        return f"'{value}"
    return "" if value is None else value


def _task_columns(measures: Sequence[Measure]) -> Iterator[str]:
    """``piqa_acc``, ``piqa_acc_stderr``, ``piqa_acc_documents`` and the dense model's ``piqa_acc_dense``."""
    for task, metric in measures:
        yield from (f"{task}_{metric}{suffix}" for suffix in ("", "_stderr", "_documents", "_dense"))


def _task_values(
    measures: Sequence[Measure], own: Mapping[Measure, TaskResult], dense: Mapping[Measure, TaskResult]
) -> Iterator[object]:
    for measure in measures:
        found, before = own.get(measure), dense.get(measure)
        yield from (found.value, found.stderr, found.documents) if found is not None else (None,) * 3
        yield before.value if before is not None else None


def _csv_row(cell: CellRow, text: str) -> Iterator[object]:
    figures, failure = cell.figures, cell.failure
    yield from (cell.table, cell.pruner, cell.target, cell.target_sparsity, cell.recovery, cell.variant)
    yield from (cell.masks, cell.status, text)
    if figures is None:
        yield from (None,) * (len(CSV_COLUMNS) - 12)
    else:
        found, losses, seconds = figures.perplexity[text], figures.losses, figures.seconds
        yield from (found.dense, found.pruned, found.recovered, gap_closed(figures, text), figures.sparsity)
        yield from (losses.heldout_before, losses.heldout, losses.calibration) if losses else (None,) * 3
        yield learning_rate(figures)
        finish = figures.finish
        yield from (finish.heldout_before, finish.heldout, finish.calibration) if finish else (None,) * 3
        yield finish.learning_rate.chosen if finish else None
        yield figures.trained_parameters
        yield from (seconds.pruning, seconds.recovery, seconds.finish, seconds.method, seconds.cell)
        yield from (figures.peak_memory_bytes.host, figures.peak_memory_bytes.device)
    yield figures.recipe_sha256 if figures is not None else None
    yield from (failure.error_id, failure.message) if failure else (None, None)
