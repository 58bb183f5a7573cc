"""How the learning rate moves over the steps of one repair."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["linear", "cosine", "constant"]


def learning_rate_factor(step: int, steps: int, schedule: Schedule, warmup: float) -> float:
    """Share of the peak learning rate at ``step`` (from 0) of ``steps``, in (0, 1].

    Rises linearly over the first round(warmup * steps) steps, then falls to 0 (reached at ``step == steps``,
    which is never taken) in a line or half a cosine, or stays.
    """
    rising = round(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    if schedule == "constant":
        return 1.0
    passed = (step - rising) / (steps - rising)
    return 1.0 - passed if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
