"""A measurement as rows of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from compressor.report.units import MISSING, byte_size, duration, number, percent
from validators.speed.figures import Figure, figure
from validators.speed.results import ModelSpeed, Speed, decode_rate, prefill_rate


@dataclass(frozen=True)
class SpeedTable:
    """A table in words: the first column names the model, the others are figures."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables_of(speed: Speed) -> list[SpeedTable]:
    """Decoding and prefill for each batch size, then sizes."""
    speeds = [table(speed, batch) for batch in speed.workload.batches for table in (_decoding, _prefill)]
    return [*speeds, _sizes(speed)]


def protocol_lines(speed: Speed) -> list[str]:
    """How it was measured, one fact a line."""
    work, roof = speed.workload, figure(speed.bandwidth)
    return [
        f"{work.threads} {'thread' if work.threads == 1 else 'threads'}, no spinning; each model in a process of its "
        f"own, {work.rounds} rounds in turns; medians ± half the distance of the quartiles",
        f"prefill: {work.prompt_tokens} random tokens, logits of all of them; decode: {work.decode_tokens} single "
        f"tokens over the cache, {work.prompt_tokens} past tokens at first; seed {work.seed}",
        "anonymous and mapped memory: after loading and a few tokens; after all rounds: with what prompts take",
        f"ratios are medians of the ratios within each round; loading: median of {work.loads}, files in memory",
        f"memory reads at {_gigabytes(roof.median)} (numpy, in the same rounds); reached: bytes of the weights of "
        "one step over its time, without caches and activations",
    ]


def _decoding(speed: Speed, batch: int) -> SpeedTable:
    columns = ("model", "tokens/s", "a step", "weights/step", "reached", "of the roof", *_over(speed))
    rows = []
    for model in speed.models:
        seconds = figure(model.at(batch).step_s).median
        rows.append(
            (
                model.name,
                with_spread(decode_rate(model.at(batch))),
                short_duration(seconds),
                byte_size(model.contents.bytes_per_step),
                _gigabytes(model.bytes_per_s(batch)),
                percent(speed.share_of_bandwidth(model, batch), 0),
                *_ratios(speed, model, partial(speed.decode_ratio, batch=batch)),
            )
        )
    return SpeedTable(f"decoding, batch {batch}", columns, tuple(rows))


def _prefill(speed: Speed, batch: int) -> SpeedTable:
    columns = ("model", "tokens/s", "first token", *_over(speed))
    rows = []
    for model in speed.models:
        rounds = model.at(batch)
        rows.append(
            (
                model.name,
                with_spread(prefill_rate(rounds, speed.workload.prompt_tokens)),
                short_duration(figure(rounds.prefill_s).median),
                *_ratios(speed, model, partial(speed.prefill_ratio, batch=batch)),
            )
        )
    return SpeedTable(f"prefill, batch {batch}", columns, tuple(rows))


def _over(speed: Speed) -> tuple[str, ...]:
    return tuple(f"/ {name}" for name in speed.baselines)


def _ratios(speed: Speed, model: ModelSpeed, ratio: Callable[[ModelSpeed, str], Figure]) -> list[str]:
    """Against each baseline; nothing against itself."""
    return ["" if name == model.name else f"{ratio(model, name).median:.2f}×" for name in speed.baselines]


def _sizes(speed: Speed) -> SpeedTable:
    columns = ("model", "file", "anonymous", "mapped", "after all rounds", "load", "products", "library")
    rows = tuple(
        (
            model.name,
            byte_size(model.contents.file_bytes),
            byte_size(model.anonymous_bytes),
            byte_size(model.mapped_bytes),
            byte_size(model.working_bytes),
            short_duration(figure(model.load_s).median),
            str(model.contents.products),
            (model.library or MISSING_LIBRARY) if model.contents.has_own_operators else "-",
        )
        for model in speed.models
    )
    return SpeedTable("size and memory", columns, rows)


MISSING_LIBRARY = "not installed"


def with_spread(value: Figure) -> str:
    """``12.3 ± 0.4``: the median, and half of the distance of the quartiles."""
    return f"{number(value.median, 3)} ± {number((value.high - value.low) / 2, 2)}"


def short_duration(seconds: float) -> str:
    """Milliseconds below a second."""
    return f"{number(1000 * seconds, 3)} ms" if seconds < 1 else duration(seconds)


def _gigabytes(bytes_per_s: float | None) -> str:
    return MISSING if bytes_per_s is None else f"{number(bytes_per_s / 1e9, 3)} GB/s"
