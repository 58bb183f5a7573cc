"""The report's tables: weights, encodings, recipe."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.report import plots
from compressor.report.schema import Report, WeightRow

MAX_WEIGHT_ROWS = 700  # more weights than this are listed by parameter, not one by one
_UNSET = "not set"


@dataclass(frozen=True)
class RecipeSection:
    """One section of the recipe: the settings with a value, and the names of those without."""

    name: str
    settings: list[tuple[str, str]]
    unset: list[str]


_EXPERT = re.compile(r"\[\d+\]")


def is_expert(name: str) -> bool:
    """Whether the weight is one expert of a fused parameter."""
    return _EXPERT.search(name) is not None


def parameter(name: str) -> str:
    """A weight's name without expert number and ``.weight``."""
    return _EXPERT.sub("", name).removesuffix(".weight")


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """Each dotted name to its shortest tail, in whole parts, that no other name shares."""
    names = list(dict.fromkeys(names))
    tails = {}
    for name in names:
        parts = name.split(".")
        for keep in range(1, len(parts) + 1):
            tail = ".".join(parts[-keep:])
            if sum(other == tail or other.endswith("." + tail) for other in names) == 1:
                break
        tails[name] = tail
    return tails


def sparsity_table(weights: Iterable[WeightRow]) -> dict[str, dict[int, float]]:
    """Row label to block to sparsity; experts of one parameter are averaged."""
    cells: dict[str, dict[int, list[float]]] = {}
    for row in weights:
        cells.setdefault(parameter(row.name), {}).setdefault(row.block, []).append(row.sparsity)
    labels = _short_names(cells)
    return {
        labels[name]: {block: sum(shares) / len(shares) for block, shares in blocks.items()}
        for name, blocks in cells.items()
    }


def weight_rows(weights: tuple[WeightRow, ...]) -> list[dict[str, Any]]:
    """Table rows: each weight, or with very many of them each parameter over all blocks."""
    groups: dict[tuple[Any, str], list[WeightRow]] = {}
    one_by_one = len(weights) <= MAX_WEIGHT_ROWS
    for row in weights:
        groups.setdefault((row.block, row.name) if one_by_one else ("all", parameter(row.name)), []).append(
            row
        )
    return [
        {
            "block": block,
            "name": name,
            "matrices": len(rows),
            "shape": " × ".join(str(extent) for extent in rows[0].shape),
            "lowest": min(row.sparsity for row in rows),
            "highest": max(row.sparsity for row in rows),
            "encoding": ", ".join(sorted({row.encoding for row in rows if row.encoding})),
            "stored_bytes": _total(row.stored_bytes for row in rows),
            "dense_bytes": _total(row.dense_bytes for row in rows),
        }
        for (block, name), rows in groups.items()
    ]


def _total(sizes: Iterable[int | None]) -> int | None:
    known = list(sizes)
    return None if any(size is None for size in known) else sum(size for size in known if size is not None)


def encodings(report: Report) -> list[tuple[str, int | None, int, int | None]]:
    """Name, tensors, stored bytes and dense bytes of each encoding, then of the graph, then of all."""
    size = report.size
    rows: list[tuple[str, int | None, int, int | None]] = [
        (plots.ENCODING_NAMES.get(name, name), part.tensors, part.bytes, part.dense_bytes)
        for name, part in size.by_encoding.items()
    ]
    if size.onnx_bytes is not None:
        rows.append(
            (
                "graph",
                None,
                max(0, size.onnx_bytes - sum(part.bytes for part in size.by_encoding.values())),
                None,
            )
        )
        rows.append(("all", None, size.onnx_bytes, size.dense_bytes))
    return rows


def recipe_sections(recipe: Mapping[str, Any]) -> list[RecipeSection]:
    """The recipe's sections with their flattened settings; settings outside a section come last, as "run"."""
    parts = {name: part for name, part in recipe.items() if isinstance(part, Mapping)}
    loose = {name: value for name, value in recipe.items() if not isinstance(value, Mapping)}
    sections = []
    for name, part in {**parts, **({"run": loose} if loose else {})}.items():
        listed = list(settings(part))
        sections.append(
            RecipeSection(
                name,
                [(key, value) for key, value in listed if value != _UNSET],
                [key for key, value in listed if value == _UNSET],
            )
        )
    return sections


def settings(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """Dotted key and readable value of every leaf."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from settings(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(setting(item) for item in value) or "none"
        else:
            yield f"{prefix}{key}", setting(value)


def setting(value: Any) -> str:
    if value is None:
        return _UNSET
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
