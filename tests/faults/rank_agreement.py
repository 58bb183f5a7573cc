"""How far passes of several processes (``rank_passes``) agree with each other and with the pass of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

PASSES = Path(__file__).with_name("rank_passes.py")


@dataclass(frozen=True)
class Agreement:
    """One variant, made by several processes and by one.

    Attributes:
        on_ranks: Whether blocks, losses and perplexities are the same on all ranks, bit for bit.
        masks: Share of the places of each block that are zero in both or in none.
        perplexity: By which factor a version's perplexity differs at most, minus 1.
    """

    on_ranks: bool
    masks: tuple[float, ...]
    perplexity: float


def run_passes(folder: Path, worlds: Sequence[int], names: Sequence[str]) -> None:
    """The passes of each variant by each number of processes; ``folder`` holds the model.

    Raises:
        CalledProcessError: One of the processes failed.
    """
    numbers = ",".join(map(str, worlds))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, str(PASSES), str(folder), numbers, *names], check=True, env=environment)


def agreement(folder: Path, name: str, world: int) -> Agreement:
    """What ``world`` processes have made of a variant beside what one has."""
    told = [(folder / f"{name}-{world}-{rank}.json").read_text(encoding="utf-8") for rank in range(world)]
    alone, shared = _perplexities(folder, name, 1), _perplexities(folder, name, world)
    return Agreement(
        on_ranks=len(set(told)) == 1,
        masks=_masks_agree(folder, name, world),
        perplexity=max(abs(shared[version] / alone[version] - 1) for version in alone),
    )


def _perplexities(folder: Path, name: str, world: int) -> dict[str, float]:
    content: dict[str, Any] = json.loads((folder / f"{name}-{world}-0.json").read_text(encoding="utf-8"))
    return dict(content["perplexities"])


def _masks_agree(folder: Path, name: str, world: int) -> tuple[float, ...]:
    alone, shared = (torch.load(folder / f"{name}-{number}-0.pt") for number in (1, world))
    equal: dict[int, int] = {}
    places: dict[int, int] = {}
    for key, mask in alone.items():
        block = int(key.partition(".")[0])
        same = int((mask == shared[key]).sum()) if mask.shape == shared[key].shape else 0
        equal[block] = equal.get(block, 0) + same
        places[block] = places.get(block, 0) + mask.numel()
    return tuple(equal[block] / places[block] for block in sorted(places))
