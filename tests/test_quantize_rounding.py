"""Activations rounded before linears and inside of fused experts."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from torch import nn

from compressor.quantization import rounding
from compressor.quantization.rounding import round_activations, rounded_inputs


def experts_and_inputs() -> tuple[nn.Module, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Experts of a tiny model, and six tokens that go to two of them each; the last expert gets none."""
    experts = build("mixtral").model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 32, generator=generator)
    chosen = torch.tensor([[0, 1], [2, 0], [1, 2], [0, 2], [1, 0], [2, 1]])
    return experts, (hidden, chosen, torch.rand(6, 2, generator=generator))


def test_experts_compute_what_they_do_without_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a rounding that leaves numbers as they are, the experts' own outputs; afterwards their own forward again."""
    experts, inputs = experts_and_inputs()
    with torch.no_grad():
        own = experts(*inputs)
        monkeypatch.setattr(rounding, "round_activations", lambda X: X)
        with rounded_inputs([experts]):
            assert torch.allclose(experts(*inputs), own, atol=1e-5)
    assert "forward" not in experts.__dict__


def test_experts_round_what_enters_each_matrix() -> None:
    """The tokens, and what enters the down projections, in whole steps of a row's largest magnitude."""
    experts, (hidden, chosen, shares) = experts_and_inputs()
    with torch.no_grad(), rounded_inputs([experts]):
        found = experts(hidden, chosen, shares)
        assert torch.equal(experts(round_activations(hidden), chosen, shares), found)
        expected = torch.zeros_like(hidden)
        for token in range(6):
            for place in range(2):
                expert = int(chosen[token, place])
                gate, up = (round_activations(hidden[token]) @ experts.gate_up_proj[expert].T).chunk(2)
                between = round_activations(nn.functional.silu(gate) * up)
                expected[token] += shares[token, place] * (between @ experts.down_proj[expert].T)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, experts(hidden, chosen, shares), atol=1e-5)
