"""How long the passes of a run take, from one window through its first block, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from compressor.devices import mixed_precision, settle
from compressor.estimating.facts import RunFacts
from compressor.planning import Job
from compressor.recovery.ebft import trained_weights
from compressor.recovery.training import adamw, trainable

__all__ = ["Pace", "block_seconds", "measure_pace", "tuning_seconds"]

_TOKENS = 512  # of the window that is timed: enough to fill matrices, few enough to wait for
_ENOUGH_S = 0.5  # a step that takes as long is not timed again
# Multiplications of the inputs' matrix with the weight, about.
_SOLVES = {"sparsegpt": 2, "admm": 25, "alps": 80}
_TRIALS = 4  # learning rates that a climb tries, about


@dataclass(frozen=True)
class Pace:
    """Seconds per token and per step of one block.

    Attributes:
        forward: Of a token, without gradients.
        both: Of a token, forward and backward.
        step: Of AdamW.
        flops: Floating-point operations a second of the forward pass.
    """

    forward: float
    both: float
    step: float
    flops: float


def measure_pace(job: Job, facts: RunFacts) -> Pace | None:
    """The pace of block 0 on one window of the calibration text; None where not even that fits into the device."""
    try:
        return _measure(job, facts)
    except torch.OutOfMemoryError:
        return None


def _measure(job: Job, facts: RunFacts) -> Pace:
    source, device = job.source, job.device
    ids = job.calibration.windows.ids[:1, :_TOKENS]
    block = source.load_block(0)
    weights = trained_weights(block)
    dtype = mixed_precision(device)
    tokens = ids.shape[1]
    with torch.no_grad():
        hidden = source.embed(ids)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return source.forward(0, block, hidden)

    with torch.no_grad():
        forward_s = _fastest(forward, device)
    with trainable(weights):
        both_s = _fastest(lambda: _backward(forward()), device)
        optimizer = adamw(weights, facts.recipe.recovery, lr=0.0)
        step_s = _fastest(optimizer.step, device)
    flops = 2 * sum(weight.numel() for weight in weights) * tokens / forward_s
    return Pace(forward_s / tokens, both_s / tokens, step_s, flops)


def _fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the better of two runs, so that the first one's preparations do not count."""
    best = float("inf")
    for _ in range(3):
        settle(device)
        started = time.perf_counter()
        work()
        settle(device)
        best = min(best, time.perf_counter() - started)
        if best > _ENOUGH_S:
            break
    return max(best, 1e-9)


def block_seconds(facts: RunFacts, pace: Pace) -> tuple[float, float]:
    """Seconds of a block (pruning, repair, every path through it), and of the trials of learning rates, once."""
    recovery = facts.recipe.recovery
    calibrated = (facts.training + facts.heldout) * facts.seqlen
    paths = (2 + facts.runs_dense_path + (facts.window_blocks == 2)) * calibrated
    seconds = pace.forward * (paths + facts.versions * facts.evaluation * facts.seqlen)
    seconds += _solver_flops(facts) / pace.flops
    if not facts.trains_blocks:
        return seconds, 0.0
    epoch = _epoch_seconds(facts, pace)
    trials = 0.0
    if recovery.lr == "auto" and recovery.method == "ebft":
        trials = min(recovery.probe.blocks, facts.blocks) * _TRIALS * recovery.probe.epochs * epoch
    return seconds + recovery.epochs * epoch, trials


def tuning_seconds(facts: RunFacts, pace: Pace) -> float:
    """Seconds of the training of all blocks together; 0 without."""
    if not facts.tunes_together:
        return 0.0
    finish, recovery = facts.recipe.finish, facts.recipe.recovery
    epochs = float(recovery.epochs)
    if finish.method == "kl":
        epochs = finish.epochs + (3.0 * finish.trials.epochs if finish.lr == "auto" else 0.0)
    dense = pace.forward if finish.method == "kl" and finish.runs_dense else 0.0
    again = pace.forward if facts.device.type == "cuda" else 0.0
    tokens = (facts.training + facts.heldout / 2) * facts.seqlen
    steps = -(-facts.training // (finish if finish.method == "kl" else recovery).batch_size)
    return epochs * facts.blocks * (tokens * (pace.both + dense + again) + steps * pace.step)


def _epoch_seconds(facts: RunFacts, pace: Pace) -> float:
    """Of one block: every window forward and backward, steps, and the held-out windows."""
    steps = -(-facts.training // facts.recipe.recovery.batch_size)
    trained = facts.training * facts.seqlen * pace.both + steps * pace.step
    return trained + facts.heldout * facts.seqlen * pace.forward


def _solver_flops(facts: RunFacts) -> float:
    """Statistics and solver of a pruner that looks at more than norms."""
    solves = _SOLVES.get(facts.recipe.pruning.method)
    if solves is None:
        return 0.0
    tokens = facts.training * facts.seqlen
    sums = sum(tokens * matrix.inputs**2 for matrix in facts.matrices)  # two FLOPs each, half of them shared
    return sums + solves * sum(2.0 * matrix.outputs * matrix.inputs**2 for matrix in facts.matrices)


def _backward(output: torch.Tensor) -> None:
    output.float().square().mean().backward()  # type: ignore[no-untyped-call]
