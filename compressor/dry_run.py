"""A run that is planned and not made: what it would take."""

from __future__ import annotations

from pathlib import Path

from compressor.combinations import check_combination
from compressor.devices import limited_device_memory, resolve_device
from compressor.estimating import Estimate, estimate_job
from compressor.linears import IgnoreRules
from compressor.opening import open_model
from compressor.planning import pattern_of, plan
from compressor.progress import EstimateReady, Notice, Progress, StageStarted, silent
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run.output import plan_output

__all__ = ["estimate_run"]


def estimate_run(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    activation_memory: int | None = None,
    max_device_memory: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> Estimate:
    """What ``compress`` with these arguments would take; see there. Nothing is written, a hub model is fetched.

    The first block runs on one window of the text, forward and backward, so that there is a time to tell.

    Raises:
        ReportedError: Whatever ``compress`` would refuse before its first block. What does not fit is no error here:
            see ``compressor.estimating.refuse_misfits``.
    """
    recipe = recipe if recipe is not None else read_recipe(None)
    check_combination(recipe)
    pattern, ignore = pattern_of(recipe.pruning), IgnoreRules(recipe.pruning.ignore)
    place = plan_output(out, force, model=model)
    with limited_device_memory(resolve_device(device), max_device_memory) as unlimited:
        progress(StageStarted("open", str(model)))
        opened = open_model(
            model,
            dtype=recipe.export.dtype,
            device=device,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        job = plan(opened, recipe, pattern, ignore, progress)
        if unlimited:
            progress(Notice(unlimited))
        estimate = estimate_job(job, opened.dtype, place, activation_memory)
        job.source.close()
    progress(EstimateReady(*estimate.lines()))
    return estimate
