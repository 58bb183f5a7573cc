"""LoRA, masked LoRA and SPP: nothing changes at first, merged answers as unmerged, zeros stay where they should."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import VARIANTS
from finetune_samples import sparse_model, weights_of, zeros_are_kept
from torch import Tensor

from compressor.errors import UsageError
from compressor.finetuning import FINETUNINGS
from compressor.finetuning.adapters import Adapters
from compressor.finetuning.lora import LowRank
from compressor.finetuning.masked_lora import MaskedLowRank
from compressor.finetuning.sparse_model import SparseModel, hidden_states
from compressor.finetuning.spp import Scaling
from compressor.finetuning.tuning import Finetuned
from compressor.recipe import RecoveryRecipe

MAKERS = {
    "lora": lambda W, mask, generator: LowRank(W, 4, 8.0, generator),
    "masked-lora": lambda W, mask, generator: MaskedLowRank(W, mask, 4, 8.0, generator),
    "spp": lambda W, mask, generator: Scaling(W, 16, 2.0, generator),
}
LAYOUTS = ["llama", "gpt2", "mixtral"]  # plain linears, transposed ones, fused experts


def adapters_for(model: SparseModel, method: str, *, learned: bool, dropout: float = 0.0) -> Adapters:
    """Adapters beside every pruned matrix, with random factors if something is to be learned."""
    adapters = Adapters(model, MAKERS[method], dropout=dropout, seed=1)
    adapters.train(False)
    generator = torch.Generator().manual_seed(2)
    for weight in adapters.weights:
        if learned:
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return adapters


def outputs(model: SparseModel, blocks: Any = None) -> Tensor:
    """Last hidden states of the held-out windows."""
    with torch.no_grad():
        return hidden_states(model, model.blocks if blocks is None else blocks, model.heldout.ids)[-1]


def repaired(model: SparseModel, method: str, **settings: Any) -> Finetuned:
    """The model after a short recovery whose last step is kept."""
    chosen = {"method": method, "epochs": 2, "batch_size": 4, "lr": 1e-2, "selection": "last", **settings}
    recipe = RecoveryRecipe.model_validate(chosen)
    return FINETUNINGS[method](model, recipe, seed=0, tell=lambda step: None)


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("method", MAKERS)
def test_adapters_change_nothing_at_first(variant: str, method: str) -> None:
    """With B = 0 the adapted model answers bit for bit as the model."""
    model = sparse_model(variant)
    adapters = adapters_for(model, method, learned=False)
    assert torch.equal(outputs(model, adapters.blocks), outputs(model))


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("method", MAKERS)
def test_merged_answers_as_unmerged(variant: str, method: str) -> None:
    """W + ΔW gives what W X + ΔW X gave (float32 sums in another order: 1e-5), and not what W gave."""
    model = sparse_model(variant)
    plain = outputs(model)
    adapters = adapters_for(model, method, learned=True)
    unmerged = outputs(model, adapters.blocks)
    adapters.merge()
    torch.testing.assert_close(outputs(model), unmerged, rtol=1e-5, atol=1e-4)
    assert float((unmerged - plain).abs().max()) > 0.1
    assert zeros_are_kept(model) == (method != "lora")


def test_lora_delta_is_the_scaled_product() -> None:
    """α / r Σ_k B_ik A_kj, through the factors and as a matrix."""
    adapter = LowRank(torch.zeros(5, 3), 2, 8.0, torch.Generator().manual_seed(0))
    adapter.B.copy_(torch.randn(5, 2, generator=torch.Generator().manual_seed(1)))
    expected = torch.tensor(
        [
            [4 * sum(float(adapter.B[i, k] * adapter.A[k, j]) for k in range(2)) for j in range(3)]
            for i in range(5)
        ]
    )
    torch.testing.assert_close(adapter.delta(), expected)
    X = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(adapter.answer(X), X @ expected.T)


@pytest.mark.parametrize(("rows", "stretch"), [(48, 3), (20, 2), (16, 1), (5, 1)])
def test_spp_delta_repeats_rows_of_a_over_stretches(rows: int, stretch: int) -> None:
    """ΔW_ij = s W_ij A_(i // stretch) j B_i, with a shorter last stretch where 16 does not divide the rows."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(rows, 3, generator=generator)
    adapter = Scaling(W, 16, 2.0, generator)
    adapter.B.copy_(torch.randn(rows, 1, generator=generator))
    expected = torch.stack([2.0 * W[row] * adapter.A[row // stretch] * adapter.B[row] for row in range(rows)])
    assert torch.equal(adapter.delta(), expected)
    assert len(adapter.A) == -(-rows // stretch) <= 16


@pytest.mark.parametrize("variant", LAYOUTS)
@pytest.mark.parametrize("method", ["masked-lora", "spp"])
def test_zeros_and_the_rest_stay_frozen_in_training(variant: str, method: str) -> None:
    """After steps that were all kept, zeros are zeros to the bit and nothing but pruned matrices has moved."""
    model = sparse_model(variant)
    before = weights_of(model)
    result = repaired(model, method)
    assert zeros_are_kept(model)
    after = weights_of(model)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(model.all_masks())
    assert result.masks is None
    assert result.steps == result.best_step == 4


def test_lora_tells_which_zeros_it_has_filled() -> None:
    """The merge fills query and value projections alone; the result has the masks that are left and a sentence."""
    model = sparse_model()
    result = repaired(model, "lora")
    assert result.masks is not None
    for block, before, after in zip(model.blocks, model.masks, result.masks, strict=True):
        for name, mask in after.items():
            filled = name.split(".")[-2] in ("q_proj", "v_proj")
            assert torch.equal(mask, block.get_parameter(name) != 0)
            assert bool(mask.all()) == filled
            assert filled or torch.equal(mask, before[name])
    assert result.note is not None
    assert result.note.startswith("merging LoRA fills zeros: ")


def test_lora_keeps_masks_where_no_step_helped() -> None:
    """Steps too small to be seen leave step 0, whose merge fills nothing."""
    model = sparse_model()
    result = repaired(model, "lora", lr=1e-30, selection="heldout")
    assert zeros_are_kept(model)
    assert result.masks is result.note is None


@pytest.mark.parametrize("method", MAKERS)
def test_training_helps_held_out_and_repeats(method: str) -> None:
    """Dropout and the factors' first values come from the seed; the cross entropy held out falls."""
    losses, weights = [], []
    for _ in range(2):
        model = sparse_model(windows=16)
        losses.append(repaired(model, method, epochs=6, selection="heldout"))
        weights.append(weights_of(model))
    assert all(torch.equal(weights[0][name], weight) for name, weight in weights[1].items())
    assert losses[0].loss_after < losses[0].loss_before
    assert losses[0].loss_after == losses[1].loss_after
    assert losses[0].loss == "ce"


def test_dropout_falls_on_the_way_to_the_factors_alone() -> None:
    """In training mode outputs differ from call to call; with ΔW = 0 they do not, as the block's own way is dry."""
    model = sparse_model()
    for learned in (True, False):
        adapters = adapters_for(model, "lora", learned=learned, dropout=0.5)
        adapters.train(True)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            pair = [outputs(model, adapters.blocks) for _ in range(2)]
        assert torch.equal(*pair) != learned


@pytest.mark.parametrize("method", MAKERS)
def test_factors_get_the_gradient_of_the_merged_weight(method: str) -> None:
    """dL/dB through hooks and fused experts equals dL/dB through W + ΔW put in by hand (sums: 1e-4)."""
    grads = []
    for by_hand in (False, True):
        model = sparse_model("mixtral")
        adapters = adapters_for(model, method, learned=True)
        for weight in adapters.weights:
            weight.requires_grad_(True)
        blocks: Any = adapters.blocks
        if by_hand:
            blocks = [_merged_by_hand(model, index, adapters) for index in range(len(model.blocks))]
        hidden_states(model, blocks, model.heldout.ids)[-1].square().mean().backward()
        grads.append([copy.deepcopy(weight.grad) for weight in adapters.weights])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


def _merged_by_hand(model: SparseModel, index: int, adapters: Adapters) -> Any:
    """Block ``index`` with every parameter replaced by W + ΔW, in autograd."""
    block = model.blocks[index]
    added = {name: torch.zeros_like(block.get_parameter(name)) for name in model.masks[index]}
    factors = next(iter(adapters.blocks[index].children()))
    for matrix, adapter in zip(model.matrices[index], factors.children(), strict=True):
        delta = adapter.delta()
        if matrix.expert is None:
            added[matrix.parameter] = added[matrix.parameter] + delta
        else:
            places = torch.zeros(len(added[matrix.parameter]), 1, 1)
            places[matrix.expert] = 1.0
            added[matrix.parameter] = added[matrix.parameter] + places * delta
    changed = {name: block.get_parameter(name) + delta for name, delta in added.items()}
    return lambda *args, **kwargs: torch.func.functional_call(block, changed, args, kwargs)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_has_query_and_value_projections(variant: str) -> None:
    """The published targets are found under each architecture's names, fused with the key's or not."""
    model = sparse_model(variant)
    adapters = Adapters(model, MAKERS["lora"], targets="qv", dropout=0.0, seed=0)
    assert 1 <= len(adapters.weights) // 2 // len(model.blocks) <= 2


def test_targets_that_were_not_pruned_are_refused() -> None:
    """With attention left dense there is no query projection to adapt."""
    model = sparse_model()
    mlp = [[m for m in own if "mlp" in m.name] for own in model.matrices]
    changed = SparseModel(**{**vars(model), "matrices": mlp})
    with pytest.raises(UsageError) as caught:
        repaired(changed, "lora")
    assert caught.value.error_id == "E-ADAPTER-TARGETS"
