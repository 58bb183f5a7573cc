"""EBFT's mask tuning: the weights stay dense, a score per weight is trained, and the highest scores are kept.

Source: Guo et al., EBFT, arXiv 2402.12419 (the ablation against weight tuning), and its code. Every weight W_ij
has a score S_ij; the block computes with

    M * W,   M_ij = 1 where S_ij is among the k highest of its row (of its group for N:M), else 0

and W is the dense weight. M has no gradient of its own, so it is passed straight through,
dL/dS_ij := dL/dM_ij = W_ij * dL/d(M * W)_ij, and AdamW moves S alone. ``k`` is what the pruner's mask keeps in
that row or group, so that the zeros stay as many where they are.

Deviations from the published code: whole rows are compared for every pruner, which fits Wanda's and any other
mask's counts; the highest scores are kept and not the highest |S_ij|, since a score that is pushed below 0
would come back there; scores start from the mask and the weights (``start_scores``), as the pruner's own
scores differ in scale by orders of magnitude from matrix to matrix while the published rate, 2e-2, does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.heldout import BestWeights
from compressor.recovery.precision import deterministic
from compressor.recovery.reconstruction import reconstruction_task, step_0
from compressor.recovery.training import train, trainable
from compressor.sparsity import Mask


def repair(
    block: nn.Module,
    masks: Mapping[str, Mask],
    io: BlockIO,
    recipe: RecoveryRecipe,
    *,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Repaired:
    """Gives ``block`` the dense weights under a mask that was trained, in place, and returns the new masks.

    Step 0 of the held-out selection is the block as it came, with the weights that the pruner left it.

    Args:
        block: On ``io.device``. Masked weights are set to 0 first, whatever they hold.
        masks: Parameter path in the block -> bool mask of the parameter's shape, ``True`` = kept.
        io: Windows, matrices, pattern and the dense block.
        recipe: Epochs, batch size, optimiser, schedule, loss and selection.
        lr: Peak learning rate of the scores.
        seed: Of the order of the windows.
        progress: Called after each step with (steps made, steps in all).

    Raises:
        InputRefused: No windows to train on or to select by; a loss that is NaN or infinite before step 1.
    """
    assert io.load_dense is not None
    started = time.perf_counter()
    FrozenMasks(block, masks).zero_weights()
    loss, before, power = step_0(block, io, recipe)
    dense = io.load_dense()
    transposed = {matrix.parameter: matrix.transposed for matrix in io.matrices}
    group = io.pattern.m if io.pattern is not None else None
    scored = {
        name: ScoredWeight(dense.get_parameter(name).detach(), mask.to(io.device), group, transposed[name])
        for name, mask in masks.items()
    }
    scores = [weight.scores for weight in scored.values()]
    best = BestWeights(scores, before)
    with trainable(scores), deterministic(io.device):
        task = reconstruction_task(_Masked(block, scored), scores, io, recipe, loss)
        course = train(task, recipe, best, lr=lr, seed=seed, progress=progress)
    keep_best = recipe.selection == "heldout" or course.diverged
    if keep_best:
        best.restore()
    step = best.step if keep_best else course.steps
    tuned = {name: weight.mask() for name, weight in scored.items()} if step else dict(masks)
    if step:
        for name, weight in scored.items():
            block.get_parameter(name).detach().copy_(weight.dense.masked_fill(~tuned[name], 0.0))
    FrozenMasks(block, tuned).verify()
    return Repaired(
        loss_before=before,
        loss_after=best.loss if keep_best else course.heldout,
        target_power=power,
        train_loss_first=course.train[0] if course.train else None,
        train_loss_last=course.train[-1] if course.train else None,
        best_step=step,
        steps=course.steps,
        lr=lr,
        diverged=course.diverged,
        elapsed_s=time.perf_counter() - started,
        masks=tuned,
        trained_parameters=sum(weight.numel() for weight in scores),
    )


class ScoredWeight:
    """A parameter's dense weights, their trainable scores, and how many are kept where.

    Attributes:
        dense: The dense weights, in the parameter's shape.
        scores: The same shape, float32.
    """

    def __init__(self, dense: Tensor, mask: Mask, group: int | None, transposed: bool) -> None:
        self.dense = dense
        self._transposed = transposed
        self._width = group or (mask.mT if transposed else mask).shape[-1]
        self._kept = self._rows(mask).sum(1, keepdim=True)
        self.scores = nn.Parameter(start_scores(dense, mask), requires_grad=False)

    def mask(self) -> Mask:
        """The highest scores of each row or group, as many as the first mask kept there; of equals the first."""
        S = self._rows(self.scores.detach())
        order = S.argsort(dim=1, descending=True, stable=True)
        ranks = torch.arange(S.shape[1], device=S.device)
        mask = torch.zeros_like(S, dtype=torch.bool).scatter_(1, order, ranks < self._kept)
        inputs_last = mask.view((self.dense.mT if self._transposed else self.dense).shape)
        return inputs_last.mT if self._transposed else inputs_last

    def weight(self) -> Tensor:
        """M * W, its gradient passed straight through M to the scores."""
        through = self.scores - self.scores.detach()  # 0 in value
        return (self.mask() + through) * self.dense

    def _rows(self, tensor: Tensor) -> Tensor:
        """(rows or groups, weights that are compared)."""
        return (tensor.mT if self._transposed else tensor).reshape(-1, self._width)


def start_scores(dense: Tensor, mask: Mask) -> Tensor:
    """Scores in [0, 1] whose choice is ``mask``: (|W| / max |W| + M) / 2.

    Started from the mask alone, every score is as easily turned as any other: perplexity 124 against 68 on
    examples/tiny-llm at 70 %, where the pruned model has 102.
    """
    size = dense.abs()
    return (size / size.max().clamp_min(torch.finfo(size.dtype).tiny) + mask) / 2


class _Masked(nn.Module):
    """A block that computes with M * W in the place of its weights."""

    def __init__(self, block: nn.Module, scored: Mapping[str, ScoredWeight]) -> None:
        super().__init__()
        self._block = block
        self._scored = scored

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the block gives for these arguments."""
        weights = {name: scored.weight() for name, scored in self._scored.items()}
        return torch.func.functional_call(self._block, weights, args, kwargs)
