"""One run, from a model to a proven sparse ONNX file; reads like a table of contents.

Nothing here prints, exits or sets up logging: progress goes to a callback, the result comes back as an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from compressor.block_pass import BlockPass, PassResult, check_plan
from compressor.calibration.text import TextSource, read_text
from compressor.calibration.windows import Windows, calibration_windows
from compressor.delivery import CompressionResult, Delivery, Measured
from compressor.devices import dtype_name
from compressor.end_to_end import finish_for
from compressor.evaluation import Evaluation, evaluation_of, window_length
from compressor.linears import IgnoreRules
from compressor.models.source import BlockSource
from compressor.models.writer import CheckpointWriter
from compressor.opening import OpenModel, open_model
from compressor.progress import Notice, Progress, RunStarted, StageStarted, TextReady, silent
from compressor.recipe import PruningRecipe, Recipe, read_recipe
from compressor.report.schema import CalibrationFacts
from compressor.run.measure import Measure
from compressor.run.output import reserve_output
from compressor.run.publish import Staging
from compressor.sparsity import SparsityPattern
from validators.session import check_provider
from validators.validate import check_required

DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class _Job:
    """A run whose model and texts are open and whose plan has been checked."""

    source: BlockSource
    recipe: Recipe
    pattern: SparsityPattern
    ignore: IgnoreRules
    calibration_text: TextSource
    windows: Windows
    evaluation: Evaluation
    device: torch.device
    notices: tuple[str, ...]


def compress(
    model: str | Path,
    out: str | Path,
    recipe: Recipe | None = None,
    *,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    validate: bool = True,
    provider: str = "auto",
    require: Sequence[str] = (),
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
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint; recorded in the report.
        force: Replace an existing output.
        validate: Compare the exported file with the PyTorch sparse model; without it the verdict is None.
        provider: ONNX Runtime execution provider of the validation.
        require: Names of checks that must not be skipped.
        stop: Asked between blocks; true ends the run with StoppedSafely.
        progress: Receives events (compressor.progress).

    Returns:
        Where the products are, the report, and the verdict. A failed gate is a verdict, not an exception.

    Raises:
        ReportedError: Bad input, an existing output, missing resources; nothing was written, an older output stands.
    """
    recipe = recipe if recipe is not None else read_recipe(None)
    check_required(require)
    check_provider(provider if validate else "auto")
    pattern, ignore = pattern_of(recipe.pruning), IgnoreRules(recipe.pruning.ignore)
    measure = Measure()
    with reserve_output(out, force, model=model) as plan, Staging(plan) as staging:
        hf_folder = staging.plan.hf or staging.scratch / "hf"
        with measure.stage("open"):
            progress(StageStarted("open", str(model)))
            opened = open_model(
                model,
                dtype=recipe.export.dtype,
                device=device,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
            job = _plan(opened, recipe, pattern, ignore, progress)
        source = opened.source
        with measure.stage("blocks"):
            passed = _run_blocks(job, CheckpointWriter(hf_folder, source, opened.dtype), stop, progress)
        subject = opened.subject("run", job.pattern)
        source.close()
        measured = Measured(job.evaluation, passed.perplexities, _calibration_facts(job), passed)
        delivery = Delivery(subject, staging, hf_folder, job.recipe, measure, progress)
        return delivery.deliver(
            measured,
            validate=validate,
            provider=provider,
            require=require,
            notices=(*job.notices, *passed.notices),
        )


def pattern_of(recipe: PruningRecipe) -> SparsityPattern:
    """The sparsity that a recipe asks for; 50 % unstructured when it names none.

    Raises:
        UsageError: It is out of range.
    """
    if recipe.pattern is not None:
        return SparsityPattern.parse(recipe.pattern)
    return SparsityPattern.unstructured(DEFAULT_SPARSITY if recipe.sparsity is None else recipe.sparsity)


def _plan(
    opened: OpenModel, recipe: Recipe, pattern: SparsityPattern, ignore: IgnoreRules, progress: Progress
) -> _Job:
    """Every check that can be made before the first block is touched, and the texts cut into windows."""
    source = opened.source
    notices = list(opened.checkpoint.notices)
    prunable = check_plan(source, pattern, ignore)
    tokenizer = opened.load_tokenizer()
    asked = recipe.calibration.seqlen
    seqlen = window_length(source.max_seqlen, asked)
    if asked is not None and asked > seqlen:
        notices.append(f"windows have {seqlen} tokens, the model's limit, and not the {asked} of the recipe")
    text = read_text(
        recipe.calibration.source,
        role="calibration",
        dataset_config=recipe.calibration.dataset_config,
        split=recipe.calibration.split,
        text_column=recipe.calibration.text_column,
    )
    windows = calibration_windows(
        text,
        tokenizer,
        num_samples=recipe.calibration.num_samples,
        seqlen=seqlen,
        sampler=recipe.calibration.sampler,
        heldout_share=recipe.calibration.heldout,
        seed=recipe.seed,
        vocab_rows=source.vocab_size,
    )
    evaluation = evaluation_of(recipe.evaluation, tokenizer, seqlen, source.vocab_size)
    counted = len(windows.ids) + len(windows.heldout)
    finish, why = finish_for(source, recipe, windows=counted, seqlen=seqlen, device=opened.device)
    notices.extend([why] if why else [])
    progress(
        RunStarted(
            model=opened.checkpoint.name,
            architecture=source.architecture.label,
            num_blocks=source.num_blocks,
            prunable_weights=prunable,
            checkpoint_dtype=dtype_name(opened.checkpoint.dtype),
            export_dtype=dtype_name(opened.dtype),
            device=str(opened.device),
            pattern=str(pattern),
            pruner=recipe.pruning.method,
            recovery=recipe.recovery.method,
            finish=finish,
        )
    )
    for message in notices:
        progress(Notice(message))
    progress(TextReady("calibration", text.spec, len(windows.ids), seqlen, len(windows.heldout)))
    progress(TextReady("evaluation", evaluation.text.spec, len(evaluation.ids), seqlen))
    used = _as_used(recipe, pattern, seqlen, finish)
    return _Job(source, used, pattern, ignore, text, windows, evaluation, opened.device, tuple(notices))


def _as_used(recipe: Recipe, pattern: SparsityPattern, seqlen: int, finish: str) -> Recipe:
    """The recipe with what it left open filled in, as the report states it."""
    pruning = recipe.pruning
    if not pattern.is_n_m:
        pruning = pruning.model_copy(update={"sparsity": pattern.sparsity})
    calibration = recipe.calibration.model_copy(update={"seqlen": seqlen})
    finishing = recipe.finish.model_copy(update={"method": finish})
    return recipe.model_copy(update={"pruning": pruning, "calibration": calibration, "finish": finishing})


def _run_blocks(
    job: _Job, writer: CheckpointWriter, stop: Callable[[], bool], progress: Progress
) -> PassResult:
    """Every block pruned, repaired and committed; the written folder is whole when this returns."""
    block_pass = BlockPass(
        job.source,
        job.windows.ids,
        job.windows.heldout,
        torch.from_numpy(job.evaluation.ids),
        recipe=job.recipe,
        pattern=job.pattern,
        ignore=job.ignore,
        device=job.device,
        stop=stop,
        progress=progress,
    )
    passed = block_pass.run(writer)
    writer.finish()
    return passed


def _calibration_facts(job: _Job) -> CalibrationFacts:
    text = job.calibration_text
    return CalibrationFacts(
        source=text.spec, sha256=text.sha256, protocol={"text": text.description, **job.windows.protocol}
    )
