"""What a pass found out, as the figures of a cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compressor.block_result import BlockResult, PassResult
from compressor.comparison.results import (
    BlockFigures,
    Figures,
    FinishFigures,
    Losses,
    Seconds,
    TextPerplexity,
)
from compressor.finetuning import FINETUNINGS, Finetuned
from compressor.recipe import Recipe
from compressor.recovery import Repaired
from compressor.report.schema import LearningRateFacts


def figures_of(
    passed: PassResult,
    recipe: Recipe,
    *,
    perplexity: Mapping[str, TextPerplexity],
    sparsity: float,
    pruning_s: float | None,
    cell_s: float,
    notices: Sequence[str],
) -> Figures:
    """The figures of one cell, without peak memory.

    Args:
        passed: The pass.
        recipe: As it was used.
        perplexity: By the name of the text.
        sparsity: Share of zeros that was counted.
        pruning_s: Seconds of the pruning where another pass did it; None takes this one's.
        cell_s: Wall seconds of the cell.
        notices: What the user should know.
    """
    together = list(passed.finetuned)
    recovery = together.pop(0) if recipe.recovery.method in FINETUNINGS else None
    finish = together.pop(0) if together else None
    repaired = [block.repaired for block in passed.blocks if block.repaired is not None]
    own_s = sum(block.pruning_s for block in passed.blocks)
    return Figures(
        recipe_sha256=recipe.digest(),
        perplexity=dict(perplexity),
        sparsity=sparsity,
        losses=_tuned_losses(recovery) if recovery is not None else _block_losses(repaired),
        seconds=Seconds(
            pruning=own_s if pruning_s is None else pruning_s,
            recovery=sum(block.recovery_s for block in passed.blocks if block.repaired is not None)
            + (recovery.elapsed_s if recovery else 0.0),
            finish=finish.elapsed_s if finish is not None else None,
            cell=cell_s,
        ),
        trained_parameters=_trained(repaired, passed.finetuned),
        learning_rate=_learning_rate(passed, recovery),
        finish=_finish(finish),
        blocks=tuple(_block(block) for block in passed.blocks),
        notices=tuple(notices),
    )


def _block_losses(repaired: Sequence[Repaired]) -> Losses | None:
    if not repaired:
        return None
    shares = [
        one.train_loss_last / one.target_power for one in repaired if one.train_loss_last and one.target_power
    ]
    return Losses(
        unit="share of the targets' mean square, mean over blocks",
        heldout_before=_mean([one.relative_before for one in repaired]),
        heldout=_mean([one.relative_after for one in repaired]),
        calibration=_mean(shares) if shares else None,
    )


def _tuned_losses(tuned: Finetuned) -> Losses:
    return Losses(
        unit=tuned.loss,
        heldout_before=tuned.loss_before,
        heldout=tuned.loss_after,
        calibration=tuned.train_loss_last,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _trained(repaired: Sequence[Repaired], tuned: Sequence[Finetuned]) -> int | None:
    """The most numbers that one stage was free to move; None where a stage does not tell, or nothing was repaired."""
    counts = [stage.trained_parameters for stage in tuned]
    if repaired:
        told = [one.trained_parameters for one in repaired if one.trained_parameters is not None]
        if len(told) < len(repaired):
            return None
        counts.append(sum(told))
    return max(counts) if counts else None


def _learning_rate(passed: PassResult, recovery: Finetuned | None) -> LearningRateFacts | None:
    if recovery is not None:
        return LearningRateFacts(chosen=recovery.lr, tried=recovery.tried)
    return None if passed.lr is None else LearningRateFacts(chosen=passed.lr, tried=passed.lr_tried)


def _finish(tuned: Finetuned | None) -> FinishFigures | None:
    if tuned is None:
        return None
    return FinishFigures(
        method=tuned.method,
        loss=tuned.loss,
        heldout_before=tuned.loss_before,
        heldout=tuned.loss_after,
        calibration=tuned.train_loss_last,
        learning_rate=LearningRateFacts(chosen=tuned.lr, tried=tuned.tried),
        best_step=tuned.best_step,
        steps=tuned.steps,
    )


def _block(block: BlockResult) -> BlockFigures:
    repaired = block.repaired
    if repaired is None:
        return BlockFigures(index=block.index, seconds=block.elapsed_s)
    return BlockFigures(
        index=block.index,
        heldout_before=repaired.loss_before,
        heldout=repaired.loss_after,
        calibration=repaired.train_loss_last,
        best_step=repaired.best_step,
        steps=repaired.steps,
        seconds=block.elapsed_s,
    )
