"""The learning rate, found per model: short repairs of the first blocks, judged on held-out windows.

The best rate differs by a factor of 50 between a model of width 64 and one of width 4096, far more than between the
blocks of one model. So each candidate repairs the block for a few epochs, from the same weights, with its own full
schedule; the one that leaves the lowest held-out loss wins.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.ebft import repair, trained_weights
from compressor.recovery.heldout import BestWeights
from compressor.sparsity import Mask

DIVERGED = math.log(2.0)  # a diverged trial scores worse than one that did nothing (log ratio 0)


@dataclass(frozen=True)
class ChosenLr:
    """The learning rate for one block.

    Attributes:
        lr: Peak learning rate.
        tried: What this block tried: candidate -> held-out loss after / before (``inf``: diverged); empty when settled.
    """

    lr: float
    tried: Mapping[float, float]


class LearningRateSearch:
    """Chooses the learning rate block by block: probes on the first ``recipe.probe.blocks`` ones, then stays.

    Args:
        recipe: Of the recovery; a number in ``recipe.lr`` is taken as it is, without trials.
    """

    def __init__(self, recipe: RecoveryRecipe) -> None:
        self._recipe = recipe
        self._candidates = sorted(recipe.probe.candidates)
        self._scores: dict[
            int, float
        ] = {}  # candidate's place -> sum of log(loss after / before) over probed blocks
        self._probed = 0
        self._best = len(self._candidates) // 2

    def lr_for(
        self,
        block: nn.Module,
        masks: Mapping[str, Mask],
        io: BlockIO,
        *,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> ChosenLr:
        """The rate for the next block; its weights are as before when this returns, bit for bit.

        Args:
            block: Pruned, on ``io.device``.
            masks: Parameter path in the block -> bool mask.
            io: The block's training and held-out windows.
            seed: Of the order of the windows.
            progress: Called with (trials made, most trials that can come).
        """
        if self._recipe.lr != "auto":
            return ChosenLr(self._recipe.lr, {})
        if self._probed >= self._recipe.probe.blocks or len(self._candidates) == 1:
            return ChosenLr(self._candidates[self._best], {})
        tried = self._probe(block, masks, io, seed, progress)
        self._probed += 1
        ratios = {
            self._candidates[place]: math.inf if s == DIVERGED else math.exp(s)
            for place, s in sorted(tried.items())
        }
        return ChosenLr(self._candidates[self._best], ratios)

    def _probe(
        self,
        block: nn.Module,
        masks: Mapping[str, Mask],
        io: BlockIO,
        seed: int,
        progress: Callable[[int, int], None] | None,
    ) -> dict[int, float]:
        """Climbs from the best candidate so far to a neighbour as long as that one is better; place -> score here."""
        here: dict[int, float] = {}
        first = self._probed == 0

        def total(place: int) -> float:
            if place not in here:
                here[place] = self._trial(block, masks, io, self._candidates[place], seed)
                if progress is not None:
                    progress(len(here), len(self._candidates))
            return here[place] + self._scores.get(place, 0.0)

        place = self._best
        while True:
            # Only candidates that every probed block has tried can be compared.
            near = [
                n
                for n in (place + 1, place - 1)
                if 0 <= n < len(self._candidates) and (first or n in self._scores)
            ]
            better = min(near, key=total, default=place)
            if total(better) >= total(place):
                break
            place = better
        self._scores = {place: total(place) for place in here}
        self._best = place
        return here

    def _trial(self, block: nn.Module, masks: Mapping[str, Mask], io: BlockIO, lr: float, seed: int) -> float:
        """log(held-out loss after / before) of a short repair; the weights are restored."""
        recipe = self._recipe.model_copy(update={"epochs": self._recipe.probe.epochs, "selection": "last"})
        weights = trained_weights(block)
        origin = BestWeights(weights, math.inf)
        try:
            result = repair(block, masks, io, recipe, lr=lr, seed=seed)
        finally:
            origin.restore()
        if result.diverged or result.loss_before == 0:
            return DIVERGED
        return math.log(max(result.loss_after, 1e-300) / result.loss_before)
