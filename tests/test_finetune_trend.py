"""What the finish promises, on the shipped language model: nearer to the dense model, and better text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from finetune_samples import CPU, logits_of, with_dense_states, zeros_are_kept
from torch import Tensor

from compressor.calibration.python_docs import Split, python_docs
from compressor.finetuning import kl
from compressor.finetuning.sparse_model import SparseModel, Windows
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import open_source
from compressor.pruning.magnitude import magnitude_mask
from compressor.recipe import FinishRecipe
from compressor.sparsity import SparsityPattern

FOLDER = Path(__file__).parents[1] / "examples" / "tiny-llm"
SEQLEN = 64


@pytest.fixture(scope="module")
def pruned() -> SparseModel:
    """The example model with 60 % of each matrix pruned by magnitude, 16 windows to train on, 4 held out."""
    checkpoint = open_checkpoint(FOLDER)
    source = open_source(checkpoint, CPU)
    blocks = [source.load_block(index) for index in range(source.num_blocks)]
    matrices = [prunable_matrices(block, "block", IgnoreRules()) for block in blocks]
    masks: list[dict[str, Tensor]] = []
    for block, own in zip(blocks, matrices, strict=True):
        masks.append({})
        for matrix in own:
            mask = magnitude_mask(matrix.of(block), SparsityPattern.unstructured(0.6))
            masks[-1][matrix.parameter] = mask
            matrix.of(block).masked_fill_(~mask, 0.0)
    return with_dense_states(
        SparseModel(
            blocks=blocks,
            masks=masks,
            matrices=matrices,
            training=Windows(windows_of("train", 16)),
            heldout=Windows(windows_of("heldout", 4)),
            embed=source.embed,
            forward=source.forward,
            head=source.head,
            load_dense=source.load_block,
            vocab_size=source.vocab_size,
            device=CPU,
        )
    )


def windows_of(split: Split, count: int) -> Tensor:
    """The first windows of a split's text."""
    tokenizer = open_checkpoint(FOLDER).load_tokenizer()
    tokens: list[int] = []
    for document in python_docs(split).documents:
        tokens += tokenizer(document)["input_ids"]
        if len(tokens) >= count * SEQLEN:
            break
    return torch.tensor(tokens[: count * SEQLEN]).view(count, SEQLEN)


def perplexity(model: SparseModel, ids: Tensor) -> float:
    """exp of the mean nats per predicted token."""
    with torch.no_grad():
        logits = logits_of(model, ids)[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item())


def test_finish_brings_text_it_never_saw_nearer_to_the_dense_model(pruned: SparseModel) -> None:
    """Two epochs over 1024 tokens take a tenth off the divergence held out, and lower the perplexity elsewhere."""
    unseen = windows_of("evaluation", 8)
    before = perplexity(pruned, unseen)
    recipe = FinishRecipe(epochs=2, batch_size=4, lr=3e-3)
    result = kl.finish(pruned, recipe, seed=0, tell=lambda step: None)
    assert result.best_step > 0
    assert result.loss_after < 0.9 * result.loss_before
    assert perplexity(pruned, unseen) < 0.95 * before
    assert zeros_are_kept(pruned)
