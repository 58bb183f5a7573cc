"""Tuning a whole model: equal to a plain loop; masks frozen to the bit; repeats; never worse held out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from finetune_samples import logits_of, sparse_model, weights_of, with_dense_states, zeros_are_kept
from torch import Tensor

from compressor.errors import InputRefused, StoppedSafely
from compressor.finetuning import kl, norms, squarehead
from compressor.finetuning.losses import Objective, kl_divergence
from compressor.finetuning.parametrisation import OwnWeights
from compressor.finetuning.sparse_model import SparseModel, hidden_states
from compressor.finetuning.tuning import Finetuned, Step, settings_of, tune
from compressor.recipe import FinishRecipe, LearningRateTrials, RecoveryRecipe
from compressor.recovery.schedule import learning_rate_factor
from compressor.streams import shuffled


def recipe(**settings: Any) -> FinishRecipe:
    """A short finish by KL alone."""
    short = {"epochs": 3, "batch_size": 4, "lr": 3e-3, "squarehead": 0.0, "noise": 0.0}
    return FinishRecipe.model_validate({**short, **settings})


def finish(model: SparseModel, seed: int = 0, **settings: Any) -> Finetuned:
    """The model after the finish."""
    return kl.finish(model, recipe(**settings), seed=seed, tell=lambda step: None)


def heldout_kl(model: SparseModel) -> float:
    """Mean KL per token of the held-out windows, all at once."""
    ids = model.heldout.ids
    with torch.no_grad():
        return float(kl_divergence(logits_of(model, ids, dense=True), logits_of(model, ids))) / ids.numel()


def layer_errors(model: SparseModel, ids: Tensor, states: list[Tensor]) -> Tensor:
    """Each layer's squared error as a share of the dense layer's mean square, added up."""
    dense = hidden_states(model, [model.load_dense(index) for index in range(len(model.blocks))], ids)
    pairs = zip(states, dense, strict=True)
    return sum(((S - T) ** 2).mean() / ((T**2).mean() + 2**-7) for S, T in pairs)  # type: ignore[return-value]


def plain_training(model: SparseModel, chosen: FinishRecipe) -> dict[str, Tensor]:
    """The same optimisation as in a textbook: W * M in the forward, unfused AdamW on the leaves."""
    masks, together = model.all_masks(), model.together()
    leaves = {name: weight.clone().requires_grad_() for name, weight in weights_of(model).items()}
    optimizer = torch.optim.AdamW(
        leaves.values(), lr=1.0, betas=(chosen.beta1, chosen.beta2), eps=chosen.eps, weight_decay=0.1
    )
    generator, done = torch.Generator().manual_seed(0), 0
    steps = chosen.epochs * math.ceil(len(model.training) / chosen.batch_size)
    for _ in range(chosen.epochs):
        for rows in shuffled(len(model.training), chosen.batch_size, generator):
            ids = model.training.ids[rows]
            hidden, states = model.embed(ids), []
            for index, block in enumerate(together):
                own = {
                    name.partition(".")[2]: leaf * masks[name] if name in masks else leaf
                    for name, leaf in leaves.items()
                    if name.startswith(f"{index}.")
                }
                answer = lambda *a, b=block, w=own, **k: torch.func.functional_call(b, w, a, k)  # noqa: E731
                hidden = model.forward(index, answer, hidden)
                states.append(hidden)
            loss = kl_divergence(logits_of(model, ids, dense=True).detach(), model.head(hidden)) / ids.numel()
            loss = loss + chosen.squarehead * layer_errors(model, ids, states)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves.values(), 1.0)
            factor = learning_rate_factor(done, steps, chosen.schedule, chosen.warmup)
            optimizer.param_groups[0]["lr"] = chosen.lr * factor
            optimizer.step()
            done += 1
    return {name: leaf.detach() * masks[name] if name in masks else leaf for name, leaf in leaves.items()}


@pytest.mark.parametrize("squarehead", [0.0, 0.5])
def test_finish_equals_a_plain_loop_with_explicit_masks(squarehead: float) -> None:
    """Six steps end where the textbook loop ends (Adam's first steps divide tiny numbers: 1e-4)."""
    chosen = recipe(selection="last", weight_decay=0.1, squarehead=squarehead)
    expected = plain_training(sparse_model(), chosen)
    model = sparse_model()
    result = kl.finish(model, chosen, seed=0, tell=lambda step: None)
    assert result.steps == result.best_step == 6
    for name, weight in weights_of(model).items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-4, atol=1e-4)


def test_loss_before_and_after_are_those_of_the_model() -> None:
    """Both are the mean KL per token on held-out windows, written out (float32 sums: 1e-4)."""
    model = sparse_model()
    before = heldout_kl(model)
    result = finish(model)
    assert result.loss_before == pytest.approx(before, rel=1e-4)
    assert result.loss_after == pytest.approx(heldout_kl(model), rel=1e-4)
    assert result.loss == "kl"


def test_finish_lowers_the_divergence() -> None:
    """Held out it falls, on the calibration windows it falls further."""
    result = finish(sparse_model(windows=32), epochs=8)
    assert result.loss_after < 0.95 * result.loss_before
    assert result.train_loss_first is not None
    assert result.train_loss_last is not None
    assert result.train_loss_last < 0.8 * result.train_loss_first


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16])
def test_masks_stay_frozen_to_the_bit(variant: str, amp: torch.dtype | None) -> None:
    """Masked weights are +0.0 after decay and clipping, in every layout and precision; kept ones moved."""
    model = replace(sparse_model(variant), amp_dtype=amp)
    before = weights_of(model)
    finish(model, weight_decay=0.5, max_grad_norm=0.1, selection="last")
    assert zeros_are_kept(model)
    after = weights_of(model)
    masks = model.all_masks()
    assert all(not torch.equal(after[name][mask], before[name][mask]) for name, mask in masks.items())


def test_embedding_head_and_routers_are_untouched() -> None:
    """Only blocks are trained, and not what chooses experts in them."""
    model = sparse_model("mixtral")
    ids = model.heldout.ids
    embedded, answered = model.embed(ids), model.head(model.embed(ids))
    before = weights_of(model)
    finish(model, selection="last")
    assert torch.equal(model.embed(ids), embedded)
    assert torch.equal(model.head(embedded), answered)
    routers = [name for name in before if ".gate." in name]
    assert len(routers) == 2
    assert all(torch.equal(weights_of(model)[name], before[name]) for name in routers)


def test_finish_repeats_bit_for_bit_and_leaves_the_random_state() -> None:
    """The same seed gives the same bits, another one others; the global generator is not moved."""
    state = torch.random.get_rng_state()
    runs = []
    for seed in (0, 0, 1):
        model = sparse_model()
        finish(model, seed=seed)
        runs.append(weights_of(model))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not all(torch.equal(runs[0][name], runs[2][name]) for name in runs[0])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_selection_includes_step_0() -> None:
    """A learning rate that only does harm leaves the model as it came."""
    model = sparse_model()
    before = weights_of(model)
    result = finish(model, lr=30.0)
    assert result.best_step == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("selection", ["heldout", "last"])
def test_divergence_falls_back_to_the_best_finite_weights(selection: str) -> None:
    """A loss that overflows ends the training, whatever the selection."""
    model = sparse_model()
    before = weights_of(model)
    result = finish(model, lr=1e30, selection=selection)
    assert result.diverged
    assert result.train_loss_last is None
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())


@pytest.mark.parametrize("variant", ["llama", "gemma2", "mixtral"])
def test_recomputation_changes_no_gradient(variant: str) -> None:
    """Running blocks twice gives the very gradients of keeping their activations."""
    gradients = []
    for recompute in (False, True):
        model = sparse_model(variant)
        weights = OwnWeights(model).weights
        for weight in weights:
            weight.requires_grad_(True)
        hidden_states(model, model.blocks, model.training.ids, recompute=recompute)[
            -1
        ].square().mean().backward()
        gradients.append([weight.grad for weight in weights])
    assert all(torch.equal(kept, again) for kept, again in zip(*gradients, strict=True))


def test_dense_states_are_the_same_kept_or_computed() -> None:
    """Without kept hidden states a dense copy of the blocks stands in, to the same loss (batches: 1e-5)."""
    kept = finish(sparse_model())
    settings, trials = recipe(), LearningRateTrials()
    model = sparse_model(dense=False)
    computed = tune(
        "kl", model, OwnWeights(model), Objective(kd=1), settings, trials, seed=0, tell=lambda step: None
    )
    assert computed.loss_before == pytest.approx(kept.loss_before, rel=1e-5)
    assert computed.loss_after == pytest.approx(kept.loss_after, rel=1e-4)


def test_learning_rate_is_the_best_of_an_exhaustive_search() -> None:
    """The climb from the middle ends at the rate with the lowest held-out loss; the model starts afresh."""
    candidates = [1e-5, 1e-4, 1e-3, 1e-2, 10.0]
    losses = {lr: finish(sparse_model(), lr=lr, epochs=2, selection="last").loss_after for lr in candidates}
    trials = {"candidates": candidates, "epochs": 2}
    model, told = sparse_model(), list[Step]()
    result = kl.finish(model, recipe(lr="auto", trials=trials), seed=0, tell=told.append)
    assert result.lr == min(losses, key=losses.__getitem__)
    assert result.tried == tuple(sorted({step.lr for step in told if step.trial}))
    assert len(result.tried) < len(candidates)
    alone = sparse_model()
    finish(alone, lr=result.lr)
    assert all(torch.equal(weight, weights_of(alone)[name]) for name, weight in weights_of(model).items())


def test_every_step_is_told() -> None:
    """6 windows in batches of 4 are 2 steps an epoch."""
    told = list[Step]()
    kl.finish(sparse_model(), recipe(epochs=2), seed=0, tell=told.append)
    assert told == [Step(number, 4, 3e-3, trial=False) for number in range(1, 5)]


def test_a_stop_ends_the_training() -> None:
    """What the listener raises comes through, and gradients are off again."""
    model = sparse_model()

    def stop(step: Step) -> None:
        raise StoppedSafely("E-STOPPED", "stopped", "run again")

    with pytest.raises(StoppedSafely):
        kl.finish(model, recipe(), seed=0, tell=stop)
    assert not any(weight.requires_grad for block in model.blocks for weight in block.parameters())


@pytest.mark.parametrize(("windows", "heldout"), [(0, 3), (3, 0)])
def test_tuning_without_windows_is_refused(windows: int, heldout: int) -> None:
    """Both training and held-out windows are needed."""
    with pytest.raises(InputRefused) as caught:
        finish(sparse_model(windows=windows, heldout=heldout))
    assert caught.value.error_id == "E-CALIBRATION-SHORT"


def test_a_model_that_answers_nan_is_refused() -> None:
    """A loss that is NaN before step 1 is an error, not a training."""
    model = sparse_model()
    with torch.no_grad():
        model.together().get_parameter("1.mlp.down_proj.weight").fill_(float("nan"))
    with pytest.raises(InputRefused) as caught:
        finish(model)
    assert caught.value.error_id == "E-LOSS-NONFINITE"


def test_squarehead_pulls_every_layer_towards_the_dense_one() -> None:
    """After it the hidden states of all layers are nearer to the dense model's; masks are kept."""
    model = with_dense_states(sparse_model(windows=32))
    dense = [model.load_dense(index) for index in range(len(model.blocks))]

    def distances() -> list[float]:
        with torch.no_grad():
            pairs = zip(
                hidden_states(model, model.blocks, model.heldout.ids),
                hidden_states(model, dense, model.heldout.ids),
                strict=True,
            )
            return [float((sparse - wanted).square().mean()) for sparse, wanted in pairs]

    before = distances()
    settings = RecoveryRecipe.model_validate({"epochs": 8, "lr": 1e-2, "squarehead": {"ce": 0}})
    result = squarehead.repair(model, settings, seed=0, tell=lambda step: None)
    assert result.loss == "squarehead"
    assert all(after < 0.9 * was for after, was in zip(distances(), before, strict=True))
    assert zeros_are_kept(model)


@pytest.mark.parametrize(("variant", "count"), [("llama", 2 * 2 * 32), ("gpt2", 688)])
def test_norms_trains_gains_and_biases_alone(variant: str, count: int) -> None:
    """Every matrix is what it was; what moved has one axis, and is counted."""
    model = sparse_model(variant)
    before = weights_of(model)
    settings = RecoveryRecipe.model_validate({"epochs": 2, "lr": 1e-2, "selection": "last"})
    result = norms.repair(model, settings, seed=0, tell=lambda step: None)
    after = weights_of(model)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert all(before[name].ndim == 1 for name in moved)
    assert sum(before[name].numel() for name in moved) == result.trained_parameters == count


def test_trained_parameters_leave_masked_weights_out() -> None:
    """The finish counts what is free to move."""
    model = sparse_model()
    masked = sum(int((~mask).sum()) for mask in model.all_masks().values())
    every = sum(weight.numel() for weight in weights_of(model).values())
    assert finish(model).trained_parameters == every - masked


@pytest.mark.parametrize(("given", "used"), [("auto", 4e-3), (1e-2, 1e-2)])
def test_a_number_for_the_recovery_counts_before_the_methods_own(given: float | str, used: float) -> None:
    """``--lr 1e-2`` is meant for whatever method there is; auto takes the published rate."""
    settings = settings_of(RecoveryRecipe.model_validate({"lr": given}), 4e-3, weight_decay=1e-3)
    assert (settings.lr, settings.weight_decay, settings.epochs) == (used, 1e-3, 10)
