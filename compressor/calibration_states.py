"""Calibration and held-out windows on their way through the blocks, and what a block's repair aims at.

Notation: N windows, T tokens each, hidden width D.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.dense_path import DensePath
from compressor.models.source import BlockSource
from compressor.propagation import advance, embedded, visit
from compressor.ranks import ALONE, Ranks
from compressor.recipe import RecoveryRecipe
from compressor.streams import Activations


@dataclass(frozen=True)
class States:
    """Hidden states at one place of the model: of the training windows (N, T, D) and of the held-out ones."""

    training: Activations
    heldout: Activations

    def copy(self) -> States:
        """The same states in stores of their own."""
        return self.map(Activations.copy)

    def map(self, change: Callable[[Activations], Activations]) -> States:
        """What ``change`` makes of both stores."""
        return States(change(self.training), change(self.heldout))


class CalibrationStates:
    """States before the next block on the sparse path, and on the dense path where they are needed.

    Args:
        source: The dense blocks.
        calibration: Training windows (N, T).
        heldout: Held-out windows (H, T).
        recovery: Says what repairs aim at; ``None`` where no block is repaired by itself.
        device: Where blocks compute.
        dense_path: Moves the dense path.
        needs_dense: Whether the dense path is asked for whatever repairs aim at.
        ranks: Who shares the windows.

    Attributes:
        sparse: What the finished sparse blocks give.
        dense: What the dense model has at the same place, after :meth:`advance_dense` behind the block.
        dense_inputs: What it has before the block, for repairs that look inside the block.
    """

    def __init__(
        self,
        source: BlockSource,
        calibration: Tensor,
        heldout: Tensor,
        recovery: RecoveryRecipe | None,
        *,
        device: torch.device,
        dense_path: DensePath,
        needs_dense: bool,
        ranks: Ranks = ALONE,
    ) -> None:
        self._source, self._recovery, self._dense_path = source, recovery, dense_path
        self.sparse = States(
            embedded(source, calibration, device, ranks), embedded(source, heldout, device, ranks)
        )
        needs_dense = needs_dense or (recovery is not None and recovery.targets != "block")
        self.dense = self.sparse.copy() if needs_dense else None
        self.dense_inputs: States | None = None

    @property
    def streams(self) -> dict[str, Activations]:
        """The stores that move from block to block, by name."""
        paths = (
            {"sparse": self.sparse} if self.dense is None else {"sparse": self.sparse, "dense": self.dense}
        )
        return {
            f"{path}.{kind}": store
            for path, states in paths.items()
            for kind, store in (("training", states.training), ("heldout", states.heldout))
        }

    def advance_dense(self, index: int, block: nn.Module) -> None:
        """The dense path, where there is one, through the dense block ``index``."""
        if self.dense is None:
            return
        looks_inside = self._recovery is not None and self._recovery.window == "split"
        if looks_inside and self._recovery is not None and self._recovery.targets == "model":
            self.dense_inputs = self.dense.copy()
        self._dense_path.advance("calibration", index, block, self.dense.training)
        self._dense_path.advance("heldout", index, block, self.dense.heldout)

    def advance_sparse(self, index: int, block: nn.Module) -> None:
        """The sparse path through the finished block ``index``."""
        self.sparse.map(lambda states: advance(self._source, index, block, states))

    def behind(self, index: int, block: nn.Module, states: States) -> States:
        """What block ``index`` makes of ``states``, which stay as they are."""
        return states.map(lambda one: advance(self._source, index, block, one, one.empty_like()))

    def observe(
        self, index: int, block: nn.Module, entering: States, observed: AbstractContextManager[None] | None
    ) -> States | None:
        """Run the dense block ``index`` on ``entering``, under ``observed``; what its repair aims at.

        With ``targets`` block these are the outputs of that run, with model the dense path's states behind the
        block, and with blend (1 - a) * block + a * model, a = ``targets_blend``.

        Args:
            index: The place of the block.
            block: Dense.
            entering: States before it on the sparse path; those of the training windows are observed.
            observed: Open while they go through the block; ``None`` if nobody looks on.

        Returns:
            The targets, ``None`` where no block is repaired by itself.
        """
        if self._recovery is not None and self._recovery.targets != "model":
            outputs = self._outputs(index, block, entering, observed)
            if self._recovery.targets == "blend":
                self._blend(outputs, self._recovery.targets_blend)
            return outputs
        if observed is not None:
            with observed:
                visit(self._source, index, block, entering.training)
        return self.dense if self._recovery is not None else None

    def _outputs(
        self, index: int, block: nn.Module, entering: States, observed: AbstractContextManager[None] | None
    ) -> States:
        def run(states: Activations) -> Activations:
            return advance(self._source, index, block, states, states.empty_like())

        if observed is None:
            return entering.map(run)
        with observed:
            training = run(entering.training)
        return States(training, run(entering.heldout))

    def _blend(self, outputs: States, share: float) -> None:
        assert self.dense is not None
        outputs.training.states.lerp_(self.dense.training.states, share)
        outputs.heldout.states.lerp_(self.dense.heldout.states, share)
