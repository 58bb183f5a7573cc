"""What zero-shot tasks gave, as rows of text: the dense model first, then each cell, then the documents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.comparison.cells import target_label
from compressor.comparison.results import CellRow, Comparison, Scores
from compressor.comparison.table import OPEN, TableText
from compressor.report.units import number, score
from validators.checks import TaskResult

Measure = tuple[str, str]  # a task and a metric of it


def task_tables(comparison: Comparison) -> list[TableText]:
    """A table of scores for each table of the grid; none without tasks."""
    measures = measures_of(comparison)
    if comparison.tasks is None or not measures:
        return []
    names = dict.fromkeys(cell.table for cell in comparison.cells)
    return [
        _table(comparison, measures, name, [cell for cell in comparison.cells if cell.table == name])
        for name in names
    ]


def measures_of(comparison: Comparison) -> dict[Measure, TaskResult]:
    """Every task and metric that some model was scored by, with the first result, in lm-eval's order."""
    dense = comparison.tasks.dense if comparison.tasks is not None else None
    found: dict[Measure, TaskResult] = {}
    for scores in (dense, *(cell.scores for cell in comparison.cells)):
        for measure, result in by_measure(scores).items():
            found.setdefault(measure, result)
    return found


def by_measure(scores: Scores | None) -> dict[Measure, TaskResult]:
    """The results of one model by task and metric; none where it was not scored."""
    return {} if scores is None else {(one.task, one.metric): one for one in scores.results}


def _table(
    comparison: Comparison, measures: Mapping[Measure, TaskResult], name: str, cells: Sequence[CellRow]
) -> TableText:
    dense = comparison.tasks.dense if comparison.tasks is not None else None
    rows = [("dense model", "", "", *_words(measures, dense))]
    for cell in cells:
        words = _words(measures, cell.scores)
        if cell.scores is None:
            words[0] = cell.failure.error_id if cell.failure is not None else OPEN
        rows.append((target_label(cell.target), cell.pruner, cell.method, *words))
    rows.append(("documents", "", "", *(number(first.documents) for first in measures.values())))
    return TableText(
        name=name,
        columns=("target", "pruner", "recovery", *map(_heading, measures.values())),
        rows=tuple(rows),
        figures=(False,) * 3 + (True,) * len(measures),
        best=frozenset(),
    )


def _words(measures: Mapping[Measure, TaskResult], scores: Scores | None) -> list[str]:
    found = by_measure(scores)
    return [score(found[each].value, found[each].stderr) if each in found else "" for each in measures]


def _heading(result: TaskResult) -> str:
    """``piqa acc ↑`` where more is better."""
    arrow = {True: " ↑", False: " ↓", None: ""}[result.higher_is_better]
    return f"{result.task} {result.metric}{arrow}"
