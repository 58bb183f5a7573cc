"""The end-to-end training of a sparse model: learning rate, steps, held-out selection, merge."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.errors import InputRefused
from compressor.finetuning.losses import Objective, layer_powers, squarehead, token_loss
from compressor.finetuning.noise import shares, with_expected, with_noise
from compressor.finetuning.parametrisation import Parametrisation
from compressor.finetuning.sparse_model import (
    KEPT_ACTIVATIONS_BYTES,
    SparseModel,
    Windows,
    hidden_states,
    kept_bytes_per_token,
)
from compressor.ranks import Ranks, deal
from compressor.recipe import LearningRateTrials, RecoveryRecipe, TrainingRecipe
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.heldout import BestWeights
from compressor.recovery.lr_probe import climb, log_ratio
from compressor.recovery.precision import autocast, deterministic, random_state
from compressor.recovery.training import Batches, Course, Task, parts_of, train, trainable
from compressor.sparsity import Mask
from compressor.streams import dealt, in_order


@dataclass(frozen=True)
class Step:
    """Where the training is: after step ``number`` of ``total`` at a learning rate, of a trial or in earnest."""

    number: int
    total: int
    lr: float
    trial: bool


Tell = Callable[[Step], None]


@dataclass(frozen=True)
class Finetuned:
    """How an end-to-end training went.

    Attributes:
        method: Name in the recipe.
        loss: What was minimised, such as ``kl``.
        loss_before: It on the held-out windows, of the model as it came (step 0).
        loss_after: The same of the weights that were kept.
        train_loss_first: Calibration loss averaged over the first epoch; ``None`` if it diverged there.
        train_loss_last: The same over the last finite epoch.
        best_step: The step whose weights were kept; 0 means that no step was better than none.
        steps: Optimiser steps made, trials not counted.
        lr: Peak learning rate.
        tried: Learning rates that were tried, ascending; empty where it was given.
        trained_parameters: How many numbers were free to move.
        diverged: Whether a loss became NaN or infinite and the training stopped there.
        elapsed_s: Wall time, trials included.
        masks: New masks of each block, of a method whose merge fills zeros; ``None`` where they stayed frozen.
        note: What the user should know of it, in one line.
    """

    method: str
    loss: str
    loss_before: float
    loss_after: float
    train_loss_first: float | None
    train_loss_last: float | None
    best_step: int
    steps: int
    lr: float
    tried: tuple[float, ...]
    trained_parameters: int
    diverged: bool
    elapsed_s: float
    masks: tuple[Mapping[str, Mask], ...] | None = None
    note: str | None = None


def tune(
    method: str,
    model: SparseModel,
    parametrisation: Parametrisation,
    objective: Objective,
    recipe: TrainingRecipe,
    trials: LearningRateTrials,
    *,
    seed: int,
    tell: Tell,
    keeps_masks: bool = True,
) -> Finetuned:
    """Trains ``parametrisation`` and merges it into ``model``'s blocks; says what it brought.

    The held-out loss of what is kept is never above that of the model as it came, unless the recipe's selection
    is ``last``.

    Args:
        method: Name in the recipe, for the result.
        model: Its blocks are changed in place; masked weights are set to 0 first.
        parametrisation: What is trained.
        objective: What is minimised.
        recipe: Epochs, batch size, optimiser, schedule, selection.
        trials: How a learning rate ``auto`` is found.
        seed: Of the order of the windows and of dropout; same seed and device, same weights bit for bit.
        tell: Called after each step; what it raises ends the training.
        keeps_masks: Whether the merge leaves masked weights at 0; it is verified.

    Raises:
        InputRefused: No windows to train on or to select by; a loss that is NaN or infinite before step 1.
        ReportedError: A masked weight moved (a fault of the program).
    """
    started = time.perf_counter()
    frozen = FrozenMasks(model.together(), model.all_masks())
    frozen.zero_weights()
    tuning = _Tuning(model, parametrisation, objective, recipe)
    before = tuning.heldout()
    _check(model, method, before)
    best = BestWeights(parametrisation.weights, before)
    with trainable(parametrisation.weights), deterministic(model.device):
        lr, tried = tuning.choose_lr(trials, best, seed, tell)
        course = tuning.course(recipe, best, lr=lr, seed=seed, tell=tell)
    keep_best = recipe.selection == "heldout" or course.diverged
    if keep_best:
        best.restore()
    parametrisation.merge()
    if keeps_masks:
        frozen.verify()
    return Finetuned(
        method=method,
        loss=objective.name,
        loss_before=before,
        loss_after=best.loss if keep_best else course.heldout,
        train_loss_first=course.train[0] if course.train else None,
        train_loss_last=course.train[-1] if course.train else None,
        best_step=best.step if keep_best else course.steps,
        steps=course.steps,
        lr=lr,
        tried=tried,
        trained_parameters=parametrisation.count,
        diverged=course.diverged,
        elapsed_s=time.perf_counter() - started,
    )


class _Tuning:
    """One model under one parametrisation and objective."""

    def __init__(
        self,
        model: SparseModel,
        parametrisation: Parametrisation,
        objective: Objective,
        recipe: TrainingRecipe,
    ) -> None:
        self._model, self._parametrisation, self._objective = model, parametrisation, objective
        self._recipe = recipe
        # Errors in every layer need a second, dense model beside the sparse one; so does KL without kept states, and
        # those are of the windows as they are.
        needed = objective.sq or objective.noise or (objective.kd and model.training.dense is None)
        layers = range(len(model.blocks)) if needed else ()
        self._dense_blocks = [model.load_dense(index) for index in layers]
        self._recompute = _recomputes(model, recipe.batch_size)

    def course(
        self, recipe: TrainingRecipe, best: BestWeights | None, *, lr: float, seed: int, tell: Tell
    ) -> Course:
        """One training from the weights as they are, with random numbers of its own."""
        windows, objective = self._model.training, self._objective
        steps = recipe.epochs * math.ceil(len(windows) / recipe.batch_size)
        noise = shares(objective.noise, steps, fades=objective.noise_fades)
        task = Task(
            weights=self._parametrisation.weights,
            windows=len(windows),
            losses=lambda batches: self._losses(windows, batches, noise),
            heldout=self.heldout,
            zero_gradients=self._parametrisation.zero_gradients,
            device=self._model.device,
            amp_dtype=self._model.amp_dtype,
            micro_batch=self._model.micro_batch,
            ranks=self._model.ranks,
        )
        trial = best is None

        def told(number: int, total: int) -> None:
            tell(Step(number, total, lr, trial))

        # Dropout differs between ranks; noise is drawn for whole batches, by all of them alike.
        own = 0 if objective.noise else self._model.ranks.rank
        with random_state(self._model.device, seed + 1_000_003 * own):
            self._parametrisation.train(True)
            return train(task, recipe, best, lr=lr, seed=seed, progress=told)

    def choose_lr(
        self, trials: LearningRateTrials, origin: BestWeights, seed: int, tell: Tell
    ) -> tuple[float, tuple[float, ...]]:
        """The learning rate, and those that were tried: each from ``origin``, with a full schedule of its own."""
        if self._recipe.lr != "auto":
            return self._recipe.lr, ()
        candidates = sorted(trials.candidates)
        short = self._recipe.model_copy(update={"epochs": trials.epochs})
        scores: dict[int, float] = {}

        def score(place: int) -> float:
            if place not in scores:
                course = self.course(short, None, lr=candidates[place], seed=seed, tell=tell)
                origin.restore()
                scores[place] = log_ratio(math.nan if course.diverged else course.heldout, origin.loss)
            return scores[place]

        if len(candidates) == 1:
            return candidates[0], ()
        best = climb(len(candidates) // 2, range(len(candidates)), score)
        return candidates[best], tuple(candidates[place] for place in sorted(scores))

    def heldout(self) -> float:
        """The objective over all held-out windows, without dropout; the training goes on with it."""
        windows = self._model.heldout
        batches = in_order(len(windows), self._recipe.batch_size)
        total = torch.zeros((), dtype=torch.float64, device=self._model.device)
        self._parametrisation.train(False)
        with torch.no_grad():
            losses = self._losses(windows, batches, repeat(0.0))
            for rows in batches:
                for _ in parts_of(rows, self._model.micro_batch):
                    total += next(losses) * len(rows)
        self._parametrisation.train(True)
        return self._model.ranks.total(float(total))[0] / max(1, len(windows))

    def _losses(self, windows: Windows, batches: Batches, noise: Iterator[float]) -> Iterator[Tensor]:
        """The objective of each part of each batch, in float32, with its share ``noise`` of the tokens exchanged.

        The parts of a batch, on all ranks, add up to its objective: what is divided by is the whole batch's. A rank
        without a row has a part without gradients.
        """
        model, batches = self._model, list(batches)
        for rows, (own, dense) in zip(batches, _own_rows(windows, batches, model.ranks), strict=True):
            ids = self._ids(windows, rows, own, dense, next(noise))
            parts = [
                slice(part.start, part.stop) for part in in_order(len(own), model.micro_batch or len(rows))
            ] or [slice(0, 0)]
            powers = self._powers([ids[part] for part in parts], len(rows))
            for part in parts:
                loss = self._loss(ids[part], None if dense is None else dense[part], powers)
                share = len(ids[part]) / len(rows)
                yield loss if share == 1 else loss * share

    def _ids(
        self, windows: Windows, rows: Sequence[int], own: Sequence[int], dense: Tensor | None, noise: float
    ) -> Tensor:
        """The tokens of this rank's rows ``own`` of a batch, a share of them exchanged; on the device.

        All ranks draw for the whole batch.
        """
        model, places = self._model, [rows.index(row) for row in own]
        if not noise or self._objective.noise_from == "text":
            return with_noise(windows.ids[list(rows)], noise, windows.ids)[places].to(model.device)
        chances = torch.rand(2, len(rows), windows.ids.shape[1])[:, places]
        ids = windows.ids[list(own)]
        if not len(ids):
            return ids.to(model.device)
        with torch.no_grad():
            if dense is None:
                dense = self._dense_states(ids.to(model.device))[-1]
            return with_expected(ids, noise, chances, dense, model.head, vocab_size=model.vocab_size)

    def _loss(self, ids: Tensor, dense: Tensor | None, powers: Sequence[Tensor] | None) -> Tensor:
        """The objective over ``ids`` (B, T), 0 without any; see ``token_loss`` and ``squarehead`` for the others."""
        model, objective = self._model, self._objective
        if not len(ids):
            return torch.zeros((), device=model.device)
        with autocast(model):
            states = hidden_states(model, self._parametrisation.blocks, ids, recompute=self._recompute)
            wanted = self._dense_states(ids)
            loss = states[-1].new_zeros(())
            if objective.ce or objective.kd:
                loss = token_loss(
                    objective,
                    model.head,
                    states[-1],
                    wanted[-1] if wanted else dense,
                    ids,
                    vocab_size=model.vocab_size,
                )
            if objective.sq:
                loss = loss + objective.sq * squarehead(states, wanted, powers)
        return loss

    def _powers(self, parts: Sequence[Tensor], rows: int) -> Sequence[Tensor] | None:
        """Mean square of each layer of the dense model over a batch of ``rows`` windows; this rank has ``parts`` of it.

        None where no layer is compared, and where the one part is the whole batch.
        """
        ranks = self._model.ranks
        if not self._objective.sq or (len(parts) == 1 and ranks.world == 1):
            return None
        total = torch.zeros(len(self._dense_blocks), dtype=torch.float64, device=self._model.device)
        for part in parts:
            if len(part):
                with autocast(self._model):
                    states = self._dense_states(part)
                total += torch.stack(layer_powers(states)).double() * (len(part) / rows)
        return ranks.summed(total).float().unbind()

    def _dense_states(self, ids: Tensor) -> list[Tensor]:
        """The dense model's hidden states; none where no layer is compared."""
        with torch.no_grad():
            return hidden_states(self._model, self._dense_blocks, ids) if self._dense_blocks else []


def _own_rows(
    windows: Windows, batches: Batches, ranks: Ranks
) -> Iterator[tuple[Sequence[int], Tensor | None]]:
    """This rank's rows of each batch and, where they are kept, the dense model's last hidden states of them (B, T, D).

    Those are on the device.
    """
    if windows.dense is None:
        for rows in batches:
            yield deal(rows, len(windows), ranks)[ranks.rank], None
        return
    for own, (dense,) in dealt([windows.dense], batches):
        yield own, dense


def _recomputes(model: SparseModel, batch_size: int) -> bool:
    """Whether blocks run a second time in the backward pass; see ``KEPT_ACTIVATIONS_BYTES``."""
    if model.device.type == "cuda":
        return True
    windows = min(batch_size, len(model.training), model.micro_batch or batch_size)
    tokens = windows * model.training.ids.shape[1]
    return tokens * kept_bytes_per_token(model.blocks) > KEPT_ACTIVATIONS_BYTES


def settings_of(
    recipe: RecoveryRecipe, lr: float | Literal["auto"], weight_decay: float | None = None
) -> TrainingRecipe:
    """How a method of the recovery trains: as ``recipe`` says, with the method's own values.

    Args:
        recipe: A number in ``recipe.lr`` counts before ``lr``.
        lr: The method's own.
        weight_decay: The method's own, if it has one.
    """
    own: dict[str, Any] = {"lr": lr if recipe.lr == "auto" else recipe.lr}
    if weight_decay is not None:
        own["weight_decay"] = weight_decay
    return recipe.model_copy(update=own)


def _check(model: SparseModel, method: str, loss: float) -> None:
    counts = len(model.training), len(model.heldout)
    if 0 in counts:
        raise InputRefused(
            "E-CALIBRATION-SHORT",
            f"repair needs windows to train on and to select by; got {counts[0]} and {counts[1]}",
            "give more calibration text, or a shorter --seqlen",
        )
    if not math.isfinite(loss):
        raise InputRefused(
            "E-LOSS-NONFINITE",
            f"the loss of the whole model is NaN or infinite before {method} has begun",
            "compute in float32 with --device cpu, or check the calibration text and the model's weights",
        )


def with_masks(model: SparseModel, finetuned: Finetuned) -> SparseModel:
    """The model for what comes next: with the masks that the method left."""
    return model if finetuned.masks is None else replace(model, masks=finetuned.masks)
