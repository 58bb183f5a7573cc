"""The report's drawings: perplexities, losses by block, sparsity by weight, bytes by encoding."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from compressor.report import svg, units
from compressor.report.axes import LEGEND, WIDTH, canvas, log_ticks, shortened

if TYPE_CHECKING:
    from compressor.report.schema import BlockRow, PerplexityFacts, SizeFacts

ENCODING_NAMES = {"dense": "dense", "sparse": "sparse initializer", "packed": "packed"}
_ENCODING_COLOURS = {"dense": svg.DENSE, "sparse": svg.ONNX, "packed": svg.ONNX}

_LOG_FROM = 12.0  # perplexities that lie so many times apart need a logarithmic axis
_HEAT = (0x2F / 255, 0x7F / 255, 0xD6 / 255)  # its opacity is the sparsity, over the light or the dark page


def perplexity_plot(perplexity: PerplexityFacts) -> str | None:
    """Bars of the perplexities that were measured, or None when none was.

    From 0 on a linear axis, from 1 on a log axis where they lie far apart (bars as long as the loss in nats).
    """
    rows = [
        ("dense", perplexity.dense, svg.DENSE),
        ("pruned only", perplexity.pruned, svg.PRUNED),
        ("recovered", perplexity.recovered, svg.RECOVERED),
        ("ONNX Runtime", perplexity.onnx, svg.ONNX),
    ]
    if perplexity.quantized is not None:
        rows.insert(3, ("quantised", perplexity.quantized, svg.QUANTIZED))
    if all(value is None for _, value, _ in rows):
        return None
    drawable = [value for _, value, _ in rows if value is not None and 0 < value < math.inf] or [1.0]
    logarithmic = max(drawable) > _LOG_FROM * min(drawable) and min(drawable) > 1
    start, end, bottom = (1.0, max(drawable), 30) if logarithmic else (0.0, max(drawable), 12)
    figure, axes = canvas(34 * len(rows) + 10 + bottom, left=98, right=126, bottom=bottom)
    if logarithmic:
        axes.set_xscale("log")
    for place, (label, value, colour) in enumerate(rows):
        length = value - start if value is not None and value in drawable else 0.0
        axes.barh(place, length, left=start, height=0.62, color=colour, linewidth=0)
        against = units.change(value, perplexity.dense) if label != "dense" else None
        words = units.perplexity(value) + (f" ({against})" if against else "")
        _bar_words(axes, place, label, start + length, words, svg.MUTED if value is None else svg.INK)
    _bar_axes(axes, start, end, len(rows))
    if logarithmic:
        log_ticks(axes.xaxis, start, end)
    spoken = ", ".join(f"{label} {units.perplexity(value)}" for label, value, _ in rows)
    return svg.inline_svg(figure, "perplexity", f"Bars of perplexity, lower is better: {spoken}.")


def loss_plot(blocks: Sequence[BlockRow]) -> str | None:
    """Each block's loss before and after the repair on a log axis, or None where no block has losses.

    A loss of zero is drawn at the lower edge; one that is not finite is left out.
    """
    pairs = [
        (block.index, block.loss_before, block.loss_after)
        for block in blocks
        if block.loss_before is not None and block.loss_after is not None
    ]
    positive = [loss for _, *losses in pairs for loss in losses if 0 < loss < math.inf]
    if not positive:
        return None
    low, high = min(positive) / 1.7, max(positive) * 1.6
    indices = [index for index, _, _ in pairs]
    before, after = (
        [max(pair[place], low * 1.1) if math.isfinite(pair[place]) else math.nan for pair in pairs]
        for place in (1, 2)
    )
    size = 34 if len(pairs) <= 24 else 16 if len(pairs) <= 60 else 9
    figure, axes = canvas(250, left=50, top=34, bottom=42)
    axes.set_yscale("log")
    axes.vlines(indices, after, before, color=svg.LINE, linewidth=max(1.0, size / 9), zorder=1)
    hollow = {"facecolor": svg.CARD, "edgecolor": svg.PRUNED, "linewidth": 1.6}
    axes.scatter(indices, before, s=size, zorder=2, label="pruned only", **hollow)
    axes.scatter(
        indices, after, s=size * 1.3, color=svg.RECOVERED, linewidth=0, zorder=3, label="after repair"
    )
    axes.set_ylim(low, high)
    axes.set_xlim(min(indices) - 0.8, max(indices) + 0.8)
    axes.grid(axis="y", color=svg.LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    log_ticks(axes.yaxis, low, high)
    _block_ticks(axes, indices, indices)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.3, borderpad=0.2, **LEGEND)
    span = f"from {units.number(min(positive))} to {units.number(max(positive))}"
    return svg.inline_svg(
        figure, "losses", f"Loss of {len(pairs)} blocks before and after the repair, log axis, {span}."
    )


def sparsity_plot(table: Mapping[str, Mapping[int, float]]) -> str | None:
    """A heat map of sparsity, one row for each weight and one column for each block, or None without weights.

    Args:
        table: Row label to block index to sparsity, rows in the order they are drawn.
    """
    import numpy as np

    blocks = sorted({block for row in table.values() for block in row})
    if not blocks:
        return None
    shares = np.array(
        [[row.get(block, math.nan) for block in blocks] for row in table.values()]
    )  # (rows, blocks)
    rows, columns = shares.shape
    labels = [shortened(label) for label in table]
    left = min(170.0, 16 + 6.4 * max(len(label) for label in labels))
    cell = (WIDTH - left - 14) / columns  # points
    figure, axes = canvas(rows * max(15.0, min(25.0, 200 / rows)) + 44, left=left, top=6, bottom=38)
    image = np.full((rows, columns, 4), (*_HEAT, 0.0))
    image[..., 3] = np.nan_to_num(shares, nan=0.0)
    edges = (-0.5, columns - 0.5, rows - 0.5, -0.5)
    axes.imshow(image, interpolation="none", aspect="auto", extent=edges)
    axes.vlines(np.arange(columns + 1) - 0.5, -0.5, rows - 0.5, color=svg.CARD, linewidth=min(2.0, cell / 8))
    axes.hlines(np.arange(rows + 1) - 0.5, -0.5, columns - 0.5, color=svg.CARD, linewidth=2)
    for (row, column), share in np.ndenumerate(shares):
        words = "·" if math.isnan(share) else f"{100 * share:.0f}" if cell >= 30 else ""
        axes.text(column, row, words, ha="center", va="center_baseline", color=svg.INK, fontsize=10.5)
    for row, label in enumerate(labels):
        axes.text(-0.5 - 7 / cell, row, label, ha="right", va="center", color=svg.INK, fontsize=11)
    axes.set_yticks([])
    axes.axis(edges)
    _block_ticks(axes, blocks, range(columns))
    span = f"from {units.percent(float(np.nanmin(shares)))} to {units.percent(float(np.nanmax(shares)))}"
    return svg.inline_svg(
        figure, "sparsity", f"Heat map of sparsity, {rows} weights by {columns} blocks, {span}."
    )


def size_plot(size: SizeFacts) -> str | None:
    """Two stacked bars of bytes by encoding, all dense against this file, or None where sizes are unknown."""
    if not size.by_encoding or size.onnx_bytes is None:
        return None
    graph = max(0, size.onnx_bytes - sum(part.bytes for part in size.by_encoding.values()))
    parts = [
        (name, part.dense_bytes, part.bytes, _ENCODING_COLOURS.get(name, svg.RECOVERED))
        for name, part in sorted(size.by_encoding.items(), reverse=True)
    ]
    figure, axes = canvas(148, left=74, right=78, top=12, bottom=44)
    dense_total = stored_total = 0
    for name, dense_bytes, stored_bytes, colour in [*parts, ("graph", 0, graph, svg.GRAPH)]:
        bar = {"height": 0.62, "color": colour, "linewidth": 0}
        label = shortened(ENCODING_NAMES.get(name, name))
        axes.barh(0, dense_bytes, left=dense_total, alpha=0.45, **bar)
        axes.barh(1, stored_bytes, left=stored_total, label=label, **bar)
        dense_total, stored_total = dense_total + dense_bytes, stored_total + stored_bytes
    _bar_words(axes, 0, "all dense", dense_total, units.byte_size(dense_total))
    _bar_words(axes, 1, "this file", stored_total, units.byte_size(stored_total))
    _bar_axes(axes, 0, max(dense_total, stored_total) or 1, 2)
    boxes = {"handlelength": 0.9, "handleheight": 0.9, "handletextpad": 0.5}
    axes.legend(loc="upper left", bbox_to_anchor=(-0.02, 0.02), **boxes, **LEGEND)
    spoken = f"all dense {units.byte_size(dense_total)}, this file {units.byte_size(stored_total)}"
    return svg.inline_svg(figure, "sizes", f"Bytes by encoding: {spoken}.")


def _bar_words(axes: Any, place: int, label: str, end: float, words: str, colour: str = svg.INK) -> None:
    """A bar's name to the left of the axis, its number behind its end."""
    style = {"va": "center", "fontsize": 12, "annotation_clip": False, "textcoords": "offset points"}
    axes.annotate(
        label, (0, place), (-5, 0), xycoords=("axes fraction", "data"), ha="right", color=svg.INK, **style
    )
    axes.annotate(words, (end, place), (7, 0), color=colour, **style)


def _bar_axes(axes: Any, start: float, end: float, bars: int) -> None:
    """Limits of ``bars`` horizontal bars, first on top, and the line they begin at."""
    axes.set_xlim(start, end)
    axes.set_ylim(bars - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.axvline(start, color=svg.MUTED, linewidth=1)


def _block_ticks(axes: Any, blocks: Sequence[int], positions: Sequence[int]) -> None:
    """Block numbers under the axes: all of up to 14, else every so many."""
    step = next(
        step for step in (1, 2, 4, 5, 8, 10, 16, 20, 50, 100, len(blocks)) if len(blocks) <= 14 * step
    )
    axes.set_xticks(list(positions)[::step], [str(block) for block in blocks[::step]])
    axes.set_xlabel("block", color=svg.MUTED, fontsize=11, labelpad=4)
