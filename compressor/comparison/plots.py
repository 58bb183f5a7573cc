"""The drawings of a comparison: perplexity over sparsity, and perplexity over the time that a method takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.comparison.cells import target_label
from compressor.comparison.results import CellRow, Comparison
from compressor.report import svg, units
from compressor.report.axes import canvas, log_ticks, shortened

_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
_HEIGHT = 270.0  # points


@dataclass(frozen=True)
class Style:
    """How one method is drawn, in every drawing of a page."""

    colour: str
    marker: str


@dataclass(frozen=True)
class LegendEntry:
    """One line of the legend: the CSS variable of its colour, and its name."""

    variable: str
    name: str


@dataclass(frozen=True)
class Drawing:
    """An SVG element and its heading."""

    title: str
    svg: str


def styles(comparison: Comparison) -> dict[str, Style]:
    """A style for each method in order of appearance; without a recovery it is grey."""
    methods = dict.fromkeys(cell.method for cell in comparison.cells)
    found, place = {}, 0
    for method in methods:
        if method == "none":
            found[method] = Style(svg.DENSE, "o")
            continue
        turn = place // len(svg.SERIES)
        found[method] = Style(svg.SERIES[place % len(svg.SERIES)], _MARKERS[turn % len(_MARKERS)])
        place += 1
    return found


def legend(comparison: Comparison) -> list[LegendEntry]:
    """What each colour stands for; methods beyond the eight colours repeat them with another marker."""
    named = {"none": "pruned only"}
    return [
        LegendEntry(svg.variable(style.colour), named.get(method, method))
        for method, style in styles(comparison).items()
    ]


def sparsity_drawings(comparison: Comparison, text: str) -> list[Drawing]:
    """Perplexity over sparsity, one drawing for each table and pruner; unstructured targets are joined by lines."""
    chosen = styles(comparison)
    drawings: list[Drawing] = []
    for (table, pruner), cells in _grouped(comparison.cells, lambda cell: (cell.table, cell.pruner)):
        points = [(cell, value) for cell in cells if (value := _recovered(cell, text)) is not None]
        if points:
            title = " · ".join(part for part in (table, pruner) if part)
            name = f"sparsity-{len(drawings)}"
            drawings.append(
                Drawing(title, _sparsity_plot(name, title, points, _dense(comparison, text), chosen))
            )
    return drawings


def time_drawings(comparison: Comparison, text: str) -> list[Drawing]:
    """Perplexity over the seconds of pruning, recovery and finish, one drawing for each table and target."""
    chosen, markers = styles(comparison), pruner_markers(comparison)
    drawings: list[Drawing] = []
    for (table, target), cells in _grouped(comparison.cells, lambda cell: (cell.table, cell.target)):
        points = [(cell, value) for cell in cells if (value := _recovered(cell, text)) is not None]
        if points:
            title = " · ".join(part for part in (table, target_label(target)) if part)
            name = f"time-{len(drawings)}"
            drawn = _time_plot(name, title, points, _dense(comparison, text), chosen, markers)
            drawings.append(Drawing(title, drawn))
    return drawings


def pruner_markers(comparison: Comparison) -> dict[str, str]:
    """The marker of each pruner in the drawings over time."""
    pruners = dict.fromkeys(cell.pruner for cell in comparison.cells)
    return {pruner: _MARKERS[place % len(_MARKERS)] for place, pruner in enumerate(pruners)}


def _grouped(cells: Iterable[CellRow], key: Any) -> list[tuple[tuple[str, str], list[CellRow]]]:
    groups: dict[tuple[str, str], list[CellRow]] = {}
    for cell in cells:
        groups.setdefault(key(cell), []).append(cell)
    return list(groups.items())


def _recovered(cell: CellRow, text: str) -> float | None:
    """The cell's perplexity where it can be drawn."""
    if cell.figures is None:
        return None
    value = cell.figures.perplexity[text].recovered
    return value if 0 < value < math.inf else None


def _dense(comparison: Comparison, text: str) -> float | None:
    known = (cell.figures.perplexity[text].dense for cell in comparison.cells if cell.figures is not None)
    return next((value for value in known if 0 < value < math.inf), None)


Points = Sequence[tuple[CellRow, float]]


def _sparsity_plot(
    name: str, title: str, points: Points, dense: float | None, chosen: dict[str, Style]
) -> str:
    targets = list(dict.fromkeys(cell.target for cell, _ in points))
    targets.sort(key=lambda target: (":" in target, float(target) if ":" not in target else 0))
    figure, axes = canvas(_HEIGHT, left=52, right=48, top=10, bottom=42)
    for method, style in chosen.items():
        own = {cell.target: value for cell, value in points if cell.method == method}
        lined = [target for target in targets if target in own and ":" not in target]
        look = {"color": style.colour, "zorder": 3}
        axes.plot([targets.index(t) for t in lined], [own[t] for t in lined], linewidth=1.8, **look)
        axes.scatter(
            [targets.index(target) for target in own], list(own.values()), s=34, marker=style.marker, **look
        )
    _perplexity_axis(axes, [value for _, value in points], dense)
    axes.set_xticks(range(len(targets)), [shortened(target_label(target)) for target in targets])
    axes.set_xlim(-0.4, len(targets) - 0.6)
    axes.set_xlabel("zeros in the pruned weights", color=svg.MUTED, fontsize=11, labelpad=4)
    return svg.inline_svg(figure, name, f"Perplexity over sparsity, log axis, {title}: {_spoken(points)}.")


def _time_plot(
    name: str,
    title: str,
    points: Points,
    dense: float | None,
    chosen: dict[str, Style],
    markers: dict[str, str],
) -> str:
    figure, axes = canvas(_HEIGHT, left=52, right=48, top=10, bottom=42)
    axes.set_xscale("log")
    seconds = []
    for cell, value in points:
        assert cell.figures is not None
        elapsed = max(cell.figures.seconds.method, 1e-3)
        seconds.append(elapsed)
        colour = chosen[cell.method].colour
        axes.scatter([elapsed], [value], s=44, marker=markers[cell.pruner], color=colour, zorder=3)
    _perplexity_axis(axes, [value for _, value in points], dense)
    low, high = min(seconds) / 1.4, max(seconds) * 1.4
    axes.set_xlim(low, high)
    log_ticks(axes.xaxis, low, high)
    axes.set_xlabel("seconds of pruning, recovery and finish", color=svg.MUTED, fontsize=11, labelpad=4)
    return svg.inline_svg(figure, name, f"Perplexity over seconds, log axes, {title}: {_spoken(points)}.")


def _perplexity_axis(axes: Any, values: Sequence[float], dense: float | None) -> None:
    """A log axis that shows all values, and the dense model's as a dashed line."""
    known = [*values, *([dense] if dense is not None else [])]
    low, high = min(known) / 1.15, max(known) * 1.15
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.grid(axis="y", color=svg.LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    log_ticks(axes.yaxis, low, high)
    if dense is not None:
        axes.axhline(dense, color=svg.MUTED, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
        axes.annotate(
            "dense",
            (1, dense),
            (6, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=svg.MUTED,
            fontsize=11,
            annotation_clip=False,
        )


def _spoken(points: Points) -> str:
    return ", ".join(
        f"{cell.pruner} {target_label(cell.target)} {cell.method} {units.perplexity(value)}"
        for cell, value in points
    )
