"""The types of option values: what a text on the command line stands for, or a usage error."""

from __future__ import annotations

import math
import re

import click

from compressor.errors import UsageError


def sparsity(value: str) -> float:
    """A share between 0 and 1, both excluded.

    Raises:
        UsageError: It is no number, or not between 0 and 1.
    """
    try:
        share = float(value)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(
            "E-SPARSITY-RANGE",
            f"sparsity must be between 0 and 1, both excluded; got {value}",
            "give a share such as 0.5 for 50 %",
        )
    return share


def limit(value: str) -> float:
    """A number, or a percentage such as ``15%`` as a share.

    Raises:
        click.BadParameter: It is neither.
    """
    text = value.strip()
    try:
        number = float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise click.BadParameter(f"{value!r} is neither a number nor a percentage such as 15%")
    return number


def device(value: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        click.BadParameter: It is none of these.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", value):
        raise click.BadParameter(f"{value!r} is not auto, cpu, cuda or cuda:N")
    return value


def learning_rate(value: str) -> float | str:
    """``auto`` or a number.

    Raises:
        click.BadParameter: It is neither.
    """
    if value == "auto":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is neither auto nor a number") from None


def bytes_of(value: str) -> int:
    """A size such as ``20GiB``, ``500MB`` or ``0``.

    Raises:
        click.BadParameter: It is none.
    """
    units = {
        "": 1,
        "kib": 2**10,
        "mib": 2**20,
        "gib": 2**30,
        "tib": 2**40,
        "kb": 1e3,
        "mb": 1e6,
        "gb": 1e9,
        "tb": 1e12,
    }
    text = value.strip().lower()
    number = text.rstrip("bgikmt ")
    try:
        return int(float(number) * units[text[len(number) :].strip()])
    except (ValueError, KeyError, OverflowError):
        raise click.BadParameter(f"{value!r} is no size such as 20GiB, 500MB or 0") from None
