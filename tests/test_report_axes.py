"""Ticks of the drawings' log axes."""

from __future__ import annotations

import pytest

from compressor.report.axes import canvas, log_ticks


@pytest.mark.parametrize(("low", "high"), [(4.6, 9.2), (25.1, 31.9), (3.9, 700.0), (0.002, 0.9), (1e-7, 1e5)])
def test_log_axes_have_a_few_ticks_whatever_their_range(low: float, high: float) -> None:
    """Three to seven ticks inside the range, on narrow axes as well as over twelve decades."""
    _, axes = canvas(200, left=60)
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    log_ticks(axes.yaxis, low, high)
    ticks = list(axes.yaxis.get_majorticklocs())
    assert 3 <= len(ticks) <= 7
    assert low * 0.99 <= min(ticks)
    assert max(ticks) <= high * 1.01
