"""Export a model as it is: a dense baseline, or a model that was pruned elsewhere, whose zeros are found and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from compressor.combinations import check_export
from compressor.delivery import CompressionResult, Delivery, Measured
from compressor.evaluation import Evaluation, evaluation_of, window_length
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.models.writer import CheckpointWriter
from compressor.opening import OpenModel, open_model
from compressor.perplexities import PerplexityStreams
from compressor.progress import Notice, Progress, StageStarted, TextReady, silent
from compressor.quantization.writer import QuantizingWriter, with_quantized
from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe
from compressor.run.measure import Measure
from compressor.run.output import reserve_output
from compressor.run.publish import Staging
from compressor.sparsity import Mask
from validators.session import check_provider
from validators.validate import check_required

# A trained dense matrix has hardly any exact zero; fewer than this share are chance, not pruning.
PRUNED_SHARE = 0.05


def export(
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
    progress: Progress = silent,
) -> CompressionResult:
    """Export ``model`` to ``out`` without pruning it; a matrix with at least 5 % zeros keeps them as its mask.

    The arguments are those of ``compressor.compress``; of the recipe, the sections ``evaluation``, ``export`` and
    ``gates`` count, and ``calibration.seqlen`` as the length of the evaluation windows. In the report the model
    stands under ``perplexity.recovered``; with dtype int8 or int4 its quantised form, which the ONNX file is compared
    with, under ``perplexity.quantized``.

    Raises:
        ReportedError: Bad input, an existing output, missing resources; nothing was written, an older output stands.
    """
    recipe = recipe if recipe is not None else read_recipe(None)
    check_required(require)
    check_provider(provider if validate else "auto")
    check_export(recipe.export)
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
            source = opened.source
            seqlen = window_length(source.max_seqlen, recipe.calibration.seqlen)
            tokenizer = opened.load_tokenizer()
            evaluation = evaluation_of(recipe.evaluation, tokenizer, seqlen, source.vocab_size)
            for message in opened.checkpoint.notices:
                progress(Notice(message))
            progress(TextReady("evaluation", evaluation.text.spec, len(evaluation.ids), seqlen))
        with measure.stage("blocks"):
            progress(StageStarted("blocks", f"{source.num_blocks} blocks, {opened.export_type}"))
            writer = CheckpointWriter(hf_folder, source, opened.dtype)
            quantizer = _quantizer(recipe, opened, writer, hf_folder, evaluation)
            perplexity = _copy_blocks(opened, evaluation, quantizer or writer)
            quantized = None if quantizer is None else quantizer.result()
        subject = opened.subject("export", None)
        source.close()
        delivery = Delivery(subject, staging, hf_folder, recipe, measure, progress)
        perplexities = with_quantized({"recovered": perplexity}, quantized)
        measured = Measured(evaluation, perplexities, quantized=quantized)
        return delivery.deliver(
            measured, validate=validate, provider=provider, require=require, notices=opened.checkpoint.notices
        )


def found_masks(block: nn.Module, name: str) -> dict[str, Mask]:
    """Masks of the parameters that hold at least 5 % zeros, by path in the block; ``name``: the block's own path."""
    masks = {}
    for parameter in dict.fromkeys(
        matrix.parameter for matrix in prunable_matrices(block, name, IgnoreRules(()))
    ):
        kept = block.get_parameter(parameter) != 0
        if int((~kept).sum()) >= PRUNED_SHARE * kept.numel():
            masks[parameter] = kept
    return masks


def _quantizer(
    recipe: Recipe, opened: OpenModel, writer: CheckpointWriter, folder: Path, evaluation: Evaluation
) -> QuantizingWriter | None:
    """What quantises the blocks on their way, without calibration text: the steps reach the largest weights."""
    export = recipe.export
    if export.weight_bits is None:
        return None
    return QuantizingWriter(
        writer,
        folder,
        opened.source,
        bits=export.weight_bits,
        activation_bits=export.used_activation_bits,
        calibration=None,
        evaluation=torch.from_numpy(evaluation.ids),
        device=opened.device,
    )


def _copy_blocks(
    opened: OpenModel, evaluation: Evaluation, writer: CheckpointWriter | QuantizingWriter
) -> float:
    """Commit every block as it is, rounded to the exported type; perplexity of what was committed."""
    source = opened.source
    streams = PerplexityStreams(source, torch.from_numpy(evaluation.ids), opened.device, ("recovered",))
    for index in range(source.num_blocks):
        block = source.load_block(index)
        writer.commit(index, block, found_masks(block, f"{source.blocks_name}.{index}"))
        streams.advance("recovered", index, block)
    writer.finish()
    return streams.perplexities()["recovered"]
