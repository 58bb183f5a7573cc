"""The table of a comparison as rows of text, and in the forms that other programs read: CSV and Markdown."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from compressor.comparison.cells import target_label
from compressor.comparison.results import CellRow, Comparison, Figures
from compressor.report.tables import setting
from compressor.report.units import MISSING, byte_size, count, duration, number, percent, perplexity

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
OPEN = "not made yet"
# Columns that a narrow terminal goes without, first the one that is missed least; files have them all.
_DISPENSABLE = (
    "calibration loss",
    "trained",
    "learning rate",
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
            keep = [place for place, column in enumerate(table.columns) if not column.startswith(name)]
            table = replace(
                table,
                columns=tuple(table.columns[place] for place in keep),
                rows=tuple(tuple(row[place] for place in keep) for row in table.rows),
                figures=tuple(table.figures[place] for place in keep),
            )
        return table


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


def protocol_lines(comparison: Comparison) -> list[str]:
    """How perplexity was measured, on which text; what cells had in common."""
    lines = []
    for name, text in comparison.texts.items():
        facts = (
            f"{text.windows} windows of {text.window} tokens",
            f"stride {text.stride}",
            f"{text.tokens} predicted tokens",
            f"BOS {text.bos}" if text.bos is not None else "",
            f"joined by {text.join}" if text.join not in (None, "single text") else "one text",
            text.dtype or "",
        )
        lines.append(
            f"perplexity on {name}: exp of the mean nats per token, {', '.join(f for f in facts if f)}"
        )
    lines.append(masks_sentence(comparison.cells))
    return lines


def masks_sentence(cells: Sequence[CellRow]) -> str:
    """What the recoveries of one pruner have in common."""
    if any(cell.masks == "shared" for cell in cells):
        return (
            "masks are shared: all recoveries of one pruner and sparsity start from the same pruned model, that of the "
            "pass without recovery, so they differ in the recovery alone; --masks own gives what compress run gives"
        )
    return (
        "masks are each cell's own, as in compress run: a block is pruned by what the repaired blocks before it give, "
        "so the same pruner chooses other weights after another recovery"
    )


def csv_text(comparison: Comparison) -> str:
    """One line per cell and text; numbers in full, empty where there is none."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for cell in comparison.cells:
        for text in comparison.texts if cell.figures is not None else ("",):
            writer.writerow(["" if value is None else value for value in _csv_row(cell, text)])
    return stream.getvalue()


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
        yield figures.trained_parameters
        yield from (seconds.pruning, seconds.recovery, seconds.finish, seconds.method, seconds.cell)
        yield from (figures.peak_memory_bytes.host, figures.peak_memory_bytes.device)
    yield figures.recipe_sha256 if figures is not None else None
    yield from (failure.error_id, failure.message) if failure else (None, None)


def learning_rate(figures: Figures) -> float | None:
    """The learning rate of the repair, else that of the finish; None where nothing was trained."""
    if figures.learning_rate is not None:
        return figures.learning_rate.chosen
    return figures.finish.learning_rate.chosen if figures.finish is not None else None


def markdown_text(comparison: Comparison) -> str:
    """The tables in Markdown, the best of each target in bold, the protocol below."""
    parts = [f"Dense model: {dense_sentence(comparison)}."]
    for table in tables_of(comparison):
        parts.append("\n".join([*([f"### {table.name}", ""] if table.name else []), *_markdown_lines(table)]))
        if table.settings:
            parts.append("\n".join(f"- {line}" for line in table.settings))
    parts.append("\n".join(f"- {line}" for line in protocol_lines(comparison)))
    return "\n\n".join(parts) + "\n"


def dense_sentence(comparison: Comparison) -> str:
    """The dense model's perplexity on each text."""
    done = next((cell.figures for cell in comparison.cells if cell.figures is not None), None)
    if done is None:
        return "perplexity not measured"
    found = (f"{perplexity(done.perplexity[name].dense)} on {name}" for name in comparison.texts)
    return f"perplexity {', '.join(found)}"


def _markdown_lines(table: TableText) -> list[str]:
    rule = ("---:" if right else "---" for right in table.figures)
    lines = [f"| {' | '.join(_escaped(table.columns))} |", f"|{'|'.join(rule)}|"]
    for place, row in enumerate(table.rows):
        words = _escaped(row)
        if place in table.best:
            words[table.best_column] = f"**{words[table.best_column]}**"
        lines.append(f"| {' | '.join(words)} |")
    return lines


def _escaped(words: Sequence[str]) -> list[str]:
    return [word.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ") for word in words]


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
    yield from ("zeros", "held-out loss", "calibration loss", "learning rate", "trained")
    yield from ("pruning time", "recovery time", "finish time", "host peak", "device peak")


def _words(cell: CellRow, texts: Sequence[str]) -> tuple[str, ...]:
    """The row of one cell; "" where it has nothing to say."""
    head = (target_label(cell.target), cell.pruner, cell.method)
    figures = cell.figures
    if figures is None:
        why = cell.failure.error_id if cell.failure is not None else OPEN
        return (*head, why, *("" for _ in range(3 * len(texts) + 9)))
    found = []
    for text in texts:
        closed = gap_closed(figures, text)
        repaired = cell.recovery != "none" or figures.finish is not None
        found += [
            perplexity(figures.perplexity[text].pruned),
            perplexity(figures.perplexity[text].recovered),
            percent(closed) if closed is not None and repaired else "",
        ]
    losses, seconds, peaks = figures.losses, figures.seconds, figures.peak_memory_bytes
    rate = learning_rate(figures)
    rest = (
        percent(figures.sparsity, 2),
        f"{number(losses.heldout_before, 3)} → {number(losses.heldout, 3)}" if losses else "",
        number(losses.calibration, 3) if losses and losses.calibration is not None else "",
        number(rate, 3) if rate is not None else "",
        count(figures.trained_parameters) if figures.trained_parameters is not None else "",
        duration(seconds.pruning),
        duration(seconds.recovery) if seconds.recovery else "",
        duration(seconds.finish) if seconds.finish else "",
        byte_size(peaks.host) if peaks.host is not None else "",
        byte_size(peaks.device) if peaks.device is not None else "",
    )
    return (*head, *found, *(word if word != MISSING else "" for word in rest))


def _best(cells: Sequence[CellRow], text: str) -> frozenset[int]:
    """The rows with the lowest perplexity of their target."""
    lowest: dict[str, tuple[float, int]] = {}
    for place, cell in enumerate(cells):
        if cell.figures is not None:
            value = cell.figures.perplexity[text].recovered
            if not math.isnan(value) and value < lowest.get(cell.target, (math.inf, -1))[0]:
                lowest[cell.target] = (value, place)
    return frozenset(place for _, place in lowest.values())
