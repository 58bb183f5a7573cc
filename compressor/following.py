"""The part in a run of every rank but the first: the same blocks on other windows, and nothing written or printed.

``compressor.pipeline.compress`` is the part of rank 0. The two wait for each other at the same places in the same
order.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from compressor.combinations import check_combination
from compressor.devices import limited_device_memory, resolve_device
from compressor.linears import IgnoreRules
from compressor.models.writer import RoundingWriter
from compressor.opening import open_model
from compressor.planning import pattern_of, plan, run_blocks, with_finish
from compressor.progress import silent
from compressor.ranks import Ranks
from compressor.recipe import Recipe
from compressor.resuming import DECISIVE, check_resume, facts_of, open_state, run_digest
from compressor.run.output import name_output
from compressor.streams import limited_activations

__all__ = ["follow"]


def follow(
    model: str | Path,
    out: str | Path,
    recipe: Recipe,
    ranks: Ranks,
    *,
    device: str,
    activation_memory: int | None = None,
    max_device_memory: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    resume: str = "auto",
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Take part in the run of rank 0, to the end of its blocks; arguments as ``compress`` has them there.

    Args:
        model: The same model; it must be readable here.
        out: Names the output, which rank 0 alone writes.
        recipe: The same settings.
        ranks: Who shares the windows.
        device: Of this process.
        activation_memory: Bytes that the hidden states of this rank's windows may take; the rest lies in files of the
            folder for temporary files.
        max_device_memory: Bytes of this process's CUDA device to take at most.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint.
        resume: What rank 0 does with an earlier state.
        stop: Asked between blocks; true ends the run on all ranks.

    Raises:
        ReportedError: An error here, or on another rank.
    """
    with ranks.together():  # rank 0 reserves the output
        check_combination(recipe)
        choice = check_resume(resume)
    with ranks.together():
        opened = open_model(
            model,
            dtype=recipe.export.dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        ignore = IgnoreRules(recipe.pruning.ignore)
        job = plan(opened, recipe, pattern_of(recipe.pruning), ignore, silent, None, ranks)
    job = with_finish(job, recipe, ranks.text(""))
    facts = facts_of(job, opened)
    ranks.check_same(DECISIVE, bytes.fromhex(run_digest(facts)))
    if ranks.any(False):
        return  # the output is there already
    with ranks.together():
        pass  # rank 0 makes its staging folder
    state = open_state(name_output(out), facts, job.source, choice, silent, ranks)
    with (
        limited_device_memory(resolve_device(device), max_device_memory),
        tempfile.TemporaryDirectory() as scratch,
        limited_activations(activation_memory, Path(scratch)),
    ):
        run_blocks(job, RoundingWriter(job.source, opened.dtype), ranks.agreed(stop), silent, state, ranks)
    ranks.part()
