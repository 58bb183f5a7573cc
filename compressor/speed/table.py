"""A measurement as rows of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """A table of speeds for each batch size, then one of sizes."""
    return [*(_speeds(speed, batch) for batch in speed.workload.batches), _sizes(speed)]


def protocol_lines(speed: Speed) -> list[str]:
    """How it was measured, one fact a line."""
    work, roof = speed.workload, figure(speed.bandwidth)
    return [
        f"{work.threads} {'thread' if work.threads == 1 else 'threads'}, no spinning; each model in a process of its "
        f"own, {work.rounds} rounds in turns; medians ± half the distance of the quartiles",
        f"prefill: {work.prompt_tokens} random tokens, logits of all of them; decode: {work.decode_tokens} single "
        f"tokens over the cache, {work.prompt_tokens} past tokens at first; seed {work.seed}",
        f"ratios are medians of the ratios within each round; loading: median of {work.loads}, files in memory",
        f"memory reads at {_gigabytes(roof.median)} (numpy, in the same rounds); reached: bytes of the weights of "
        "one step over its time, without caches and activations",
    ]


def _speeds(speed: Speed, batch: int) -> SpeedTable:
    ratios = [name for name in speed.baselines if len(speed.models) > 1]
    columns = (
        "model",
        "decode, tokens/s",
        "prefill, tokens/s",
        "first token",
        "weights/step",
        "reached",
        "of the roof",
        *(f"decode / {name}" for name in ratios),
        *(f"prefill / {name}" for name in ratios),
    )
    rows = tuple(_speed_row(speed, model, batch, ratios) for model in speed.models)
    return SpeedTable(f"batch {batch}", columns, rows)


def _speed_row(speed: Speed, model: ModelSpeed, batch: int, ratios: Sequence[str]) -> tuple[str, ...]:
    rounds = model.at(batch)
    others = [name for name in ratios if name != model.name]
    return (
        model.name,
        with_spread(decode_rate(rounds)),
        with_spread(prefill_rate(rounds, speed.workload.prompt_tokens)),
        short_duration(figure(rounds.prefill_s).median),
        byte_size(model.contents.bytes_per_step),
        _gigabytes(model.bytes_per_s(batch)),
        percent(speed.share_of_bandwidth(model, batch), 0),
        *(_times(speed.decode_ratio(model, name, batch)) if name in others else "" for name in ratios),
        *(_times(speed.prefill_ratio(model, name, batch)) if name in others else "" for name in ratios),
    )


def _sizes(speed: Speed) -> SpeedTable:
    columns = ("model", "file", "anonymous memory", "mapped", "load", "products", "library")
    rows = tuple(
        (
            model.name,
            byte_size(model.contents.file_bytes),
            byte_size(model.anonymous_bytes),
            byte_size(model.mapped_bytes),
            short_duration(figure(model.load_s).median),
            str(model.contents.products),
            (model.library or MISSING_LIBRARY) if model.contents.packed_products else "-",
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


def _times(value: Figure) -> str:
    return f"{value.median:.2f}×"


def _gigabytes(bytes_per_s: float | None) -> str:
    return MISSING if bytes_per_s is None else f"{number(bytes_per_s / 1e9, 3)} GB/s"
