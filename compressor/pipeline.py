"""One run, from a model to a proven sparse ONNX file; reads like a table of contents.

Nothing here prints, exits or sets up logging: progress goes to a callback, the result comes back as an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from compressor.combinations import check_combination
from compressor.delivery import CompressionResult, Delivery, Measured
from compressor.linears import IgnoreRules
from compressor.models.writer import CheckpointWriter
from compressor.opening import open_model
from compressor.planning import pattern_of, plan, quantizer_of, run_blocks
from compressor.progress import Notice, Progress, StageStarted, silent
from compressor.quantization.writer import with_quantized
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.resuming import (
    check_resume,
    decided_finish,
    facts_of,
    finished_run,
    forget_state,
    open_state,
    run_digest,
)
from compressor.run.measure import Measure
from compressor.run.output import reserve_output
from compressor.run.publish import Staging
from compressor.streams import limited_activations
from validators.session import check_provider
from validators.validate import check_required


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    activation_memory: int | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    validate: bool = True,
    provider: str = "auto",
    require: Sequence[str] = (),
    resume: str = "auto",
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
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
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint; recorded in the report.
        force: Replace an existing output.
        validate: Compare the exported file with the PyTorch sparse model; without it the verdict is None.
        provider: ONNX Runtime execution provider of the validation.
        require: Names of checks that must not be skipped.
        resume: ``auto`` goes on where an earlier run of the same settings on the same output was stopped or killed,
            ``required`` refuses to begin anew, ``never`` begins anew.
        stop: Asked between blocks; true ends the run with StoppedSafely; the same call goes on from there.
        progress: Receives events (compressor.progress).

    Returns:
        Where the products are, the report, and the verdict. A failed gate is a verdict, not an exception.

    Raises:
        ReportedError: Bad input, an existing output, missing resources; nothing was published, an older output stands.
    """
    recipe = recipe if recipe is not None else read_recipe(None)
    check_required(require)
    check_provider(provider if validate else "auto")
    check_combination(recipe)
    choice = check_resume(resume)
    pattern, ignore = pattern_of(recipe.pruning), IgnoreRules(recipe.pruning.ignore)
    measure = Measure()
    may_be_done = choice != "never" and not force
    with reserve_output(out, force, model=model, may_be_done=may_be_done) as target:
        with measure.stage("open"):
            progress(StageStarted("open", str(model)))
            opened = open_model(
                model,
                dtype=recipe.export.dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            decided = None if choice == "never" else decided_finish(target)
            job = plan(opened, recipe, pattern, ignore, progress, decided)
            facts = facts_of(job, opened)
            result = finished_run(target, facts, validated=validate) if may_be_done else None
        if result is not None:
            name = target.target.name
            progress(Notice(f"{name} is the output of this very run already: nothing is to be done"))
            forget_state(target)
            return result
        with Staging(target) as staging:
            state = open_state(target, facts, job.source, choice, progress)
            hf_folder = staging.plan.hf or staging.scratch / "hf"
            with measure.stage("blocks"), limited_activations(activation_memory, staging.scratch):
                writer = CheckpointWriter(hf_folder, job.source, opened.dtype, widths=job.widths)
                quantizer = quantizer_of(job, writer, hf_folder)
                passed = run_blocks(job, quantizer or writer, stop, progress, state)
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
                require=require,
                notices=(*job.notices, *passed.notices),
            )
        forget_state(target)
        return result
