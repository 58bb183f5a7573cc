"""The drawings of a measurement: bars of speed with their spread, and of memory and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compressor.report import svg, units
from compressor.report.axes import LEGEND, canvas, shortened
from compressor.speed.table import with_spread
from validators.speed.figures import Figure
from validators.speed.results import ModelSpeed, Speed, decode_rate, prefill_rate

_ROW = 34.0  # points of height for one bar
_WORDS = {"va": "center", "fontsize": 12, "annotation_clip": False, "textcoords": "offset points"}


def decode_plot(speed: Speed, batch: int) -> str:
    """Tokens per second of decoding, one bar for each model, the roof of each as a mark."""
    rates = [decode_rate(model.at(batch)) for model in speed.models]
    roofs = [_roof(speed, model, batch) for model in speed.models]
    return _rate_plot(speed, f"decode-{batch}", f"Tokens per second of decoding, batch {batch}", rates, roofs)


def prefill_plot(speed: Speed, batch: int) -> str:
    """Tokens per second of the prefill, one bar for each model."""
    rates = [prefill_rate(model.at(batch), speed.workload.prompt_tokens) for model in speed.models]
    title = f"Prompt tokens per second, batch {batch}"
    return _rate_plot(speed, f"prefill-{batch}", title, rates, [None] * len(rates))


def memory_plot(speed: Speed) -> str | None:
    """Anonymous and mapped memory, stacked; None where the system does not tell."""
    if any(model.anonymous_bytes is None or model.mapped_bytes is None for model in speed.models):
        return None
    return _stacked_plot(
        speed,
        "memory",
        "Resident memory",
        (
            ("its own", svg.SERIES[0], lambda model: model.anonymous_bytes or 0),
            ("pages of its files", svg.GRAPH, lambda model: model.mapped_bytes or 0),
        ),
    )


def file_plot(speed: Speed) -> str:
    """Bytes of the files."""
    return _stacked_plot(
        speed,
        "files",
        "Bytes of the files",
        (("file", svg.SERIES[0], lambda model: model.contents.file_bytes),),
    )


def _roof(speed: Speed, model: ModelSpeed, batch: int) -> float | None:
    """Tokens per second if reading the weights were all that decoding does."""
    share = speed.share_of_bandwidth(model, batch)
    return None if not share else decode_rate(model.at(batch)).median / share


def _rate_plot(
    speed: Speed, name: str, title: str, rates: Sequence[Figure], roofs: Sequence[float | None]
) -> str:
    figure, axes = _bars(len(rates))
    end = max([rate.high for rate in rates] + [roof for roof in roofs if roof is not None])
    for place, (model, rate, roof) in enumerate(zip(speed.models, rates, roofs, strict=True)):
        colour = svg.DENSE if model.name in speed.baselines else svg.SERIES[0]
        axes.barh(place, rate.median, height=0.62, color=colour, linewidth=0)
        axes.plot([rate.low, rate.high], [place, place], color=svg.INK, linewidth=1.6)
        if roof is not None:
            axes.plot([roof, roof], [place - 0.36, place + 0.36], color=svg.MUTED, linewidth=1.6)
        words = units.number(rate.median, 3) + ("" if roof is None else f" of {units.number(roof, 3)}")
        _words(axes, place, model.name, max(rate.high, roof or 0), words)
    _limits(axes, end, len(rates))
    spoken = ", ".join(f"{m.name} {with_spread(r)}" for m, r in zip(speed.models, rates, strict=True))
    return svg.inline_svg(figure, name, f"{title}: {spoken}.")


def _stacked_plot(
    speed: Speed, name: str, title: str, parts: Sequence[tuple[str, str, Callable[[ModelSpeed], int]]]
) -> str:
    legend = len(parts) > 1
    figure, axes = _bars(len(speed.models), bottom=32 if legend else 8)
    totals = [sum(size(model) for _, _, size in parts) for model in speed.models]
    starts = [0] * len(totals)
    for label, colour, size in parts:
        sizes = [size(model) for model in speed.models]
        axes.barh(range(len(sizes)), sizes, left=starts, height=0.62, color=colour, linewidth=0, label=label)
        starts = [start + one for start, one in zip(starts, sizes, strict=True)]
    for place, (model, total) in enumerate(zip(speed.models, totals, strict=True)):
        _words(axes, place, model.name, total, units.byte_size(total))
    _limits(axes, max(totals) or 1, len(totals))
    if legend:
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, 0.0), handlelength=0.9, handleheight=0.9, **LEGEND
        )
    spoken = ", ".join(f"{m.name} {units.byte_size(t)}" for m, t in zip(speed.models, totals, strict=True))
    return svg.inline_svg(figure, name, f"{title}: {spoken}.")


def _bars(count: int, bottom: float = 8) -> tuple[Any, Any]:
    return canvas(_ROW * count + bottom + 8, left=124, right=96, top=8, bottom=bottom)


def _words(axes: Any, place: int, label: str, end: float, words: str) -> None:
    """A bar's name to the left of the axis, its number behind its end."""
    left = {"xycoords": ("axes fraction", "data"), "ha": "right", "color": svg.INK, **_WORDS}
    axes.annotate(shortened(label, 18), (0, place), (-5, 0), **left)
    axes.annotate(words, (end, place), (7, 0), color=svg.INK, **_WORDS)


def _limits(axes: Any, end: float, bars: int) -> None:
    axes.set_xlim(0, end)
    axes.set_ylim(bars - 0.4, -0.6)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.axvline(0, color=svg.MUTED, linewidth=1)
