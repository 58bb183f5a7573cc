"""JSON has no NaN and no infinity: such a number is written as ``null``, and a map beside says what it was.

The map goes from the number's place (JSON Pointer, RFC 6901) to its name, so that ``null`` alone means "not measured".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_NONFINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def finite_tree(value: Any) -> tuple[Any, dict[str, str]]:
    """``value`` as JSON-ready dicts and lists without non-finite numbers, and where those stood."""
    nonfinite: dict[str, str] = {}
    return _finite(value, "", nonfinite), nonfinite


def restore_numbers(tree: Any, nonfinite: Any) -> None:
    """Put the numbers that :func:`finite_tree` took out back into ``tree``.

    Raises:
        ValueError: ``nonfinite`` is no mapping, or a place in it does not exist.
    """
    if not isinstance(nonfinite, dict):
        raise ValueError("nonfinite: not a mapping from place to number")
    for pointer, number in nonfinite.items():
        _restore(tree, pointer, number)


def _finite(value: Any, pointer: str, nonfinite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {
            str(key): _finite(item, f"{pointer}/{_escape(str(key))}", nonfinite)
            for key, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{pointer}/{index}", nonfinite) for index, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        nonfinite[pointer] = "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
        return None
    return value


def _restore(tree: Any, pointer: str, number: str) -> None:
    try:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]
        for part in parents:
            tree = tree[int(part)] if isinstance(tree, list) else tree[part]
        tree[int(last) if isinstance(tree, list) else last] = _NONFINITE[number]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"nonfinite: {pointer!r} points to no number") from None


def _escape(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
