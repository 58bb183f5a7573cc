"""The loop that every recovery trains by: windows in random order, AdamW, a schedule, a held-out loss per epoch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.ranks import ALONE, Ranks
from compressor.recipe import TrainingRecipe
from compressor.recovery.heldout import BestWeights
from compressor.recovery.precision import Stepper
from compressor.recovery.schedule import learning_rate_factor
from compressor.streams import in_order, shuffled

Batches = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Task:
    """What is trained, and on what.

    Attributes:
        weights: The leaves that move, float32.
        windows: Training windows, of all ranks.
        losses: Given the rows of each batch, the loss of each of their parts (``parts_of``) in turn, computed when
            it is asked for, with gradients; of several ranks each one's share of the part, without gradients where it
            has no row. The parts of a batch, of all ranks, add up to its loss.
        heldout: The held-out loss of the weights as they are.
        zero_gradients: Called after each backward pass: sets the gradients of masked weights to 0.
        device: Where the losses are.
        amp_dtype: bfloat16 or float16 for mixed precision, ``None`` for float32.
        scale: The losses are this often too large; what is reported is divided by it.
        micro_batch: Windows that go through at once; ``None`` for whole batches.
        ranks: Who shares the windows.
    """

    weights: Sequence[nn.Parameter]
    windows: int
    losses: Callable[[Batches], Iterator[Tensor]]
    heldout: Callable[[], float]
    zero_gradients: Callable[[], None]
    device: torch.device
    amp_dtype: torch.dtype | None = None
    scale: float = 1.0
    micro_batch: int | None = None
    ranks: Ranks = ALONE


@dataclass
class Course:
    """What training went through: losses per epoch, the last held-out loss, steps made."""

    train: list[float] = field(default_factory=list)
    heldout: float = math.nan
    steps: int = 0
    diverged: bool = False


def train(
    task: Task,
    recipe: TrainingRecipe,
    best: BestWeights | None,
    *,
    lr: float,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> Course:
    """Runs all epochs and offers the weights after each to ``best``; waits for the device once an epoch.

    Args:
        task: What is trained; its weights ask for gradients.
        recipe: Epochs, batch size, optimiser and schedule.
        best: Keeps the best weights, if it is there.
        lr: Peak learning rate.
        seed: Of the order of the windows.
        progress: Called after each step with (steps made, steps in all); what it raises ends the training.
    """
    generator = torch.Generator().manual_seed(seed)
    stepper = Stepper(adamw(task.weights, recipe, lr), task.weights, task, recipe.max_grad_norm, task.ranks)
    total = recipe.epochs * math.ceil(task.windows / recipe.batch_size)
    course = Course()
    for _ in range(recipe.epochs):
        summed = torch.zeros((), dtype=torch.float64, device=task.device)
        batches = shuffled(task.windows, recipe.batch_size, generator)
        losses = task.losses(batches)
        for rows in batches:
            for _ in parts_of(rows, task.micro_batch):
                loss = next(losses)
                stepper.backward(loss)
                summed += loss.detach() * (len(rows) / task.windows / task.scale)
            stepper.unscale()
            task.zero_gradients()
            stepper.step(lr * learning_rate_factor(course.steps, total, recipe.schedule, recipe.warmup))
            course.steps += 1
            if progress is not None:
                progress(course.steps, total)
        assert next(losses, None) is None  # asked for to let go of the last batch, too
        course.heldout = task.heldout()
        (trained,) = task.ranks.total(float(summed))
        if not math.isfinite(trained) or not math.isfinite(course.heldout):
            course.diverged = True
            break
        course.train.append(trained)
        if best is not None:
            best.offer(course.heldout, course.steps)
    return course


def parts_of(rows: Sequence[int], micro_batch: int | None) -> list[Sequence[int]]:
    """The rows of a batch in parts of at most ``micro_batch``, whose gradients add up; ``None`` does not split."""
    if micro_batch is None or micro_batch >= len(rows):
        return [rows]
    return [rows[part.start : part.stop] for part in in_order(len(rows), micro_batch)]


def adamw(weights: Sequence[nn.Parameter], recipe: TrainingRecipe, lr: float) -> torch.optim.Optimizer:
    """AdamW in its fused form, on the CPU a third of the time of the plain one."""
    betas = (recipe.beta1, recipe.beta2)
    return torch.optim.AdamW(
        weights, lr=lr, betas=betas, eps=recipe.eps, weight_decay=recipe.weight_decay, fused=True
    )


@contextmanager
def trainable(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Gradients on for these weights while inside; off and forgotten after."""
    for weight in weights:
        weight.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for weight in weights:
            weight.grad = None
            weight.requires_grad_(False)
