"""Experts that are made of a checkpoint's matrices, one per expert, when asked for: the values of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint
from torch import nn

from compressor.errors import InputRefused
from compressor.models.checkpoint import Checkpoint, open_checkpoint
from compressor.models.export_view import export_parts
from compressor.models.loading import load_causal_lm, load_without_experts
from compressor.models.quiet import quiet_transformers
from compressor.models.source import open_source

WITH_EXPERTS = pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe"])
WEIGHTS = "model.safetensors"


def fused_names(model: nn.Module) -> list[str]:
    """Full names of the parameters that hold experts."""
    return [name for name, _ in model.named_parameters() if name.endswith(("gate_up_proj", "down_proj"))]


def sharded(folder: Path, variant: str, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """A tiny model in shards of a few kilobytes, so that the experts of one block lie in several."""
    whole = load_causal_lm(open_checkpoint(write_checkpoint(folder / "whole", variant, dtype=dtype)), dtype)
    with quiet_transformers():
        whole.save_pretrained(folder / "shards", max_shard_size="20KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / "shards" / name).write_bytes((folder / "whole" / name).read_bytes())
    checkpoint = open_checkpoint(folder / "shards")
    assert len(checkpoint.weights.paths) > 2
    return checkpoint


@WITH_EXPERTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_are_those_that_transformers_fuses(tmp_path: Path, variant: str, dtype: torch.dtype) -> None:
    """Bit for bit, over several files, and without values until they are read."""
    checkpoint = sharded(tmp_path, variant, dtype)
    whole = load_causal_lm(checkpoint, dtype)
    model, experts = load_without_experts(checkpoint, dtype)
    fused = fused_names(model)
    assert fused == fused_names(whole)
    assert len(fused) >= 2
    for name, parameter in whole.named_parameters():
        assert model.get_parameter(name).dtype == dtype
        assert not model.get_parameter(name).requires_grad
        assert model.get_parameter(name).is_meta == (name in fused)
        if name in fused:
            assert torch.equal(experts.read(name), parameter)


@WITH_EXPERTS
def test_a_source_reads_the_experts_of_one_block_at_a_time(tmp_path: Path, variant: str) -> None:
    """What the source keeps of its blocks has no experts; a block to work on has them, the first one like the last."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, variant))
    source = open_source(checkpoint, torch.device("cpu"))
    whole = load_causal_lm(checkpoint, torch.float32)
    for index in range(source.num_blocks):
        kept, block = source.block_structure(index), source.load_block(index)
        assert all(kept.get_parameter(name).is_meta for name in fused_names(kept))
        for name, parameter in whole.get_submodule(f"{source.blocks_name}.{index}").named_parameters():
            assert torch.equal(block.get_parameter(name), parameter)
        assert all(kept.get_parameter(name).is_meta for name in fused_names(kept))


def test_experts_outlive_their_files(tmp_path: Path) -> None:
    """As the other weights of an open model do."""
    checkpoint = sharded(tmp_path, "mixtral")
    whole = load_causal_lm(checkpoint, torch.float32)
    model, experts = load_without_experts(checkpoint, torch.float32)
    for path in checkpoint.weights.paths:
        path.unlink()
    for name in fused_names(model):
        assert torch.equal(experts.read(name), whole.get_parameter(name))


@WITH_EXPERTS
def test_an_export_stores_the_experts_of_the_checkpoint(tmp_path: Path, variant: str) -> None:
    """In the dtype that it is asked for."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path, variant))
    parts, whole = export_parts(checkpoint, torch.float16), load_causal_lm(checkpoint, torch.float32)
    fused = fused_names(whole)
    assert fused
    for name in fused:
        assert torch.equal(parts.stored(name), whole.get_parameter(name).half())


def test_a_checkpoint_that_lacks_an_expert_is_refused(tmp_path: Path) -> None:
    """By the loading, in its words: the parameter as transformers has it."""
    folder = write_checkpoint(tmp_path, "mixtral")
    tensors = load_file(folder / WEIGHTS)
    lost = [name for name in tensors if name.startswith("model.layers.1.") and name.endswith(".w2.weight")]
    save_file(
        {n: t for n, t in tensors.items() if n not in lost}, folder / WEIGHTS, metadata={"format": "pt"}
    )
    with pytest.raises(InputRefused, match="down_proj") as refused:
        open_source(open_checkpoint(folder), torch.device("cpu"))
    assert refused.value.error_id == "E-WEIGHTS-MISSING"


def test_a_checkpoint_that_stores_fused_experts_is_loaded_whole(tmp_path: Path) -> None:
    """Under the names that the model itself has."""
    folder = write_checkpoint(tmp_path, "qwen3_moe")
    whole = load_causal_lm(open_checkpoint(folder), torch.float32)
    save_file(
        {name: tensor.clone() for name, tensor in whole.state_dict().items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    model, experts = load_without_experts(open_checkpoint(folder), torch.float32)
    assert not experts
    for name, parameter in whole.named_parameters():
        assert torch.equal(model.get_parameter(name), parameter)


def test_a_model_without_experts_has_nothing_to_fill(tmp_path: Path) -> None:
    """All its parameters have values."""
    model, experts = load_without_experts(open_checkpoint(write_checkpoint(tmp_path)), torch.float32)
    assert not experts
    assert not any(parameter.is_meta for parameter in model.parameters())
