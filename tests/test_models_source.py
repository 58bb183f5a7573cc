"""Blocks one at a time: what they compute together is what the whole model computes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import VARIANTS
from safetensors.torch import load_file, save_file
from tiny_checkpoints import change_json, write_checkpoint
from torch import Tensor

from compressor.errors import InputRefused
from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm
from compressor.models.source import LoadedSource, open_source

CPU = torch.device("cpu")
WEIGHTS = "model.safetensors"
# One part in ten thousand: the same float32 operations in the same order, so that in fact nothing differs.
TOLERANCE = 1e-4


def windows(batch: int = 3, tokens: int = 17) -> Tensor:
    """Random token ids; longer than the sliding windows of the test models."""
    return torch.randint(3, 100, (batch, tokens), generator=torch.Generator().manual_seed(1))


def through_blocks(source: LoadedSource, ids: Tensor) -> Tensor:
    """Logits of a source: embedding, every block, head."""
    with torch.no_grad():
        hidden = source.embed(ids)
        for index in range(source.num_blocks):
            hidden = source.forward(index, source.load_block(index), hidden)
        return source.head(hidden)


def change_tensors(folder: Path, **changes: Tensor | None) -> None:
    """Replace tensors of a checkpoint; ``None`` takes one out. Dots in names are double underscores."""
    tensors: dict[str, Tensor | None] = {**load_file(folder / WEIGHTS)}
    tensors.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("name", VARIANTS)
def test_source_chains_to_the_whole_model(tmp_path: Path, name: str) -> None:
    """Embedding, blocks and head one after the other give the logits of the whole model, for every variant."""
    source = open_source(open_checkpoint(write_checkpoint(tmp_path, name)), CPU)
    model = load_causal_lm(source.checkpoint, torch.float32)
    with torch.no_grad():
        expected = model(windows()).logits
    torch.testing.assert_close(through_blocks(source, windows()), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", ["gemma", "gemma3_text", "opt", "mixtral"])
def test_source_computes_in_float32_from_bfloat16(tmp_path: Path, name: str) -> None:
    """A bfloat16 checkpoint computes as the model loaded in float32 does, embedding scales included.

    The width makes Gemma's scale √40 = 6.32, which bfloat16 does not hold.
    """
    width = {"word_embed_proj_dim": 40} if name == "opt" else {}
    folder = write_checkpoint(tmp_path, name, dtype=torch.bfloat16, hidden_size=40, **width)
    source = open_source(open_checkpoint(folder), CPU)
    assert source.checkpoint.dtype == torch.bfloat16
    assert {p.dtype for p in source.block_structure(0).parameters()} == {torch.bfloat16}
    assert {p.dtype for p in source.load_block(0).parameters()} == {torch.float32}
    with torch.no_grad():
        expected = load_causal_lm(source.checkpoint, torch.float32)(windows()).logits
    torch.testing.assert_close(through_blocks(source, windows()), expected, rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("settings", [{"return_dict": False}, {"output_router_logits": True}])
def test_source_ignores_what_a_config_wants_returned(tmp_path: Path, settings: dict[str, bool]) -> None:
    """Tuples, and router logits for a training loss, which need all blocks at once, change no logit."""
    folder = write_checkpoint(tmp_path, "mixtral")
    expected = through_blocks(open_source(open_checkpoint(folder), CPU), windows())
    change_json(folder / "config.json", **settings)
    found = through_blocks(open_source(open_checkpoint(folder), CPU), windows())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_source_refuses_a_model_that_does_not_run(tmp_path: Path) -> None:
    """A value that fits the weights but not the code is the config's fault, and is told when the model is opened."""
    folder = write_checkpoint(tmp_path, "opt")
    change_json(folder / "config.json", dropout=3)
    with pytest.raises(InputRefused, match="dropout") as refused:
        open_source(open_checkpoint(folder), CPU)
    assert refused.value.error_id == "E-CONFIG-INVALID"


def test_source_tells_the_sizes_of_the_model(tmp_path: Path) -> None:
    """Names and sizes are the model's; tied weights count once."""
    source = open_source(open_checkpoint(write_checkpoint(tmp_path, "llama3_rope")), CPU)
    assert (source.num_blocks, source.blocks_name) == (2, "model.layers")
    assert (source.hidden_size, source.vocab_size, source.max_seqlen) == (32, 104, 128)
    stored = sum(tensor.numel for tensor in source.checkpoint.weights.tensors.values())
    assert source.num_parameters == stored


def test_source_gives_blocks_of_their_own(tmp_path: Path) -> None:
    """Changing a loaded block changes neither the next one that is loaded nor the source."""
    source = open_source(open_checkpoint(write_checkpoint(tmp_path)), CPU)
    first = source.load_block(0)
    assert not first.training
    with torch.no_grad():
        for parameter in first.parameters():
            assert not parameter.requires_grad
            parameter.zero_()
    assert all(bool(p.count_nonzero()) for p in source.load_block(0).parameters())


def test_source_runs_other_batches_in_between(tmp_path: Path) -> None:
    """What a block is given is kept per shape: shapes that come and go leave the result as it is."""
    source = open_source(open_checkpoint(write_checkpoint(tmp_path, "bloom")), CPU)
    block = source.load_block(0)
    with torch.no_grad():
        hidden = source.embed(windows(2, 9))
        before = source.forward(0, block, hidden)
        for tokens in range(2, 12):
            source.forward(0, block, torch.randn(1, tokens, 32))
        assert torch.equal(source.forward(0, block, hidden), before)


def test_source_passes_gradients_through_a_block(tmp_path: Path) -> None:
    """A block in training gets gradients for its parameters and its input."""
    source = open_source(open_checkpoint(write_checkpoint(tmp_path, "gemma2")), CPU)
    block = source.load_block(1).requires_grad_(True)
    hidden = source.embed(windows()).clone().requires_grad_(True)
    source.forward(1, block, hidden).square().mean().backward()
    assert hidden.grad is not None
    assert all(p.grad is not None and bool(p.grad.count_nonzero()) for p in block.parameters())


def test_source_rounds_what_ships_unchanged(tmp_path: Path) -> None:
    """Embedding and head are rounded to the stored dtype at once, the dense blocks are not."""
    checkpoint = open_checkpoint(write_checkpoint(tmp_path))
    source = open_source(checkpoint, CPU, stored_dtype=torch.bfloat16)
    for tensor in source.rest_tensors().values():
        assert torch.equal(tensor, tensor.bfloat16().float())
    weight = source.load_block(0).get_parameter("mlp.up_proj.weight")
    assert not torch.equal(weight, weight.bfloat16().float())


@pytest.mark.parametrize("where", ["model__layers__1__mlp__up_proj__weight", "model__embed_tokens__weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_source_refuses_weights_that_are_not_finite(tmp_path: Path, where: str, value: float) -> None:
    """NaN and infinite weights, in blocks and outside, are refused at once and the tensor is named."""
    folder = write_checkpoint(tmp_path)
    tensor = load_file(folder / WEIGHTS)[where.replace("__", ".")]
    tensor[0, 0] = value
    change_tensors(folder, **{where: tensor})
    with pytest.raises(InputRefused, match=where.replace("__", ".")) as refused:
        open_source(open_checkpoint(folder), CPU)
    assert refused.value.error_id == "E-WEIGHTS-NONFINITE"


def test_source_refuses_weights_beyond_the_stored_dtype(tmp_path: Path) -> None:
    """A weight that would be infinite in float16 is refused before any work, and fine in bfloat16."""
    folder = write_checkpoint(tmp_path)
    tensor = load_file(folder / WEIGHTS)["model.layers.1.mlp.up_proj.weight"]
    tensor[0, 0] = -7e4
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=tensor)
    with pytest.raises(InputRefused) as refused:
        open_source(open_checkpoint(folder), CPU, stored_dtype=torch.float16)
    assert refused.value.error_id == "E-WEIGHTS-OVERFLOW"
    assert open_source(open_checkpoint(folder), CPU, stored_dtype=torch.bfloat16).num_blocks == 2


def test_source_refuses_missing_tensors(tmp_path: Path) -> None:
    """A tensor that the files lack is not filled with random numbers."""
    folder = write_checkpoint(tmp_path)
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    with pytest.raises(InputRefused, match=r"layers\.1\.mlp\.up_proj") as refused:
        open_source(open_checkpoint(folder), CPU)
    assert refused.value.error_id == "E-WEIGHTS-MISSING"


def test_source_refuses_other_shapes(tmp_path: Path) -> None:
    """A config that does not fit the weights is refused with both shapes."""
    folder = write_checkpoint(tmp_path)
    change_json(folder / "config.json", intermediate_size=64)
    with pytest.raises(InputRefused, match=r"\[.*56.*\].*\[.*64.*\]") as refused:
        open_source(open_checkpoint(folder), CPU)
    assert refused.value.error_id == "E-WEIGHTS-SHAPE"


def test_source_refuses_a_far_larger_config_before_allocating(tmp_path: Path) -> None:
    """A config that describes terabytes is refused by arithmetic, not by trying."""
    folder = write_checkpoint(tmp_path)
    change_json(folder / "config.json", intermediate_size=2**22, hidden_size=64)
    with pytest.raises(InputRefused) as refused:
        open_source(open_checkpoint(folder), CPU)
    assert refused.value.error_id == "E-CONFIG-SIZE"


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_source_runs_trusted_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A type that only the checkpoint's own code knows opens when trusted and is refused when not."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = write_checkpoint(tmp_path / "own")
    (folder / "own.py").write_text(CODE, encoding="utf-8")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    change_json(folder / "config.json", model_type="own_llama", auto_map=auto_map, architectures=["OwnModel"])
    with pytest.raises(InputRefused) as refused:
        open_checkpoint(folder)
    assert refused.value.error_id == "E-MODEL-REMOTE-CODE"
    source = open_source(open_checkpoint(folder, trust_remote_code=True), CPU)
    assert through_blocks(source, windows()).shape == (3, 17, 104)
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["auto_map"] == auto_map
