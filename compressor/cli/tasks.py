"""Zero-shot tasks on the command line: the options, and the table of results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from compressor.cli.options import Decorator, flag
from compressor.cli.terminal import printable
from compressor.report.units import number, score

_SECTION = "Tasks (need lm-eval-harness)"


def task_names(value: str) -> tuple[str, ...]:
    """The names in ``a,b``, each once.

    Raises:
        click.BadParameter: There is none.
    """
    names = tuple(dict.fromkeys(name.strip() for name in value.split(",") if name.strip()))
    if not names:
        raise click.BadParameter("no task is named")
    return names


def task_options(function: Any) -> Any:
    """A decorator that adds ``--tasks``, ``--tasks-folder`` and ``--tasks-limit``."""
    options: tuple[Decorator, ...] = (
        flag(
            _SECTION,
            "--tasks",
            type=task_names,
            callback=lambda _context, _option, names: names or (),
            metavar="NAME[,NAME]",
            help="Run these zero-shot tasks, scored by likelihood.",
        ),
        flag(
            _SECTION,
            "--tasks-folder",
            metavar="FOLDER",
            help="Local tasks: YAML files, data files named from there. Code that they name is run.",
        ),
        flag(
            _SECTION,
            "--tasks-limit",
            type=click.IntRange(min=1),
            metavar="N",
            help="Documents per task, the first ones; all by default.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def task_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines with the scores of each task's metrics, and nothing without tasks.

    Args:
        rows: ``tasks`` of the report.
    """
    if not rows:
        return []
    cells: list[tuple[str, ...]] = [("task", "metric", "ONNX Runtime", "PyTorch", "documents")]
    for row in rows:
        scores = ("–" if row[key] is None else score(**row[key]) for key in ("onnx", "recovered"))
        cells.append((printable(row["task"]), printable(row["metric"]), *scores, number(row["documents"])))
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    return [
        "  "
        + "  ".join(
            text.ljust(width) if column < 2 else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
