"""Written folders: stock transformers loads them, they hold what was committed, equal runs give equal bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import ATTENTION, VARIANTS
from safetensors import safe_open
from tiny_checkpoints import change_json, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor.errors import InputRefused, ReportedError
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.models.checkpoint import open_checkpoint
from compressor.models.export_view import export_parts
from compressor.models.quiet import quiet_transformers
from compressor.models.reference import load_reference
from compressor.models.source import LoadedSource, open_source
from compressor.models.writer import MASKS_NAME, CheckpointWriter
from exporters.masks import read_masks

CPU = torch.device("cpu")
IDS = torch.randint(3, 100, (2, 13), generator=torch.Generator().manual_seed(2))


def prune_and_write(source: LoadedSource, out: Path, dtype: torch.dtype) -> Tensor:
    """Write the source with half of each matrix zero; the logits of what was committed."""
    writer = CheckpointWriter(out, source, dtype)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        hidden = source.embed(IDS)
        for index in range(source.num_blocks):
            block = source.load_block(index)
            masks: dict[str, Tensor] = {}
            for matrix in prunable_matrices(block, f"{source.blocks_name}.{index}", IgnoreRules()):
                whole = torch.ones_like(block.get_parameter(matrix.parameter), dtype=torch.bool)
                view = matrix.of_mask(masks.setdefault(matrix.parameter, whole))
                view.copy_(torch.rand(view.shape, generator=draw) < 0.5)
                matrix.of(block).mul_(view)
            writer.commit(index, block, masks)
            hidden = source.forward(index, block, hidden)
        writer.finish()
        return source.head(hidden)


def open_tiny(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.float32, **options: Any
) -> LoadedSource:
    """A tiny model that is to be stored in ``dtype``."""
    checkpoint = open_checkpoint(write_checkpoint(folder, name, **options))
    return open_source(checkpoint, CPU, stored_dtype=dtype)


def stock_logits(folder: Path, name: str) -> tuple[Any, Tensor]:
    """Model and float32 logits by transformers alone; every key must be there and none left over."""
    with quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=ATTENTION.get(name, "sdpa"),
            output_loading_info=True,
        )
    assert not any(info.values())
    with torch.no_grad():
        return model, model.eval()(IDS).logits


@pytest.mark.parametrize("name", VARIANTS)
def test_writer_folder_loads_in_stock_transformers(tmp_path: Path, name: str) -> None:
    """The written model gives the logits that flowed through the committed blocks, and its zeros are the masks."""
    expected = prune_and_write(open_tiny(tmp_path / "in", name), tmp_path / "out", torch.float32)
    model, logits = stock_logits(tmp_path / "out", name)
    # The same float32 weights; only experts may be summed in another order.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    state = model.state_dict()
    masks = read_masks(tmp_path / "out" / MASKS_NAME)
    assert masks
    for parameter, mask in masks.items():
        assert np.array_equal(state[parameter].numpy() != 0, mask)
        assert 0.4 < mask.mean() < 0.6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama3_rope", "gpt2", "qwen3_moe", "gemma3_text"])
def test_writer_ships_what_flows_on(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Stored in sixteen bits, the model computes what the committed blocks computed: they were rounded in place."""
    expected = prune_and_write(open_tiny(tmp_path / "in", name, dtype), tmp_path / "out", dtype)
    model, logits = stock_logits(tmp_path / "out", name)
    assert model.config.dtype == torch.float32  # as asked for here
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype).removeprefix(
        "torch."
    )
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_writer_stores_tied_weights_once(tmp_path: Path) -> None:
    """The head of a tied model is not stored beside the embedding."""
    prune_and_write(open_tiny(tmp_path / "in", "llama3_rope"), tmp_path / "out", torch.float32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert "model.embed_tokens.weight" in index["weight_map"]
    assert "lm_head.weight" not in index["weight_map"]


def test_writer_shards_by_block_and_indexes_them(tmp_path: Path) -> None:
    """One shard per block and one for the rest; the index names every tensor and the size of all."""
    prune_and_write(open_tiny(tmp_path / "in"), tmp_path / "out", torch.float32)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert [path.name for path in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    found, size = {}, 0
    for path in shards:
        with safe_open(path, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # not a mapping
                found[name] = path.name
                size += stored.get_tensor(name).nbytes
    assert index == {"metadata": {"total_size": size}, "weight_map": dict(sorted(found.items()))}


def test_writer_keeps_experts_as_checkpoints_store_them(tmp_path: Path) -> None:
    """Fused experts are stored as one matrix per expert again, under the published names."""
    prune_and_write(open_tiny(tmp_path / "in", "mixtral"), tmp_path / "out", torch.float32)
    before = open_checkpoint(tmp_path / "in").weights.tensors
    assert open_checkpoint(tmp_path / "out").weights.tensors == before


def test_writer_repeats_bit_for_bit(tmp_path: Path) -> None:
    """Two runs of the same work leave the same files with the same bytes."""
    for run in ("one", "two"):
        prune_and_write(open_tiny(tmp_path / "in", "gpt2"), tmp_path / run, torch.bfloat16)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / run).iterdir()} for run in ("one", "two")
    )
    assert first == second


def test_writer_copies_tokenizer_and_terms_verbatim(tmp_path: Path) -> None:
    """Tokenizer, generation config, chat template and licence arrive byte by byte, and the tokenizer loads."""
    source = open_tiny(tmp_path / "in")
    texts = {"LICENSE": "terms", "chat_template.jinja": "{{ messages }}", "README.md": "not copied"}
    for name, text in texts.items():
        (tmp_path / "in" / name).write_text(text, encoding="utf-8")
    source = open_source(open_checkpoint(tmp_path / "in"), CPU)
    prune_and_write(source, tmp_path / "out", torch.float32)
    for name in (
        "LICENSE",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "in" / name).read_bytes()
    assert not (tmp_path / "out" / "README.md").exists()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ab")["input_ids"] == [68, 69]


def test_writer_config_tells_nothing_of_the_origin(tmp_path: Path) -> None:
    """Paths, commits and code of the source are left out of the config; the rest stays."""
    write_checkpoint(tmp_path / "in")
    origin = {"_name_or_path": "/home/me/model", "_commit_hash": "abc", "auto_map": {"AutoConfig": "a.B"}}
    change_json(tmp_path / "in" / "config.json", torch_dtype="float32", **origin)
    prune_and_write(open_source(open_checkpoint(tmp_path / "in"), CPU), tmp_path / "out", torch.float32)
    before, after = (json.loads((tmp_path / run / "config.json").read_text()) for run in ("in", "out"))
    assert before.keys() - after.keys() == {*origin, "torch_dtype"}
    assert after.items() <= before.items()


def test_writer_counts_kept_zeros_as_pruned(tmp_path: Path) -> None:
    """A kept weight that rounds to zero is a zero in the stored mask too, so that mask and weights agree."""
    source = open_tiny(tmp_path / "in", dtype=torch.float16)
    writer = CheckpointWriter(tmp_path / "out", source, torch.float16)
    for index in range(source.num_blocks):
        block = source.load_block(index)
        weight = block.get_parameter("mlp.up_proj.weight")
        weight[0, 0] = 1e-9  # below the smallest float16
        writer.commit(index, block, {"mlp.up_proj.weight": torch.ones_like(weight, dtype=torch.bool)})
    writer.finish()
    mask = read_masks(tmp_path / "out" / MASKS_NAME)["model.layers.1.mlp.up_proj.weight"]
    assert not mask[0, 0]
    assert int((~mask).sum()) == 1


def test_writer_refuses_revived_weights(tmp_path: Path) -> None:
    """A pruned place that is not zero stops the run: that would be a fault of the repair."""
    source = open_tiny(tmp_path / "in")
    block = source.load_block(0)
    mask = torch.ones_like(block.get_parameter("mlp.up_proj.weight"), dtype=torch.bool)
    mask[3, 4] = False
    with pytest.raises(ReportedError, match=r"model\.layers\.0\.mlp\.up_proj\.weight has 1") as refused:
        CheckpointWriter(tmp_path / "out", source, torch.float32).commit(
            0, block, {"mlp.up_proj.weight": mask}
        )
    assert (refused.value.error_id, refused.value.exit_code) == ("E-MASK-BROKEN", 1)


@pytest.mark.parametrize(
    ("value", "error_id"), [(1e6, "E-WEIGHTS-OVERFLOW"), (float("nan"), "E-WEIGHTS-NONFINITE")]
)
def test_writer_refuses_what_cannot_be_stored(tmp_path: Path, value: float, error_id: str) -> None:
    """A repaired weight beyond float16, or NaN, is refused by name instead of shipped as infinity."""
    source = open_tiny(tmp_path / "in", dtype=torch.float16)
    block = source.load_block(0)
    block.get_parameter("mlp.up_proj.weight")[0, 0] = value
    with pytest.raises(InputRefused, match=r"model\.layers\.0\.mlp\.up_proj\.weight") as refused:
        CheckpointWriter(tmp_path / "out", source, torch.float16).commit(0, block, {})
    assert refused.value.error_id == error_id


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "falcon", "gemma2"])
def test_reference_is_the_model(tmp_path: Path, name: str) -> None:
    """Logits and block outputs of the reference are those of transformers in float32."""
    folder = write_checkpoint(tmp_path, name)
    reference = load_reference(str(folder))
    model, logits = stock_logits(folder, name)
    # The reference passes a mask of ones, which lets another kernel do the same sums.
    np.testing.assert_allclose(reference.logits(IDS.numpy()), logits, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    outputs = reference.block_outputs(IDS.numpy())
    assert len(outputs) == 2
    np.testing.assert_allclose(outputs[0], states[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "opt", "bloom", "gpt2"])
def test_reference_understands_left_padding(tmp_path: Path, name: str) -> None:
    """A sequence padded on the left gives at its tokens what it gives alone."""
    reference = load_reference(str(write_checkpoint(tmp_path, name)))
    ids, mask = IDS.numpy().copy(), np.ones((2, 13), dtype=np.int64)
    ids[1, :5], mask[1, :5] = 0, 0
    alone = reference.logits(ids[1:, 5:])
    padded = reference.logits(ids, mask)[1:, 5:]
    np.testing.assert_allclose(padded, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16)],
)
def test_export_view_stores_one_type_and_computes_in_another(
    tmp_path: Path, dtype: torch.dtype, computed: torch.dtype
) -> None:
    """bfloat16 weights compute in float32, float16 ones in float16; what is stored is what the folder holds."""
    prune_and_write(open_tiny(tmp_path / "in", dtype=dtype), tmp_path / "out", dtype)
    parts = export_parts(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    with safe_open(tmp_path / "out" / "model-00002-of-00003.safetensors", "pt") as stored:
        assert torch.equal(parts.stored(name), stored.get_tensor(name))
    assert parts.stored_dtype(name) == dtype
    assert parts.model.get_parameter(name).dtype == computed


def test_export_view_chooses_what_can_be_traced(tmp_path: Path) -> None:
    """Experts of the export view do not loop over data."""
    parts = export_parts(write_checkpoint(tmp_path, "mixtral"))
    assert parts.model.config._experts_implementation == "batched_mm"
