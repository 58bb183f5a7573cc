"""What the drawings share: an empty figure, ticks of a log axis, labels that fit."""

from __future__ import annotations

import math
from typing import Any

from compressor.report import svg, units

WIDTH = 440  # points: one column of the page, so that its text stays readable on a phone
LEGEND = {"frameon": False, "fontsize": 11, "labelcolor": svg.INK, "ncols": 3, "columnspacing": 1.4}


def canvas(
    height: float, *, left: float, right: float = 14, top: float = 12, bottom: float = 34
) -> tuple[Any, Any]:
    """An empty figure and its axes; height and margins in points."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH / 72, height / 72))
    inside = (WIDTH - left - right) / WIDTH, (height - top - bottom) / height
    axes = figure.add_axes((left / WIDTH, bottom / height, *inside))
    for side in axes.spines.values():
        side.set_visible(False)
    axes.tick_params(colors=svg.MUTED, labelsize=11, length=0, pad=5, which="both")
    return figure, axes


def log_ticks(axis: Any, low: float, high: float) -> None:
    """Round tick values on a log axis, written out, about three to six of them."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5)):
        ticks = [step * 10.0**decade for decade in decades for step in steps]
        ticks = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        if len(ticks) >= 3:
            break
    else:  # less than a decade: round steps of equal size
        ticks = [tick for tick in MaxNLocator(4).tick_values(low, high) if low <= tick <= high]
    axis.set_major_locator(FixedLocator(ticks[:: math.ceil(len(ticks) / 6) or 1] or [low]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: units.number(float(f"{value:.3g}"), 3))


def shortened(label: str, limit: int = 26) -> str:
    """``label`` in at most ``limit`` characters, its end kept: that is where weights' names differ."""
    return label if len(label) <= limit else "…" + label[1 - limit :]
