"""Tiny whole models, pruned at random, with windows of tokens that count, for the tests of end-to-end tuning."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from architectures import VOCAB
from tiny_checkpoints import write_checkpoint
from torch import Tensor

from compressor.finetuning.sparse_model import SparseModel, Windows, hidden_states
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source
from compressor.streams import Activations

CPU = torch.device("cpu")


@functools.cache
def source_of(variant: str) -> LoadedSource:
    """The dense blocks of a tiny random model; they are copied out, so that all tests can share them."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = open_checkpoint(write_checkpoint(Path(folder) / variant, variant))
        return open_source(checkpoint, CPU)


def sparse_model(
    variant: str = "llama", *, windows: int = 6, heldout: int = 3, seqlen: int = 10, dense: bool = True
) -> SparseModel:
    """The model with a random half of each matrix pruned.

    Args:
        variant: Of ``architectures``.
        windows: Training windows.
        heldout: Held-out windows.
        seqlen: Tokens of each.
        dense: Whether the dense model's last hidden states are kept.
    """
    source = source_of(variant)
    generator = torch.Generator().manual_seed(7)
    blocks = [source.load_block(index) for index in range(source.num_blocks)]
    matrices = [prunable_matrices(block, "block", IgnoreRules()) for block in blocks]
    masks: list[dict[str, Tensor]] = []
    for block, own in zip(blocks, matrices, strict=True):
        masks.append({})
        for name in dict.fromkeys(matrix.parameter for matrix in own):
            weight = block.get_parameter(name)
            masks[-1][name] = torch.rand(weight.shape, generator=generator) > 0.5
            weight.masked_fill_(~masks[-1][name], 0.0)
    # Tokens that count on from somewhere, so that there is something to predict.
    first = torch.randint(VOCAB, (windows + heldout, 1), generator=generator)
    ids = 3 + (first + torch.arange(seqlen)) % (VOCAB - 3)
    model = SparseModel(
        blocks=blocks,
        masks=masks,
        matrices=matrices,
        training=Windows(ids[:windows]),
        heldout=Windows(ids[windows:]),
        embed=source.embed,
        forward=source.forward,
        head=source.head,
        load_dense=source.load_block,
        vocab_size=source.vocab_size,
        device=CPU,
    )
    return with_dense_states(model) if dense else model


def with_dense_states(model: SparseModel) -> SparseModel:
    """The model with the dense one's last hidden states beside its windows."""
    dense = [model.load_dense(index) for index in range(len(model.blocks))]
    changed: dict[str, Any] = dict(vars(model))
    for role in ("training", "heldout"):
        ids = changed[role].ids
        with torch.no_grad():
            states = hidden_states(model, dense, ids)[-1] if len(ids) else torch.empty(*ids.shape, 1)
        changed[role] = Windows(ids, Activations.filled(states))
    return SparseModel(**changed)


def logits_of(model: SparseModel, ids: Tensor, *, dense: bool = False) -> Tensor:
    """Logits (B, T, V) of the sparse model as it is, or of the dense one."""
    blocks = [model.load_dense(index) for index in range(len(model.blocks))] if dense else model.blocks
    hidden = model.embed(ids)
    for index, block in enumerate(blocks):
        hidden = model.forward(index, block, hidden)
    return model.head(hidden)


def weights_of(model: SparseModel) -> dict[str, Tensor]:
    """A copy of all blocks' parameters."""
    return {name: weight.detach().clone() for name, weight in model.together().named_parameters()}


def zeros_are_kept(model: SparseModel) -> bool:
    """Whether every masked weight is +0.0 to the bit."""
    together = model.together()
    return not any(
        together.get_parameter(name).detach()[~mask].view(torch.int32).any()
        for name, mask in model.all_masks().items()
    )
