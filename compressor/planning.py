"""What a run does before its first block: every check that can be made by then, and the texts cut into windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from compressor.block_pass import BlockPass, check_plan
from compressor.block_result import PassResult
from compressor.calibration.text import TextSource, read_text
from compressor.calibration.windows import Windows, calibration_windows
from compressor.devices import dtype_name
from compressor.end_to_end import finish_for
from compressor.errors import UsageError
from compressor.evaluation import Evaluation, evaluation_of, window_length
from compressor.linears import IgnoreRules
from compressor.models.source import BlockSource
from compressor.models.writer import BlockWriter, CheckpointWriter
from compressor.opening import OpenModel
from compressor.pass_state import PassState
from compressor.progress import Notice, Progress, RunStarted, TextReady
from compressor.quantization.writer import QuantizingWriter
from compressor.ranks import ALONE, Ranks
from compressor.recipe import PruningRecipe, Recipe
from compressor.report.schema import CalibrationFacts
from compressor.sparsity import SparsityPattern
from compressor.structured import Anatomy, find_anatomy
from compressor.unread_settings import unread_settings

DEFAULT_SPARSITY = 0.5


@dataclass(frozen=True)
class Calibration:
    """The calibration text and the windows that were cut from it.

    Attributes:
        text: The text, with its hash.
        windows: Windows to work on and held-out ones.
        seqlen: Tokens of each.
        notices: What the user should know.
    """

    text: TextSource
    windows: Windows
    seqlen: int
    notices: tuple[str, ...]

    def facts(self) -> CalibrationFacts:
        """What a report says of it."""
        text = self.text
        return CalibrationFacts(
            source=text.spec, sha256=text.sha256, protocol={"text": text.description, **self.windows.protocol}
        )


@dataclass(frozen=True)
class Job:
    """A run whose model and texts are open and whose plan has been checked; ``recipe`` as it is used.

    ``anatomy`` says which heads and neurons could go, ``None`` for a pruner that takes none out.
    """

    source: BlockSource
    recipe: Recipe
    pattern: SparsityPattern
    ignore: IgnoreRules
    calibration: Calibration
    evaluation: Evaluation
    device: torch.device
    notices: tuple[str, ...]
    anatomy: Anatomy | None = None

    @property
    def widths(self) -> Mapping[str, int]:
        """Values of the config for the widths that all layers will have; empty where it keeps its own."""
        return {} if self.anatomy is None else self.anatomy.widths


def pattern_of(recipe: PruningRecipe) -> SparsityPattern:
    """The sparsity that a recipe asks for; 50 % unstructured when it names none.

    Raises:
        UsageError: It is out of range.
    """
    if recipe.pattern is not None:
        return SparsityPattern.parse(recipe.pattern)
    return SparsityPattern.unstructured(DEFAULT_SPARSITY if recipe.sparsity is None else recipe.sparsity)


def calibration_of(recipe: Recipe, tokenizer: Any, max_seqlen: int, vocab_rows: int) -> Calibration:
    """The calibration windows that ``recipe`` asks for.

    Args:
        recipe: Its calibration section and its seed count.
        tokenizer: The model's.
        max_seqlen: The most tokens that the model has positions for; no window is longer.
        vocab_rows: Rows of its embedding.

    Raises:
        ReportedError: The text is absent, empty, not UTF-8, too short, or has tokens that the model lacks.
    """
    settings = recipe.calibration
    seqlen, notices = window_length(max_seqlen, settings.seqlen), []
    if settings.seqlen is not None and settings.seqlen > seqlen:
        notices.append(
            f"windows have {seqlen} tokens, the model's limit, and not the {settings.seqlen} of the recipe"
        )
    text = read_text(
        settings.source,
        role="calibration",
        dataset_config=settings.dataset_config,
        split=settings.split,
        text_column=settings.text_column,
    )
    windows = calibration_windows(
        text,
        tokenizer,
        num_samples=settings.num_samples,
        seqlen=seqlen,
        sampler=settings.sampler,
        heldout_share=settings.heldout,
        seed=recipe.seed,
        vocab_rows=vocab_rows,
    )
    return Calibration(text, windows, seqlen, tuple(notices))


def plan(
    opened: OpenModel,
    recipe: Recipe,
    pattern: SparsityPattern,
    ignore: IgnoreRules,
    progress: Progress,
    decided_finish: str | None = None,
    ranks: Ranks = ALONE,
) -> Job:
    """Every check that can be made before the first block is touched, and the texts cut into windows.

    Args:
        opened: The model.
        recipe: What is asked for.
        pattern: The sparsity to reach.
        ignore: Which matrices stay dense.
        progress: Receives events.
        decided_finish: What an earlier run, which this one goes on with, has made of finish ``auto``.
        ranks: Who shares the windows.

    Raises:
        ReportedError: The plan does not fit the model, or a text cannot be used.
    """
    source = opened.source
    prunable = check_plan(source, pattern, ignore)
    anatomy = None
    if recipe.pruning.method == "flap":
        anatomy = find_anatomy(source, ignore, pattern.sparsity, uniform=recipe.pruning.flap.uniform)
    tokenizer = opened.load_tokenizer()
    calibration = calibration_of(recipe, tokenizer, source.max_seqlen, source.vocab_size)
    seqlen, windows = calibration.seqlen, calibration.windows
    evaluation = evaluation_of(recipe.evaluation, tokenizer, seqlen, source.vocab_size)
    _check_ranks(ranks, len(windows.ids))
    if recipe.finish.method == "auto" and decided_finish is not None:
        finish, why = decided_finish, None
    else:
        finish, why = finish_for(
            source, recipe, windows=windows.count, seqlen=seqlen, device=opened.device, ranks=ranks
        )
    notices = (
        *unread_settings(recipe),
        *opened.checkpoint.notices,
        *calibration.notices,
        *((why,) if why else ()),
        *_ranks_notices(ranks, recipe),
    )
    progress(
        RunStarted(
            model=opened.checkpoint.name,
            architecture=source.architecture.label,
            num_blocks=source.num_blocks,
            prunable_weights=prunable,
            checkpoint_dtype=dtype_name(opened.checkpoint.dtype),
            export_dtype=opened.export_type,
            device=str(opened.device),
            pattern=str(pattern),
            pruner=recipe.pruning.method,
            recovery=recipe.recovery.method,
            finish=finish,
        )
    )
    for message in notices:
        progress(Notice(message))
    text = calibration.text
    progress(TextReady("calibration", text.spec, len(windows.ids), seqlen, len(windows.heldout)))
    progress(TextReady("evaluation", evaluation.text.spec, len(evaluation.ids), seqlen))
    used = as_used(recipe, pattern, seqlen, finish)
    return Job(source, used, pattern, ignore, calibration, evaluation, opened.device, notices, anatomy)


def as_used(recipe: Recipe, pattern: SparsityPattern, seqlen: int, finish: str) -> Recipe:
    """The recipe with what it left open filled in, as the report states it."""
    pruning = recipe.pruning
    if not pattern.is_n_m:
        pruning = pruning.model_copy(update={"sparsity": pattern.sparsity})
    if pruning.flap.uniform:
        alike = {"structure": "UL-UM", "bias_compensation": False}
        pruning = pruning.model_copy(update={"flap": pruning.flap.model_copy(update=alike)})
    calibration = recipe.calibration.model_copy(update={"seqlen": seqlen})
    finishing = recipe.finish.model_copy(update={"method": finish})
    recovery = recipe.recovery
    if finish != "none" and recovery.method == "ebft" and recovery.epochs_before_finish is not None:
        recovery = recovery.model_copy(update={"epochs": recovery.epochs_before_finish})
    parts = {"pruning": pruning, "recovery": recovery, "calibration": calibration, "finish": finishing}
    return recipe.model_copy(update=parts)


def with_finish(job: Job, recipe: Recipe, finish: str) -> Job:
    """The job with the finish that another rank has decided on.

    Args:
        job: Planned here.
        recipe: What was asked for.
        finish: ``none`` or ``kl``.
    """
    return replace(job, recipe=as_used(recipe, job.pattern, job.calibration.seqlen, finish))


def quantizer_of(job: Job, writer: CheckpointWriter, folder: Path) -> QuantizingWriter | None:
    """What quantises the blocks on their way to ``writer``, which writes to ``folder``; None where nothing does."""
    export = job.recipe.export
    if export.weight_bits is None:
        return None
    return QuantizingWriter(
        writer,
        folder,
        job.source,
        bits=export.weight_bits,
        activation_bits=export.used_activation_bits,
        calibration=job.calibration.windows.ids,
        evaluation=torch.from_numpy(job.evaluation.ids),
        device=job.device,
    )


def run_blocks(
    job: Job,
    writer: BlockWriter,
    stop: Callable[[], bool],
    progress: Progress,
    state: PassState | None = None,
    ranks: Ranks = ALONE,
) -> PassResult:
    """Every block pruned, repaired and committed.

    Args:
        job: The run.
        writer: Takes the blocks.
        stop: Asked between blocks; true ends the pass.
        progress: Receives events.
        state: Keeps what is done; see ``BlockPass``.
        ranks: Who shares the windows.

    Raises:
        StoppedSafely: ``stop`` said so.
        ReportedError: Weights or activations are not finite, and the like.
    """
    return BlockPass(
        job.source,
        job.calibration.windows.ids,
        job.calibration.windows.heldout,
        torch.from_numpy(job.evaluation.ids),
        recipe=job.recipe,
        pattern=job.pattern,
        ignore=job.ignore,
        device=job.device,
        stop=stop,
        progress=progress,
        anatomy=job.anatomy,
        state=state,
        ranks=ranks,
    ).run(writer)


def _check_ranks(ranks: Ranks, windows: int) -> None:
    """Refuse what leaves a rank without windows.

    Raises:
        UsageError: E-RANKS-WINDOWS.
    """
    if windows < ranks.world:
        raise UsageError(
            "E-RANKS-WINDOWS",
            f"{ranks.world} processes cannot share {windows} calibration windows",
            "start fewer processes, or give more --num-calibration-samples",
        )


def _ranks_notices(ranks: Ranks, recipe: Recipe) -> tuple[str, ...]:
    """What the user of several processes should know."""
    if ranks.world == 1:
        return ()
    notices = [
        f"{ranks.world} processes share the windows; another number of them gives other last digits, "
        "and now and then another mask bit"
    ]
    batch_sizes = [recipe.recovery.batch_size] + [recipe.finish.batch_size] * recipe.may_finish
    if min(batch_sizes) < ranks.world:
        notices.append(
            f"a batch of {min(batch_sizes)} windows leaves {ranks.world - min(batch_sizes)} of {ranks.world} "
            "processes without work in each step"
        )
    return tuple(notices)
