"""Folders of models with fewer heads and neurons: what our loader gives back, what stock transformers says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ATTENTION
from flap_samples import (
    CPU,
    HEADS_AND_NEURONS,
    IDS,
    NEURONS_ONLY,
    open_tiny,
    planned,
    uniform_widths,
    write_pruned,
)
from safetensors.torch import load_file, save_file
from tiny_checkpoints import change_json
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from compressor.errors import InputRefused, UsageError
from compressor.models.checkpoint import open_checkpoint, open_tokenizer
from compressor.models.loading import load_causal_lm
from compressor.models.quiet import quiet_transformers
from compressor.models.source import open_source
from compressor.models.structure import KEY, difference
from compressor.pruned_model import StoredPrunedModel
from compressor.structured import prune_units

# Heads that go keep the config valid for these; Llama's and Gemma's want the hidden size to be a multiple of them.
UNIFORM_HEADS = ("mistral", "qwen2", "qwen3", "smollm3")


def our_logits(folder: Path) -> Tensor:
    """Logits (B, T, V) of a folder by our loader."""
    with torch.no_grad(), quiet_transformers():
        logits: Tensor = load_causal_lm(open_checkpoint(folder), torch.float32)(IDS).logits
    return logits


def stock_logits(folder: Path, name: str) -> Tensor:
    """The same by transformers alone; every key must be there, none left over, none of another shape."""
    with torch.no_grad(), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION.get(name, "sdpa"),
            output_loading_info=True,
        )
        logits: Tensor = model.eval()(IDS).logits
    assert not any(info.values())
    return logits


@pytest.mark.parametrize("name", [*HEADS_AND_NEURONS, *NEURONS_ONLY])
def test_prune_flap_folder_reloads_by_our_loader(tmp_path: Path, name: str) -> None:
    """Shapes of each layer's own, new biases and head counts come back; the logits are those of what was written."""
    expected = write_pruned(open_tiny(tmp_path / "in", name), tmp_path / "out", planned_for(tmp_path, name))
    # The same float32 weights on the same blocks.
    torch.testing.assert_close(our_logits(tmp_path / "out"), expected, rtol=1e-5, atol=1e-5)


def planned_for(tmp_path: Path, name: str, **settings: Any) -> Any:
    """A plan with widths that differ between the layers."""
    return planned(open_tiny(tmp_path / "same", name), **settings)


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A Llama whose two layers have widths of their own."""
    source = open_tiny(tmp_path / "in", num_attention_heads=8, num_key_value_heads=8)
    write_pruned(source, tmp_path / "out", planned(source))
    return tmp_path / "out"


def test_prune_flap_stock_auto_class_names_the_unknown_type(pruned: Path) -> None:
    """``AutoModelForCausalLM`` refuses the folder by a type that tells who wrote it, mismatches allowed or not."""
    for options in ({}, {"ignore_mismatched_sizes": True}):
        with pytest.raises(ValueError, match="model type `blockpress_llama`"):
            AutoModelForCausalLM.from_pretrained(pruned, **options)


def test_prune_flap_stock_model_class_raises(pruned: Path) -> None:
    """The model's own class finds other shapes and raises; no weight is initialised in silence."""
    with quiet_transformers(), pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(pruned)


def test_prune_flap_stock_tokenizer_loads(pruned: Path) -> None:
    """The tokenizer needs no config of a known type."""
    assert AutoTokenizer.from_pretrained(pruned)("ab")["input_ids"] == [68, 69]
    tokenizer, config = open_tokenizer(pruned)
    assert (tokenizer("ab")["input_ids"], config.model_type) == ([68, 69], "llama")


def test_prune_flap_config_states_every_layer(pruned: Path) -> None:
    """The structure names each changed layer with its stored shape, each new bias and each count of heads."""
    config = json.loads((pruned / "config.json").read_text())
    assert config["model_type"] == "blockpress_llama"
    structure = config[KEY]
    assert (structure["type_without"], structure["blocks_name"]) == ("llama", "model.layers")
    stored = open_checkpoint(pruned).weights.tensors
    for index, block in enumerate(structure["blocks"]):
        for path, shape in block["linears"].items():
            assert list(stored[f"model.layers.{index}.{path}.weight"].shape) == shape
        for path in block["biases"]:
            assert f"model.layers.{index}.{path}.bias" in stored
    assert config["intermediate_size"] == 56  # the dense model's: what each layer has is in the structure


def test_prune_flap_can_prune_again(pruned: Path, tmp_path: Path) -> None:
    """A folder with a structure is an input like any other: pruned once more, it is smaller still and reloads."""
    source = open_source(open_checkpoint(pruned), CPU)
    plan = planned(source, 0.1)
    assert plan.weights[0] < 4 * 32**2 + 3 * 56 * 32
    expected = write_pruned(source, tmp_path / "again", plan)
    torch.testing.assert_close(our_logits(tmp_path / "again"), expected, rtol=1e-5, atol=1e-5)
    sizes = [open_checkpoint(folder).source_bytes for folder in (pruned, tmp_path / "again")]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_prune_flap_pruned_model_is_remembered_between_cells(tmp_path: Path, name: str) -> None:
    """A comparison's stored pruned blocks come back with their shapes, head counts and new biases."""
    source = open_tiny(tmp_path / "in", name)
    plan = planned(source)
    recording = StoredPrunedModel(tmp_path / "pruned", source.load_block, recording=True)
    reading = StoredPrunedModel(tmp_path / "pruned", source.load_block, recording=False)
    hidden = source.embed(IDS)
    for index, cuts in enumerate(plan.cuts):
        block, again = source.load_block(index), source.load_block(index)
        prune_units(block, cuts)
        recording.keep(index, block, {}, ("a note",))
        assert reading.apply(index, again) == ({}, ("a note",))
        assert difference(again, block).is_plain
        with torch.no_grad():
            outputs = [source.forward(index, each, hidden) for each in (block, again)]
        assert torch.equal(*outputs)


def test_prune_flap_folder_repeats_bit_for_bit(tmp_path: Path) -> None:
    """Two runs of the same work leave the same bytes."""
    for run in ("one", "two"):
        source = open_tiny(tmp_path / "in")
        write_pruned(source, tmp_path / run, planned(source))
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("one", "two")
    )
    assert first == second


@pytest.mark.parametrize(
    "name", [name for name in (*HEADS_AND_NEURONS, *NEURONS_ONLY) if name not in ("bloom", "gpt2", "falcon")]
)
def test_prune_flap_uniform_folder_loads_in_stock_transformers(tmp_path: Path, name: str) -> None:
    """As many heads and neurons in every layer and no bias: plain config values, and the same logits."""
    source = open_tiny(tmp_path / "in", name)
    sparsity = 0.6 if name in UNIFORM_HEADS else 0.3
    widths = uniform_widths(source, sparsity)
    expected = write_pruned(source, tmp_path / "out", planned(source, sparsity, uniform=True), widths)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert KEY not in config
    assert widths
    assert widths.items() <= config.items()
    torch.testing.assert_close(stock_logits(tmp_path / "out", name), expected, rtol=1e-5, atol=1e-5)
    if name in UNIFORM_HEADS:
        assert config["num_attention_heads"] == 2


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_prune_flap_uniform_sets_a_width_that_was_implied(tmp_path: Path, name: str) -> None:
    """A config that leaves the MLP's width open, as four times the hidden size, gets it spelled out."""
    source = open_tiny(
        tmp_path / "in", name, **{"gpt2": {"n_inner": None}, "falcon": {"ffn_hidden_size": None}}[name]
    )
    plan, widths = planned(source, 0.3, uniform=True), uniform_widths(source, 0.3)
    expected = write_pruned(source, tmp_path / "out", plan, widths)
    torch.testing.assert_close(stock_logits(tmp_path / "out", name), expected, rtol=1e-5, atol=1e-5)


def test_prune_flap_uniform_refuses_a_config_without_a_key(tmp_path: Path) -> None:
    """BLOOM's MLP is four times the hidden size, whatever its config says."""
    with pytest.raises(UsageError, match="no key for the width of its MLP") as refused:
        planned(open_tiny(tmp_path, "bloom"), uniform=True)
    assert refused.value.error_id == "E-FLAP-UNIFORM"


def test_prune_flap_uniform_gives_no_bias(tmp_path: Path) -> None:
    """Uniform widths come without compensation, which a config could not state."""
    assert all(cut.mean is None for cuts in planned(open_tiny(tmp_path), uniform=True).cuts for cut in cuts)


def structure_with(folder: Path, **changes: Any) -> None:
    """Change keys of the first block's structure."""
    structure = json.loads((folder / "config.json").read_text())[KEY]
    structure["blocks"][0].update(changes)
    change_json(folder / "config.json", **{KEY: structure})


@pytest.mark.parametrize(
    "changes",
    [
        {"linears": {"mlp.norm": [3, 3]}},
        {"linears": {"mlp.up_proj": [57, 32]}},
        {"linears": {"mlp.up_proj": [0, 32]}},
        {"linears": {"mlp.up_proj": ["40", 32]}},
        {"linears": {"mlp.up_proj": [40]}},
        {"biases": ["mlp"]},
        {"attributes": {"self_attn.layer_idx": 1}},
        {"attributes": {"self_attn.num_heads": 1}},
        {"attributes": {"self_attn.num_key_value_groups": 99}},
        {"unheard_of": 1},
    ],
)
def test_prune_flap_refuses_a_structure_that_does_not_fit(pruned: Path, changes: dict[str, Any]) -> None:
    """A structure that names what is not there, or would make it larger, is refused before weights are read."""
    structure_with(pruned, **changes)
    with pytest.raises(InputRefused) as refused:
        load_causal_lm(open_checkpoint(pruned), torch.float32)
    assert refused.value.error_id == "E-STRUCTURE-INVALID"


@pytest.mark.parametrize("change", ["none", "blocks", "type", "place"])
def test_prune_flap_refuses_a_structure_of_another_model(pruned: Path, change: str) -> None:
    """A structure that is missing, short of blocks, of another type or at another place is refused."""
    config = json.loads((pruned / "config.json").read_text())
    structure = config.pop(KEY)
    if change == "blocks":
        structure["blocks"].pop()
    elif change == "place":
        structure["blocks_name"] = "model"
    elif change == "type":
        config["model_type"] = "mistral"
    if change != "none":
        config[KEY] = structure
    (pruned / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputRefused) as refused:
        load_causal_lm(open_checkpoint(pruned), torch.float32)
    assert refused.value.error_id == "E-STRUCTURE-INVALID"


def test_prune_flap_refuses_weights_of_another_shape(pruned: Path) -> None:
    """A tensor that is not of the stated shape is named."""
    shard = pruned / "model-00001-of-00003.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 32)
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(InputRefused, match=r"up_proj\.weight is stored as \[3, 32\]") as refused:
        load_causal_lm(open_checkpoint(pruned), torch.float32)
    assert refused.value.error_id == "E-WEIGHTS-SHAPE"
