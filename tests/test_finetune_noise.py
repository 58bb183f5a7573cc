"""Exchanged tokens: as many as asked for, from the text, the first one stays, new ones each time."""

from __future__ import annotations

from dataclasses import replace

import torch
from finetune_samples import sparse_model

from compressor.finetuning import kl
from compressor.finetuning.noise import with_noise
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned
from compressor.recipe import FinishRecipe


def test_noise_exchanges_a_share_of_the_tokens_for_those_of_the_pool() -> None:
    """A tenth of 40 000 tokens within four standard deviations, all of them the pool's, never the first of a window."""
    ids, pool = torch.zeros(200, 201, dtype=torch.int64), torch.tensor([[5, 7], [7, 7]])
    noisy = with_noise(ids, 0.1, pool)
    assert not noisy[:, 0].any()
    assert not ids.any()
    drawn = noisy[:, 1:][noisy[:, 1:] != 0]
    assert abs(len(drawn) / 40_000 - 0.1) < 4 * (0.1 * 0.9 / 40_000) ** 0.5
    assert abs((drawn == 7).float().mean() - 0.75) < 4 * (0.75 * 0.25 / len(drawn)) ** 0.5
    assert set(drawn.tolist()) == {5, 7}


def test_no_noise_draws_nothing() -> None:
    """The windows come back as they are, and the random numbers of others are untouched."""
    ids = torch.arange(6).view(2, 3)
    state = torch.get_rng_state()
    assert with_noise(ids, 0.0, ids) is ids
    assert torch.equal(torch.get_rng_state(), state)


def finished(model: SparseModel, **settings: float) -> Finetuned:
    """The model after a short finish."""
    recipe = FinishRecipe.model_validate({"epochs": 2, "batch_size": 2, "lr": 3e-3, **settings})
    return kl.finish(model, recipe, seed=0, tell=lambda step: None)


def test_finish_answers_noise_in_training_only() -> None:
    """Losses before the first step are those of clean held-out windows; the training's are of noisy ones."""
    clean, noisy = finished(sparse_model(), noise=0.0), finished(sparse_model(), noise=0.5)
    assert noisy.loss_before == clean.loss_before
    assert noisy.train_loss_first != clean.train_loss_first


def test_finish_with_noise_repeats() -> None:
    """Equal seeds exchange equal tokens: the same weights bit for bit."""
    one, other = sparse_model(), sparse_model()
    finished(one, noise=0.3)
    torch.rand(7)  # what others draw in between does not matter
    finished(other, noise=0.3)
    pairs = zip(one.together().parameters(), other.together().parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_noise_asks_the_dense_model_anew() -> None:
    """With noise and KL alone, kept states of the clean windows play no part: wrong ones change nothing."""
    right, wrong = sparse_model(), sparse_model()
    assert wrong.training.dense is not None
    wrong = replace(wrong, training=replace(wrong.training, dense=None))
    results = [finished(model, noise=0.3, squarehead=0.0) for model in (right, wrong)]
    assert results[0].train_loss_last == results[1].train_loss_last
