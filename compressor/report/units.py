"""Numbers as people read them: every one with its unit, and a word where there is no number."""

from __future__ import annotations

import math

MISSING = "not measured"


def number(value: float | int | str | None, digits: int = 4) -> str:
    """``value`` with ``digits`` significant digits; counts and words whole, NaN and infinity by name."""
    if value is None:
        return MISSING
    if isinstance(value, (str, bool)):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        mantissa, exponent = f"{value:.{digits - 1}e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
        return f"{mantissa}e{int(exponent)}".replace("-", "−")
    text = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    return text.replace("-", "−")


def perplexity(value: float | None) -> str:
    """A perplexity with four significant digits, trailing zeros kept, so that several of them line up."""
    if value is None or not math.isfinite(value) or not 1 <= value < 1e6:
        return number(value)
    return f"{value:#.4g}".rstrip(".") if value < 1e4 else f"{value:.0f}"


def measure(value: float | int | str | None, unit: str | None) -> str:
    """``value`` with its unit."""
    text = number(value)
    return f"{text} {unit}" if unit and value is not None else text


def byte_size(size_bytes: int | None) -> str:
    """Bytes in binary units: ``1.49 GiB``."""
    if size_bytes is None:
        return MISSING
    value, unit = float(size_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024 or unit == "TiB":
            break
        value /= 1024
    digits = 2 if abs(value) < 99.995 else 1 if abs(value) < 999.95 else 0
    return f"{size_bytes} B" if unit == "B" else f"{value:.{digits}f} {unit}"


def percent(share: float | None, digits: int = 1) -> str:
    """A share as a percentage: ``0.6`` is ``60.0 %``."""
    if share is None:
        return MISSING
    if not math.isfinite(share):
        return f"{number(share)} %"
    return f"{100 * share:.{digits}f} %".replace("-", "−")


def change(value: float | None, reference: float | None) -> str | None:
    """``value`` against ``reference``: ``+31.6 %``, ``×1517`` from tenfold on; None if meaningless."""
    if value is None or reference is None or not reference or not math.isfinite(value / reference):
        return None
    ratio = value / reference
    return f"×{number(ratio, 4)}" if ratio >= 10 else f"{100 * (ratio - 1):+.1f} %".replace("-", "−")


def score(value: float | None, stderr: float | None) -> str:
    """A task's figure with its standard error: ``0.7512 ± 0.0121``."""
    if value is None or not math.isfinite(value):
        return number(value)
    error = "" if stderr is None else f" ± {number(stderr) if stderr >= 1 else f'{stderr:.4f}'}"
    return (f"{value:.4f}" if abs(value) <= 1 else number(value)).replace("-", "−") + error


def duration(elapsed_s: float | None) -> str:
    """Seconds as ``7 min 12 s``, ``3 h 4 min`` or ``0.42 s``."""
    if elapsed_s is None or not math.isfinite(elapsed_s):
        return MISSING
    if elapsed_s < 10:
        return f"{elapsed_s:.2f} s"
    if elapsed_s < 60:
        return f"{elapsed_s:.1f} s"
    minutes, seconds = divmod(round(elapsed_s), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"


def count(value: int | None) -> str:
    """A large count in short: ``1.24 B`` for billions, ``260 K`` for thousands."""
    if value is None:
        return MISSING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return str(value)
