"""What is measured, the same for every model."""

from __future__ import annotations

import os
from dataclasses import dataclass


def usable_cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1


@dataclass(frozen=True)
class Workload:
    """Sizes of a measurement.

    Attributes:
        prompt_tokens: Tokens of the prefill, and so of the cache when decoding begins.
        decode_tokens: Steps of one token each, over the cache that the prefill left and that grows with them.
        batches: Sequences at once; each size is measured by itself.
        threads: Threads of ONNX Runtime, and of the reading that bandwidth is measured by.
        rounds: Turns of every model, one after another; a figure is the median over them.
        loads: How often each model is loaded, in a fresh process each time.
        seed: Of the random token ids, which are the same for every model of one vocabulary.
    """

    prompt_tokens: int = 128
    decode_tokens: int = 16
    batches: tuple[int, ...] = (1,)
    threads: int = 1
    rounds: int = 7
    loads: int = 3
    seed: int = 0
