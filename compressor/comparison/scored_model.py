"""Zero-shot tasks on one PyTorch model: the dense one, or the one that a cell ends with."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from compressor.comparison.request import ScoringRequest
from compressor.comparison.results import Scores
from compressor.devices import resolve_device
from compressor.errors import StoppedSafely
from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm
from compressor.models.reference import TorchReference
from compressor.progress import Progress, TaskProgress
from validators.tasks import evaluate_tasks, load_tasks


def score_model(request: ScoringRequest, *, stop: Callable[[], bool], progress: Progress) -> Scores:
    """The scores of a model in float32 on the device; its tasks are loaded first.

    Args:
        request: The model and the tasks.
        stop: Asked after each answer; true ends the scoring.
        progress: Receives :class:`TaskProgress`, about a hundred times.

    Raises:
        StoppedSafely: ``stop`` said so.
        ReportedError: The tasks cannot be loaded or run, the model cannot be opened.
    """
    started = time.perf_counter()
    tasks = load_tasks(request.tasks.names, request.tasks.folder)
    checkpoint = open_checkpoint(
        request.model, revision=request.revision, trust_remote_code=request.trust_remote_code
    )
    device = resolve_device(request.device)
    model = TorchReference(load_causal_lm(checkpoint, torch.float32).to(device), device)

    def told(done: int, total: int) -> None:
        if stop():
            raise StoppedSafely(
                "E-STOPPED",
                f"stopped in the tasks after request {done} of {total}",
                "run the same command again",
            )
        if done == total or done % max(1, total // 100) == 0:
            progress(TaskProgress(done, total))

    results = evaluate_tasks(
        model,
        checkpoint.load_tokenizer(),
        tasks,
        limit=request.tasks.limit,
        max_tokens=request.tasks.max_tokens,
        on_request=told,
    )
    return Scores(results=results, seconds=time.perf_counter() - started)
