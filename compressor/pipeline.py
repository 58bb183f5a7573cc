"""One run, from a model to a proven sparse ONNX file; reads like a table of contents.

Nothing here prints, exits or sets up logging: progress goes to a callback, the result comes back as an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from compressor.combinations import check_combination
from compressor.delivery import CompressionResult, Delivery, Measured
from compressor.devices import limited_device_memory, resolve_device
from compressor.errors import OutOfResources
from compressor.estimating import FACTOR, estimate_job, refuse_misfits
from compressor.linears import IgnoreRules
from compressor.models.writer import CheckpointWriter
from compressor.opening import open_model
from compressor.planning import Job, pattern_of, plan, quantizer_of, run_blocks
from compressor.progress import EstimateReady, Notice, Progress, StageStarted, silent
from compressor.quantization.writer import with_quantized
from compressor.ranks import ALONE, Ranks
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.resuming import (
    DECISIVE,
    check_resume,
    decided_finish,
    facts_of,
    finished_run,
    forget_state,
    open_state,
    run_digest,
)
from compressor.run.measure import Measure
from compressor.run.output import OutputPlan, reserve_output
from compressor.run.publish import Staging
from compressor.streams import limited_activations
from validators.session import check_provider
from validators.validate import check_required

_LONG_S = 60.0  # a run that is expected to take longer says beforehand what it will take


def compress(
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
    validate: bool = True,
    provider: str = "auto",
    parity: str = "auto",
    require: Sequence[str] = (),
    resume: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
    ranks: Ranks = ALONE,
) -> CompressionResult:
    """Prune ``model``, repair it block by block, export it to ``out`` and validate the file.

    Args:
        model: A local Hugging Face folder or a hub id, safetensors only.
        out: A path that ends in ``.onnx``, or a folder.
        recipe: All settings; None takes the built-in ``default``. Without a sparsity or pattern, 50 %. The report
            holds the recipe as it was used, with window length and sparsity filled in.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``; blocks are pruned and repaired there.
        activation_memory: Bytes that the hidden states of all windows may take together; the rest lies on the disk, in
            files beside the output that have no name. None sets no limit.
        max_device_memory: Bytes of a CUDA device's memory to take at most; None sets no limit. Where it, or the device,
            does not hold a batch in training, the batch goes through in parts.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint; recorded in the report.
        force: Replace an existing output.
        validate: Compare the exported file with the PyTorch sparse model; without it the verdict is None.
        provider: ONNX Runtime execution provider of the validation.
        parity: How the validation runs the ONNX model: ``whole``, ``blocks`` (one in memory at a time), or ``auto``.
        require: Names of checks that must not be skipped.
        resume: ``auto`` goes on where an earlier run of the same settings on the same output was stopped or killed,
            ``required`` refuses to begin anew, ``never`` begins anew.
        stop: Asked between blocks; true ends the run with StoppedSafely; the same call goes on from there.
        progress: Receives events (compressor.progress).
        ranks: The processes that share the calibration windows, of which this is rank 0; the others call
            ``compressor.following.follow``.

    Returns:
        Where the products are, the report, and the verdict. A failed gate is a verdict, not an exception.

    Raises:
        ReportedError: Bad input, an existing output, missing resources; nothing was published, an older output stands.
    """
    recipe = recipe if recipe is not None else read_recipe(None)
    measure = Measure()
    with ExitStack() as held:
        with ranks.together():
            check_required(require)
            check_provider(provider if validate else "auto")
            check_combination(recipe)
            choice = check_resume(resume)
            pattern, ignore = pattern_of(recipe.pruning), IgnoreRules(recipe.pruning.ignore)
            may_be_done = choice != "never" and not force
            reserved = reserve_output(out, force, model=model, may_be_done=may_be_done)
            target = held.enter_context(reserved)
            limited = limited_device_memory(resolve_device(device), max_device_memory)
            unlimited = held.enter_context(limited)
            decided = None if choice == "never" else decided_finish(target)
        with measure.stage("open"), ranks.together():
            progress(StageStarted("open", str(model)))
            opened = open_model(
                model,
                dtype=recipe.export.dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            job = plan(opened, recipe, pattern, ignore, progress, decided, ranks)
            if unlimited:
                progress(Notice(unlimited))
            facts = facts_of(job, opened)
            result = finished_run(target, facts, validated=validate) if may_be_done else None
        ranks.text(job.recipe.finish.method)
        ranks.check_same(DECISIVE, bytes.fromhex(run_digest(facts)))
        ranks.any(result is not None)  # the others end here too
        if result is not None:
            name = target.target.name
            progress(Notice(f"{name} is the output of this very run already: nothing is to be done"))
            forget_state(target)
            return result
        with ExitStack() as staged:
            with ranks.together():
                staging = staged.enter_context(Staging(target))
            state = open_state(target, facts, job.source, choice, progress, ranks)
            # Of several ranks none foresees: the probe of a block would wait for the others.
            if not state.windows_done and ranks.world == 1:
                foresee(job, opened.dtype, target, activation_memory, progress)
            hf_folder = staging.plan.hf or staging.scratch / "hf"
            with measure.stage("blocks"), limited_activations(activation_memory, staging.scratch):
                writer = CheckpointWriter(hf_folder, job.source, opened.dtype, widths=job.widths)
                quantizer = quantizer_of(job, writer, hf_folder)
                passed = run_blocks(job, quantizer or writer, ranks.agreed(stop), progress, state, ranks)
                ranks.part()
                (quantizer or writer).finish()
                quantized = None if quantizer is None else quantizer.result()
            measure.timings.update({f"blocks: {tuned.method}": tuned.elapsed_s for tuned in passed.finetuned})
            subject = opened.subject("run", job.pattern)
            job.source.close()
            measured = Measured(
                job.evaluation,
                with_quantized(passed.perplexities, quantized),
                job.calibration.facts(),
                passed,
                run_digest(facts),
                quantized,
            )
            delivery = Delivery(subject, staging, hf_folder, job.recipe, measure, progress)
            result = delivery.deliver(
                measured,
                validate=validate,
                provider=provider,
                parity=parity,
                require=require,
                notices=(*job.notices, *((unlimited,) if unlimited else ()), *passed.notices),
            )
        forget_state(target)
        return result


def foresee(
    job: Job, dtype: torch.dtype, target: OutputPlan, activation_memory: int | None, progress: Progress
) -> None:
    """Tell what a long run will take, and refuse one that cannot fit.

    Raises:
        OutOfResources: See ``compressor.estimating.refuse_misfits``; where an estimate could be too high, a warning.
    """
    estimate = estimate_job(job, dtype, target, activation_memory)
    if estimate.blocks_s is None or estimate.blocks_s > _LONG_S:
        progress(EstimateReady(*estimate.lines()))
    refuse_misfits(estimate, FACTOR)
    try:
        refuse_misfits(estimate)
    except OutOfResources as error:
        progress(Notice(f"this may not fit: {error.message}; {error.remedy}", shortfall=True))
