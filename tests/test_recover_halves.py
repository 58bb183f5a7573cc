"""Repair by halves: the state between attention and MLP is found in every architecture that has one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import architectures
import pytest
import torch
from repair_samples import weights_of
from torch import Tensor, nn

from compressor.errors import InputRefused
from compressor.linears import IgnoreRules, prunable_matrices
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.ebft import repair, trained_weights
from compressor.recovery.halves import find_midpoint, halves
from compressor.streams import Activations
from exporters.probe import capture, find_blocks

PLACES = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "phi3": "post_attention_layernorm",
    "opt": "final_layer_norm",
    "gpt2": "ln_2",
    "bloom": "post_attention_layernorm",
    "smollm3": "post_attention_layernorm",
    "mixtral": "post_attention_layernorm",
    "qwen3_moe": "post_attention_layernorm",
}
PARALLEL = ("gpt_neox", "falcon", "falcon_new")


def block_of(name: str, **overrides: Any) -> tuple[nn.Module, BlockIO, dict[str, Tensor]]:
    """A pruned first block of a tiny model, what its repair sees, and its masks."""
    model = architectures.build(name, **overrides)
    if name in architectures.EXPERTS:
        model.set_experts_implementation("eager")
    ids = torch.randint(4, 90, (10, 12), generator=torch.Generator().manual_seed(0))
    blocks = find_blocks(model)
    captured = capture(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, blocks)
    calls = {
        count: capture(
            model, {"input_ids": ids[:count], "attention_mask": torch.ones_like(ids[:count])}, blocks
        ).calls[0]
        for count in range(1, 11)
    }
    dense = blocks.modules[0].eval().requires_grad_(False)

    def fresh() -> nn.Module:
        copy = type(dense)(model.config, 0).eval().requires_grad_(False)
        copy.load_state_dict(dense.state_dict())
        return copy

    def forward(module: nn.Module, hidden: Tensor) -> Tensor:
        return calls[len(hidden)].run(module, hidden)

    block = fresh()
    matrices = prunable_matrices(block, "model.layers.0", IgnoreRules())
    masks = {}
    for matrix in matrices:
        weight = block.get_parameter(matrix.parameter)
        masks[matrix.parameter] = weight.abs() > weight.abs().median()
        weight.masked_fill_(~masks[matrix.parameter], 0.0)
    inputs, targets = captured.hidden, forward(dense, captured.hidden)
    stores = [Activations.filled(part) for part in (inputs[:7], inputs[7:], targets[:7], targets[7:])]
    io = BlockIO(
        stores[0],
        stores[2],
        stores[1],
        stores[3],
        forward,
        torch.device("cpu"),
        name="model.layers.0",
        matrices=matrices,
        load_dense=fresh,
    )
    return block, io, masks


def recipe(**settings: object) -> RecoveryRecipe:
    """A short repair by halves."""
    return RecoveryRecipe.model_validate({"window": "split", "epochs": 6, "batch_size": 4, **settings})


@pytest.mark.parametrize("name", PLACES)
def test_halves_meet_before_the_mlps_norm(name: str) -> None:
    """The state between the halves is what enters the norm in front of the MLP."""
    block, io, _ = block_of(name)
    found = find_midpoint(block, io)
    assert found.child == PLACES[name]
    attention = {m.parameter.split(".")[0] for m in io.matrices} & {p.split(".")[0] for p in found.before}
    assert len(attention) == 1


@pytest.mark.parametrize("name", PARALLEL)
def test_halves_of_parallel_residuals_are_refused(name: str) -> None:
    """Where attention and MLP read the same state there are no halves, and the message says so."""
    block, io, masks = block_of(name)
    with pytest.raises(InputRefused, match="parallel residual") as caught:
        repair(block, masks, io, recipe(), lr=1e-2, seed=0)
    assert caught.value.error_id == "E-WINDOW-SPLIT"


def test_halves_of_sequential_variants_are_found() -> None:
    """GPT-NeoX and Falcon without their parallel residual connections have halves, OPT with norms behind too."""
    changes: dict[str, dict[str, Any]] = {
        "gpt_neox": {"use_parallel_residual": False},
        "falcon": {"parallel_attn": False},
        "opt": {"do_layer_norm_before": False},
    }
    places = {name: find_midpoint(*block_of(name, **change)[:2]).child for name, change in changes.items()}
    assert places["gpt_neox"] == places["falcon"] == "post_attention_layernorm"
    assert places["opt"] == "self_attn_layer_norm"


def test_halves_share_the_weights_between_them() -> None:
    """Every trained weight is in one half: norms in front belong to what they are in front of."""
    block, io, _ = block_of("gemma2")
    weights = trained_weights(block)
    first, second = halves(block, io, weights, 4)
    names = {id(weight): name for name, weight in block.named_parameters()}
    in_first = {names[id(weight)].split(".")[0] for weight in first.weights}
    in_second = {names[id(weight)].split(".")[0] for weight in second.weights}
    assert in_first == {"input_layernorm", "self_attn", "post_attention_layernorm"}
    assert in_second == {"pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"}
    assert len(first.weights) + len(second.weights) == len(weights)


def test_first_half_aims_at_the_dense_state() -> None:
    """The wanted state is the dense block's residual after its attention, on sparse or on dense inputs."""
    block, io, _ = block_of("llama")
    assert io.load_dense is not None
    dense: Any = io.load_dense()
    seen: list[Tensor] = []
    dense.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    other = Activations.filled(0.5 * io.inputs.states)
    for given, wanted in ((io, io.inputs), (replace(io, dense_inputs=other), other)):
        first, _ = halves(block, given, trained_weights(block), 4)
        io.forward(dense, wanted.states)
        torch.testing.assert_close(first.io.targets.states, seen[-1])
        assert torch.equal(first.io.inputs.states, io.inputs.states)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_repair_by_halves_lowers_the_blocks_loss(name: str) -> None:
    """Both halves together bring the whole block's held-out loss down, all masks frozen; steps count both."""
    block, io, masks = block_of(name)
    told: list[tuple[int, int]] = []
    result = repair(block, masks, io, recipe(), lr=1e-2, seed=0, progress=lambda *at: told.append(at))
    now = float((io.forward(block, io.heldout_inputs.states) - io.heldout_targets.states).square().mean())
    assert result.loss_after == pytest.approx(now, rel=1e-4)
    assert result.loss_after < 0.9 * result.loss_before
    assert told == [(step, 24) for step in range(1, 25)]
    assert result.steps == 24
    assert all(not block.get_parameter(parameter)[~mask].any() for parameter, mask in masks.items())


def test_repair_by_halves_trains_one_half_at_a_time() -> None:
    """The attention's weights are those of a training towards the state between, whatever the MLP does."""
    block, io, masks = block_of("llama")
    repair(block, masks, io, recipe(selection="last"), lr=1e-2, seed=0)
    alone, io, masks = block_of("llama")
    first, _ = halves(alone, io, trained_weights(alone), 4)
    repair(alone, masks, first.io, recipe(selection="last", window="block"), lr=1e-2, seed=0)
    for name, weight in alone.named_parameters():
        if name.startswith(("self_attn", "input_layernorm")):
            assert torch.equal(block.get_parameter(name), weight)


def test_repair_by_halves_never_makes_a_block_worse() -> None:
    """Halves that only do harm together are taken back."""
    block, io, masks = block_of("llama")
    before = weights_of(block)
    result = repair(block, masks, io, recipe(), lr=30.0, seed=0)
    assert result.best_step == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(block.get_parameter(name), weight) for name, weight in before.items())


def test_repair_by_halves_repeats_bit_for_bit() -> None:
    """The same seed gives the same bits."""
    runs = []
    for _ in range(2):
        block, io, masks = block_of("llama")
        repair(block, masks, io, recipe(), lr=1e-2, seed=0)
        runs.append(weights_of(block))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
