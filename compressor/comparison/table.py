"""The tables of a comparison as rows of text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.comparison.cells import target_label
from compressor.comparison.results import CellRow, Comparison, Figures, FinishFigures, Losses
from compressor.report.tables import setting
from compressor.report.units import MISSING, byte_size, count, duration, number, percent, perplexity

OPEN = "not made yet"
# Columns that a narrow terminal goes without, first the one that is missed least; files have them all.
_DISPENSABLE = (
    "calibration loss",
    "finish calibration",
    "trained",
    "learning rate",
    "finish held-out",
    "held-out loss",
    "zeros",
    "device peak",
    "host peak",
    "pruning time",
    "gap closed",
    "finish time",
    "recovery time",
)


@dataclass(frozen=True)
class TableText:
    """One table of the grid in words.

    Attributes:
        name: Of the table; "" in a grid of one.
        columns: Their headings.
        rows: Cells of text, one row per cell of the grid.
        figures: Which columns hold numbers.
        best: Rows whose perplexity is the lowest of their target on the first text.
        best_column: Where that perplexity stands.
        settings: What was set for all of it, and for each variant, in words.
    """

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    figures: tuple[bool, ...]
    best: frozenset[int]
    best_column: int = 4
    settings: tuple[str, ...] = ()

    def narrowed(self, width: int) -> TableText:
        """The table without its less important columns, as many as it takes to be printed ``width`` signs wide."""
        table = self
        for name in _DISPENSABLE:
            if max(map(len, plain_lines(table)), default=0) <= width:
                break
            table = table._only(
                [place for place, column in enumerate(table.columns) if not column.startswith(name)]
            )
        return table

    def parts(self, width: int) -> list[TableText]:
        """The table side by side in pieces that are printed ``width`` signs wide, or have one figure column each.

        What a row is stands at the beginning of every piece.
        """
        head = [place for place, figure in enumerate(self.figures) if not figure]
        pieces: list[list[int]] = []
        for place in range(len(head), len(self.columns)):
            wider = [*(pieces[-1] if pieces else head), place]
            if pieces and max(map(len, plain_lines(self._only(wider)))) <= width:
                pieces[-1] = wider
            else:
                pieces.append([*head, place])
        return [self._only(piece) for piece in pieces]

    def _only(self, places: Sequence[int]) -> TableText:
        """The table with some of its columns."""
        return replace(
            self,
            columns=tuple(self.columns[place] for place in places),
            rows=tuple(tuple(row[place] for place in places) for row in self.rows),
            figures=tuple(self.figures[place] for place in places),
        )


def tables_of(comparison: Comparison) -> list[TableText]:
    """Each table of the grid; columns in which no cell has anything are left out."""
    names = dict.fromkeys(cell.table for cell in comparison.cells)
    return [
        _table(comparison, name, [cell for cell in comparison.cells if cell.table == name]) for name in names
    ]


def gap_closed(figures: Figures, text: str) -> float | None:
    """(pruned - recovered) / (pruned - dense): the share of what pruning cost that came back; None without a cost."""
    found = figures.perplexity[text]
    cost = found.pruned - found.dense
    if not math.isfinite(cost) or cost <= 0 or not math.isfinite(found.recovered):
        return None
    return (found.pruned - found.recovered) / cost


def learning_rate(figures: Figures) -> float | None:
    """The learning rate of the repair, else that of the finish; None where nothing was trained."""
    if figures.learning_rate is not None:
        return figures.learning_rate.chosen
    return figures.finish.learning_rate.chosen if figures.finish is not None else None


def plain_lines(table: TableText) -> list[str]:
    """The table in columns of plain text, the best of each target with a star."""
    words = [
        (*table.columns, ""),
        *((*row, "*" if at in table.best else "") for at, row in enumerate(table.rows)),
    ]
    widths = [max(map(len, column)) for column in zip(*words, strict=True)]
    right = (*table.figures, False)
    return [
        "  ".join(
            word.rjust(width) if figure else word.ljust(width)
            for word, width, figure in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in words
    ]


def _table(comparison: Comparison, name: str, cells: Sequence[CellRow]) -> TableText:
    texts = list(comparison.texts)
    rows = [_words(cell, texts) for cell in cells]
    columns = [*_columns(texts)]
    used = [place for place in range(len(columns)) if place < 3 or any(row[place] for row in rows)]
    return TableText(
        name,
        tuple(columns[place] for place in used),
        tuple(tuple(row[place] for place in used) for row in rows),
        tuple(place > 2 for place in used),
        _best(cells, texts[0]),
        settings=_settings(cells),
    )


def _settings(cells: Sequence[CellRow]) -> tuple[str, ...]:
    """``variant: key = value, …`` for each variant of a table; pruned only has none of a recovery's settings."""
    widest: dict[str, Mapping[str, object]] = {}
    for cell in cells:
        if len(cell.settings) > len(widest.get(cell.variant, {})):
            widest[cell.variant] = cell.settings
    return tuple(
        f"{variant or 'all'}: {', '.join(f'{key} = {setting(value)}' for key, value in settings.items())}"
        for variant, settings in widest.items()
    )


def _columns(texts: Sequence[str]) -> Iterator[str]:
    yield from ("target", "pruner", "recovery")
    for text in texts:
        suffix = f" on {text}" if len(texts) > 1 else ""
        yield from (f"pruned{suffix}", f"recovered{suffix}", f"gap closed{suffix}")
    yield from ("zeros", "held-out loss", "calibration loss", "learning rate")
    yield from ("finish held-out", "finish calibration", "trained")
    yield from ("pruning time", "recovery time", "finish time", "host peak", "device peak")


def _words(cell: CellRow, texts: Sequence[str]) -> tuple[str, ...]:
    """The row of one cell; "" where it has nothing to say."""
    head = (target_label(cell.target), cell.pruner, cell.method)
    figures = cell.figures
    if figures is None:
        why = cell.failure.error_id if cell.failure is not None else OPEN
        return (*head, why, *("" for _ in range(3 * len(texts) + 11)))
    found = []
    for text in texts:
        closed = gap_closed(figures, text)
        repaired = cell.recovery != "none" or figures.finish is not None
        found += [
            perplexity(figures.perplexity[text].pruned),
            perplexity(figures.perplexity[text].recovered),
            percent(closed) if closed is not None and repaired else "",
        ]
    losses, finish = figures.losses, figures.finish
    seconds, peaks = figures.seconds, figures.peak_memory_bytes
    rate = learning_rate(figures)
    rest = (
        percent(figures.sparsity, 2),
        _heldout(losses),
        _calibration(losses),
        number(rate, 3) if rate is not None else "",
        _heldout(finish),
        _calibration(finish),
        count(figures.trained_parameters) if figures.trained_parameters is not None else "",
        duration(seconds.pruning),
        duration(seconds.recovery) if seconds.recovery else "",
        duration(seconds.finish) if seconds.finish else "",
        byte_size(peaks.host) if peaks.host is not None else "",
        byte_size(peaks.device) if peaks.device is not None else "",
    )
    return (*head, *found, *(word if word != MISSING else "" for word in rest))


def _heldout(stage: Losses | FinishFigures | None) -> str:
    return f"{number(stage.heldout_before, 3)} → {number(stage.heldout, 3)}" if stage else ""


def _calibration(stage: Losses | FinishFigures | None) -> str:
    return number(stage.calibration, 3) if stage and stage.calibration is not None else ""


def _best(cells: Sequence[CellRow], text: str) -> frozenset[int]:
    """The rows with the lowest perplexity of their target."""
    lowest: dict[str, tuple[float, int]] = {}
    for place, cell in enumerate(cells):
        if cell.figures is not None:
            value = cell.figures.perplexity[text].recovered
            if not math.isnan(value) and value < lowest.get(cell.target, (math.inf, -1))[0]:
                lowest[cell.target] = (value, place)
    return frozenset(place for _, place in lowest.values())
