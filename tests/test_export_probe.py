"""What the probe finds in each architecture."""

from __future__ import annotations

import pytest
import torch
from architectures import VARIANTS, build

from exporters.block_cache import BlockCache
from exporters.errors import ExportError
from exporters.probe import capture, find_blocks, run_head

IDS = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_probe_parts_together_are_the_model(variant):
    """Prologue, blocks one by one, and head give exactly the model's own logits."""
    model = build(variant)
    blocks = find_blocks(model)
    captured = capture(model, {"input_ids": IDS}, blocks)
    hidden = captured.hidden
    for block, call in zip(blocks.modules, captured.calls, strict=True):
        hidden = call.run(block, hidden)
    assert torch.equal(run_head(model, hidden, blocks=blocks), model(input_ids=IDS, use_cache=False).logits)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_probe_fixture_blocks_matter(variant):
    """Every block of the test models changes the hidden state by a good part of its size."""
    model = build(variant)
    captured = capture(model, {"input_ids": IDS})
    hidden = captured.hidden
    for block, call in zip(find_blocks(model).modules, captured.calls, strict=True):
        before, hidden = hidden, call.run(block, hidden)
        assert (hidden - before).norm() > 0.3 * before.norm()


def test_probe_puts_the_blocks_back_after_an_error():
    """A model that fails while it is probed has its own blocks afterwards."""
    model = build("llama")
    layers = model.model.layers
    with pytest.raises(IndexError):
        capture(model, {"input_ids": torch.full((1, 3), 10**6)})
    assert model.model.layers is layers


def test_probe_shows_two_masks_and_two_rotary_tables():
    """The sliding and the full block of gemma3 are given different masks and different rotary tables."""
    model = build("gemma3_text", sliding_window=4)
    mask = torch.ones_like(IDS)
    mask[0, :2] = 0
    calls = capture(model, {"input_ids": IDS, "attention_mask": mask}).calls
    sliding, full = (call.kwargs for call in calls)
    assert not torch.equal(sliding["attention_mask"], full["attention_mask"])
    assert not torch.equal(sliding["position_embeddings"][0], full["position_embeddings"][0])


@torch.no_grad()
def test_probe_needs_no_block_weights():
    """Blocks on the meta device are found and their calls captured."""
    model = build("bloom")
    expected = capture(model, {"input_ids": IDS})
    model.transformer.h.to("meta")
    blocks = find_blocks(model)
    captured = capture(model, {"input_ids": IDS}, blocks)
    assert blocks.returns_tuple
    assert torch.equal(captured.hidden, expected.hidden)
    assert torch.equal(captured.calls[1].kwargs["alibi"], expected.calls[1].kwargs["alibi"])


def test_probe_refuses_a_model_without_block_list():
    """A model whose blocks are not one list as long as the configuration says is refused by name."""
    model = build("llama")
    model.model.layers.append(model.model.layers[0])
    with pytest.raises(ExportError, match="LlamaForCausalLM has no module list of 2") as refused:
        find_blocks(model)
    assert refused.value.error_id == "E-EXPORT-NO-BLOCKS"


@torch.no_grad()
def test_probe_block_continues_from_a_cache():
    """A block that is given the first tokens' keys and values treats the rest as in one run."""
    model = build("qwen3")
    block = find_blocks(model).modules[0]
    whole = capture(model, {"input_ids": IDS})
    first = capture(model, {"input_ids": IDS[:, :5], "past_key_values": BlockCache(0)})
    cache = BlockCache(0)
    first.calls[0].run(block, first.hidden, cache)
    rest = capture(model, {"input_ids": IDS[:, 5:], "past_key_values": BlockCache(5)})
    found = rest.calls[0].run(block, rest.hidden, BlockCache(5, cache.present))
    expected = whole.calls[0].run(block, whole.hidden)[:, 5:]
    # Masked and causal attention kernels round differently; the hidden state is of the order of 1.
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
