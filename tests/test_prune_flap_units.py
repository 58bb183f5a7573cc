"""What can be taken out of each architecture's blocks, and that a block without it computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import VARIANTS
from flap_samples import CPU, HEADS_AND_NEURONS, IDS, NEURONS_ONLY, WITH_EXPERTS, open_tiny, planned
from safetensors.torch import load_file, save_file
from tiny_checkpoints import write_checkpoint

from compressor.errors import InputRefused, UsageError
from compressor.linear_layers import bias_of, shape_of, weight_of
from compressor.linears import IgnoreRules
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import open_source
from compressor.structured import GroupCut, find_anatomy, prune_units


def test_prune_flap_knows_every_variant() -> None:
    """Each of the 18 variants has heads and neurons, neurons alone, or experts."""
    assert sorted((*HEADS_AND_NEURONS, *NEURONS_ONLY, *WITH_EXPERTS)) == sorted(VARIANTS)


@pytest.mark.parametrize("name", [*HEADS_AND_NEURONS, *NEURONS_ONLY])
def test_prune_flap_finds_the_units_of_a_variant(tmp_path: Path, name: str) -> None:
    """Heads where query, key and value are matrices of their own, neurons everywhere."""
    anatomy = find_anatomy(open_tiny(tmp_path, name), IgnoreRules(), 0.1)
    kinds = ["heads", "neurons"] if name in HEADS_AND_NEURONS else ["neurons"]
    assert [[group.kind for group in groups] for groups in anatomy.groups] == [kinds, kinds]


@pytest.mark.parametrize("name", [*HEADS_AND_NEURONS, *NEURONS_ONLY])
def test_prune_flap_block_equals_the_one_with_zeros(tmp_path: Path, name: str) -> None:
    """Without bias, a smaller block computes what the dense one does with the columns of what went at zero."""
    source = open_tiny(tmp_path, name)
    plan = planned(source, bias_compensation=False)
    assert sum(plan.removed) > 0
    with torch.no_grad():
        hidden = source.embed(IDS)
        for index, cuts in enumerate(plan.cuts):
            zeroed, smaller = source.load_block(index), source.load_block(index)
            for cut in cuts:
                weight_of(zeroed.get_submodule(cut.group.output))[:, ~cut.kept] = 0.0
            prune_units(smaller, cuts)
            expected, left = (source.forward(index, block, hidden) for block in (zeroed, smaller))
            # The same products without those that are zero, added in another order.
            torch.testing.assert_close(left, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_prune_flap_refuses_experts(tmp_path: Path, name: str) -> None:
    """A mixture of experts is refused with what to do instead."""
    with pytest.raises(InputRefused, match="experts, which flap cannot cut") as refused:
        find_anatomy(open_tiny(tmp_path, name), IgnoreRules(), 0.2)
    assert refused.value.error_id == "E-FLAP-EXPERTS"


@pytest.mark.parametrize(("heads", "kv"), [(8, 8), (8, 2), (8, 1), (6, 2)])
def test_prune_flap_leaves_equal_query_heads_per_group(tmp_path: Path, heads: int, kv: int) -> None:
    """Shared keys keep as many query heads each and stay; keys of a head of their own go with it."""
    source = open_tiny(tmp_path, "mistral", num_attention_heads=heads, num_key_value_heads=kv, head_dim=8)
    attention = find_anatomy(source, IgnoreRules(), 0.1).groups[0][0]
    members = attention.ranked(torch.rand(heads, generator=torch.Generator().manual_seed(1)))
    block = source.load_block(0)
    prune_units(block, [GroupCut(attention, attention.keeping(members[:1]), None)])
    shared = heads // kv
    left, left_kv = (heads - 1, heads - 1) if shared == 1 else (heads - kv, kv)
    shapes = [shape_of(block.get_submodule(f"self_attn.{name}_proj")) for name in "qkvo"]
    assert shapes == [(left * 8, 32), (left_kv * 8, 32), (left_kv * 8, 32), (32, left * 8)]
    assert block.get_submodule("self_attn").num_key_value_groups == left // left_kv


def test_prune_flap_removes_the_weights_that_it_counts(tmp_path: Path) -> None:
    """The plan's removed weights are the difference of the parameter counts, and the target is met by a neuron."""
    source = open_tiny(tmp_path, num_attention_heads=8, num_key_value_heads=8)
    plan = planned(source, 0.25, bias_compensation=False)
    for index, cuts in enumerate(plan.cuts):
        block = source.load_block(index)
        before = sum(parameter.numel() for parameter in block.parameters())
        prune_units(block, cuts)
        assert before - sum(parameter.numel() for parameter in block.parameters()) == plan.removed[index]
    neuron = 3 * 32
    assert 0 <= 0.25 * sum(plan.weights) - sum(plan.removed) < neuron


@pytest.mark.parametrize("name", ["llama", "qwen2", "opt", "gpt2", "gemma2"])
def test_prune_flap_gives_bias_to_the_output_layers_alone(tmp_path: Path, name: str) -> None:
    """What goes leaves its mean as a bias of the layer behind it, new or added to the one there; no other changes."""
    source = open_tiny(tmp_path, name)
    plan = planned(source)
    for index, cuts in enumerate(plan.cuts):
        block, dense = source.load_block(index), source.load_block(index)
        prune_units(block, cuts)
        for cut in cuts:
            bias = bias_of(block.get_submodule(cut.group.output))
            before = bias_of(dense.get_submodule(cut.group.output))
            if bool(cut.kept.all()):
                assert (bias is None) == (before is None)
                continue
            W = weight_of(dense.get_submodule(cut.group.output)).double()
            expected = W[:, ~cut.kept] @ cut.mean[~cut.kept]
            added = bias if before is None else bias - before
            torch.testing.assert_close(added.double(), expected, rtol=1e-4, atol=1e-5)  # float32 of float64


def test_prune_flap_block_is_exact_when_what_goes_is_constant(tmp_path: Path) -> None:
    """Neurons that give the same for every token leave a block that computes exactly what it did."""
    constant = torch.arange(56) % 2 == 0
    weights = write_checkpoint(tmp_path, "opt") / "model.safetensors"
    tensors = load_file(weights)
    for name, tensor in tensors.items():
        if ".fc1." in name:
            tensor[constant] = 1.5 if name.endswith("bias") else 0.0
    save_file(tensors, weights, metadata={"format": "pt"})
    source = open_source(open_checkpoint(tmp_path), CPU)
    plan = planned(source, 28 * 64 / (4 * 32**2 + 2 * 56 * 32))
    for index, cuts in enumerate(plan.cuts):
        assert not bool((cuts[1].kept & constant).any())
        hidden = torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(index))
        block, dense = source.load_block(index), source.load_block(index)
        prune_units(block, cuts)
        with torch.no_grad():
            left, expected = (source.forward(index, each, hidden) for each in (block, dense))
        torch.testing.assert_close(left, expected, rtol=1e-5, atol=1e-5)  # sums in another order


def test_prune_flap_keeps_ignored_groups_whole(tmp_path: Path) -> None:
    """A group with an ignored matrix loses nothing, and the ignored matrix does not count."""
    source = open_tiny(tmp_path)
    anatomy = find_anatomy(source, IgnoreRules(("*.mlp.up_proj",)), 0.05)
    assert [[group.kind for group in groups] for groups in anatomy.groups] == [["heads"], ["heads"]]
    assert anatomy.weights[0] == find_anatomy(source, IgnoreRules(), 0.05).weights[0] - 56 * 32


def test_prune_flap_says_how_much_could_go(tmp_path: Path) -> None:
    """A target beyond what heads and neurons have is refused with the share that could go."""
    with pytest.raises(UsageError, match=r"not 90\.0%") as refused:
        find_anatomy(open_tiny(tmp_path, "gpt2"), IgnoreRules(), 0.9)
    assert refused.value.error_id == "E-FLAP-TARGET"


@pytest.mark.parametrize("structure", ["AL-AM", "AL-MM", "UL-UM", "UL-MM"])
@pytest.mark.parametrize("metric", ["WIFV", "IFV", "WIFN"])
def test_prune_flap_takes_every_structure_and_metric(tmp_path: Path, structure: str, metric: str) -> None:
    """All published ways of sharing out and scoring meet the target by less than one neuron."""
    plan = planned(open_tiny(tmp_path, "opt"), structure=structure, metric=metric, remove_heads=2)
    neuron = 2 * 32
    assert 0 <= 0.3 * sum(plan.weights) - sum(plan.removed) < neuron


def test_prune_flap_plan_repeats_exactly(tmp_path: Path) -> None:
    """Equal models, windows and settings give the same cuts bit for bit."""
    first, second = (planned(open_tiny(tmp_path / run)) for run in ("one", "two"))
    for mine, yours in zip(first.cuts, second.cuts, strict=True):
        for a, b in zip(mine, yours, strict=True):
            assert torch.equal(a.kept, b.kept)
            assert torch.equal(a.mean, b.mean)


def test_prune_flap_survey_sees_the_dense_model(tmp_path: Path) -> None:
    """The means of the second block's channels are those of the dense model, not of a pruned one."""
    source = open_tiny(tmp_path)
    plan = planned(source, 0.3)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        hidden = source.embed(IDS)
        for index in range(2):
            block = source.load_block(index)
            down = block.get_submodule("mlp.down_proj")
            hook = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            hidden = source.forward(index, block, hidden)
            hook.remove()
    torch.testing.assert_close(
        plan.cuts[1][1].mean.float(), seen[1].flatten(0, 1).mean(0), rtol=1e-4, atol=1e-5
    )
    assert CPU.type == plan.cuts[1][1].mean.device.type
