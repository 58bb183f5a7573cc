"""The learning rate, found per model: short repairs of the first blocks, judged on held-out windows.

The best rate differs by a factor of 50 between a model of width 64 and one of width 4096, far more than
between the blocks of one model. So each candidate repairs a block for a few epochs, from the same weights,
with a full schedule of its own; the one that leaves the lowest held-out loss wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.ebft import repair, trained_weights
from compressor.recovery.heldout import BestWeights
from compressor.sparsity import Mask

DIVERGED = math.log(2.0)  # worse than any trial that did nothing, whose log ratio is 0


@dataclass(frozen=True)
class ChosenLr:
    """The learning rate for one block.

    Attributes:
        lr: Peak learning rate.
        tried: Candidates that were tried on this block, ascending; empty once the rate is settled.
        ratios: Held-out loss after / before each trial; infinite if it diverged.
    """

    lr: float
    tried: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()


class LearningRateProbe:
    """Chooses the learning rate: by trials on the first ``probe.blocks`` blocks, then it stays.

    Args:
        recipe: Of the recovery; a number in ``recipe.lr`` is taken as it is, without trials. A method that
            trains nothing gets 0.
    """

    def __init__(self, recipe: RecoveryRecipe) -> None:
        self._recipe = recipe
        rate = rate_of(recipe)
        self._candidates = sorted(recipe.probe.candidates) if rate == "auto" else [rate]
        self._best = len(self._candidates) // 2
        # Candidate's place -> sum over blocks of log(loss after / before).
        self._scores: dict[int, float] = {}
        self._tried: set[int] = set()
        self._probed = 0

    @property
    def lr(self) -> float:
        """The best rate so far."""
        return self._candidates[self._best]

    @property
    def tried(self) -> tuple[float, ...]:
        """Every candidate that was tried on some block, ascending; empty for a rate that was given."""
        return tuple(self._candidates[place] for place in sorted(self._tried))

    def state(self) -> dict[str, Any]:
        """What the trials so far have shown, in JSON's types."""
        return {
            "best": self._best,
            "scores": sorted(self._scores.items()),
            "tried": sorted(self._tried),
            "probed": self._probed,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state` gave."""
        self._best, self._probed = int(state["best"]), int(state["probed"])
        self._scores = {int(place): float(score) for place, score in state["scores"]}
        self._tried = {int(place) for place in state["tried"]}

    def lr_for(
        self, index: int, block: nn.Module, masks: Mapping[str, Mask], io: BlockIO, *, seed: int
    ) -> ChosenLr:
        """The rate for the next block, whose weights are the same before and after, bit for bit.

        Args:
            index: Of the block; probing counts blocks as they come, whatever the first one's index is.
            block: Pruned, on ``io.device``.
            masks: Parameter path in the block -> bool mask.
            io: The block's training and held-out windows.
            seed: Of the order of the windows.
        """
        if len(self._candidates) == 1 or self._probed >= self._recipe.probe.blocks:
            return ChosenLr(self.lr)
        here = self._climb(lambda place: self._trial(block, masks, io, self._candidates[place], seed))
        self._probed += 1
        self._tried |= here.keys()
        places = sorted(here)
        ratios = tuple(math.inf if here[place] == DIVERGED else math.exp(here[place]) for place in places)
        return ChosenLr(self.lr, tuple(self._candidates[place] for place in places), ratios)

    def _climb(self, trial: Callable[[int], float]) -> dict[int, float]:
        """Moves to the best candidate that can be reached; place -> score here.

        Scores add up over blocks, so after the first block only candidates that all have tried can win.
        """
        here: dict[int, float] = {}

        def total(place: int) -> float:
            if place not in here:
                here[place] = trial(place)
            return here[place] + self._scores.get(place, 0.0)

        comparable = range(len(self._candidates)) if self._probed == 0 else sorted(self._scores)
        self._best = climb(self._best, comparable, total)
        self._scores = {place: total(place) for place in here}
        return here

    def _trial(self, block: nn.Module, masks: Mapping[str, Mask], io: BlockIO, lr: float, seed: int) -> float:
        """log(held-out loss after / before) of a short repair; the weights are set back."""
        short = self._recipe.model_copy(update={"epochs": self._recipe.probe.epochs, "selection": "last"})
        origin = BestWeights(trained_weights(block), math.inf)
        try:
            result = repair(block, masks, io, short, lr=lr, seed=seed)
        finally:
            origin.restore()
        return DIVERGED if result.diverged else log_ratio(result.loss_after, result.loss_before)


def rate_of(recipe: RecoveryRecipe) -> float | Literal["auto"]:
    """The learning rate of the recipe's method; ``auto`` where trials choose it, 0 where nothing is trained."""
    if recipe.method == "dsnot":
        return 0.0
    if recipe.method == "ebft-mask" and recipe.lr == "auto":
        return recipe.ebft_mask.lr
    return recipe.lr


def climb(start: int, candidates: Sequence[int], score: Callable[[int], float]) -> int:
    """The place where going on to the better neighbour, while there is a better one, ends.

    Args:
        start: The first place.
        candidates: Places that can be reached.
        score: Of a place; lower is better.
    """
    best = start
    while True:
        near = [place for place in (best + 1, best - 1) if place in candidates]
        better = min([best, *near], key=score)
        if better == best:
            return best
        best = better


def log_ratio(after: float, before: float) -> float:
    """log(after / before), the score of a trial; ``DIVERGED`` where it means nothing."""
    if not math.isfinite(after) or before == 0:
        return DIVERGED
    return math.log(max(after, 1e-300) / before)
