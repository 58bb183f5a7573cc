"""Exchanged tokens: as many as asked for, from the text or the dense model, never the first one, new ones each time."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from finetune_samples import sparse_model
from torch import Tensor

from compressor.finetuning import kl, noise, stages_of
from compressor.finetuning.noise import shares, with_expected, with_noise
from compressor.finetuning.sparse_model import SparseModel
from compressor.finetuning.tuning import Finetuned
from compressor.recipe import FinishRecipe, Recipe


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


def test_noise_stays_or_fades_in_a_line() -> None:
    """One share for each step; fading, the first step has all of it and none would follow the last."""
    assert list(shares(0.3, 3, fades=False)) == [0.3, 0.3, 0.3]
    assert list(shares(0.4, 4, fades=True)) == pytest.approx([0.4, 0.3, 0.2, 0.1])


def finished(model: SparseModel, **settings: float | str) -> Finetuned:
    """The model after a short finish."""
    recipe = FinishRecipe.model_validate({"epochs": 2, "batch_size": 2, "lr": 3e-3, **settings})
    return kl.finish(model, recipe, seed=0, tell=lambda step: None)


@pytest.mark.parametrize("source", ["text", "model"])
def test_finish_answers_noise_in_training_only(source: str) -> None:
    """Losses before the first step are those of clean held-out windows; the training's are of noisy ones."""
    clean = finished(sparse_model(), noise=0.0)
    noisy = finished(sparse_model(), noise=0.5, noise_from=source)
    assert noisy.loss_before == clean.loss_before
    assert noisy.train_loss_first != clean.train_loss_first


@pytest.mark.parametrize("source", ["text", "model"])
def test_finish_with_noise_repeats(source: str) -> None:
    """Equal seeds exchange equal tokens: the same weights bit for bit."""
    one, other = sparse_model(), sparse_model()
    finished(one, noise=0.3, noise_from=source)
    torch.rand(7)  # what others draw in between does not matter
    finished(other, noise=0.3, noise_from=source)
    pairs = zip(one.together().parameters(), other.together().parameters(), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_noise_asks_the_dense_model_anew() -> None:
    """With noise of the text and KL alone, kept states of the clean windows play no part: wrong ones change nothing."""
    right, wrong = sparse_model(), sparse_model()
    assert wrong.training.dense is not None
    wrong = replace(wrong, training=replace(wrong.training, dense=None))
    results = [finished(model, noise=0.3, noise_from="text", squarehead=0.0) for model in (right, wrong)]
    assert results[0].train_loss_last == results[1].train_loss_last


def expected(
    ids: Tensor, share: float, logits: Tensor, *, chances: Tensor | None = None, seed: int = 0
) -> Tensor:
    """``with_expected`` of a dense model whose last hidden states are its logits."""
    if chances is None:
        chances = torch.rand(2, *ids.shape, generator=torch.Generator().manual_seed(seed))
    return with_expected(ids, share, chances, logits, lambda states: states, vocab_size=logits.shape[-1])


def test_expected_tokens_follow_the_dense_models_distribution() -> None:
    """Half of 40 000 tokens, as often as the logits one place before say, within four standard deviations."""
    ids = torch.full((200, 201), 3)
    chance = torch.tensor([0.5, 0.3, 0.2])
    noisy = expected(ids, 0.5, chance.log().expand(200, 201, 3))
    assert (noisy[:, 0] == 3).all()
    assert (ids == 3).all()
    drawn = noisy[noisy != 3]
    assert abs(len(drawn) / 40_000 - 0.5) < 4 * (0.25 / 40_000) ** 0.5
    for token, share in enumerate(chance.tolist()):
        error = abs((drawn == token).float().mean().item() - share)
        assert error < 4 * (share * (1 - share) / len(drawn)) ** 0.5


def test_expected_tokens_are_asked_for_one_place_before() -> None:
    """Where the dense model is sure of what comes next, that comes, whatever stood there."""
    ids = torch.zeros(2, 5, dtype=torch.int64)
    following = torch.tensor([[4, 2, 1, 3, 9], [7, 6, 5, 8, 9]])
    logits = 1e4 * torch.nn.functional.one_hot(following, 10).float()
    noisy = expected(ids, 1 - 1e-6, logits)
    assert noisy.tolist() == [[0, 4, 2, 1, 3], [0, 7, 6, 5, 8]]


@pytest.mark.parametrize("chance", [0.0, 1 - 2**-24])
def test_expected_tokens_are_among_the_likeliest(monkeypatch: pytest.MonkeyPatch, chance: float) -> None:
    """At either end of the chances one of the 64 likeliest tokens of 100 is drawn, and never one of no probability."""
    monkeypatch.setattr(noise, "LIKELIEST", 64)
    logits = torch.arange(100.0).expand(1, 3, 100).clone()
    logits[..., 99] = -torch.inf
    chances = torch.tensor([0.0, chance])[:, None, None].expand(2, 1, 3)
    noisy = expected(torch.zeros(1, 3, dtype=torch.int64), 0.5, logits, chances=chances)
    assert 100 - 1 - 64 <= noisy[0, 1] < 99


def test_expected_tokens_are_drawn_in_pieces_of_few_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of three tokens at a time, or of none, give what all at once give."""
    logits = torch.randn(4, 9, 20, generator=torch.Generator().manual_seed(1))
    ids = torch.zeros(4, 9, dtype=torch.int64)
    whole = expected(ids, 0.5, logits)
    monkeypatch.setattr(noise, "LOGITS", 60)
    assert torch.equal(expected(ids, 0.5, logits), whole)
    assert torch.equal(expected(ids, 1e-9, logits), ids)


def test_finish_draws_alike_from_kept_states_and_from_computed_ones() -> None:
    """Kept hidden states of the windows as they are say what is expected; without them a pass more does."""
    kept, computed = sparse_model(), sparse_model(dense=False)
    results = [finished(model, noise=0.3, noise_from="model") for model in (kept, computed)]
    assert results[0].train_loss_last == pytest.approx(results[1].train_loss_last, rel=1e-5)


def test_dense_states_are_kept_where_tokens_are_drawn_from_them() -> None:
    """With noise from the model, whatever else the finish compares; with noise from the text a dense copy does."""

    def needed(**settings: object) -> bool:
        recipe = Recipe.model_validate({"finish": {"method": "kl", **settings}})
        return stages_of(recipe)[-1].needs_dense

    assert needed(noise_from="model")
    assert needed(noise=0.0, squarehead=0.0)
    assert not needed(noise_from="model", noise=0.0)
    assert not needed(noise_from="text")
