"""Likelihood of a continuation: equals a slow loop, cuts on the left, runs a question once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from toy_language_model import VOCAB, ToyReference, random_weights

from exporters.errors import ReportedError
from validators.likelihood import LikelihoodScorer

CONTEXT, CONTINUATION = [3, 9, 14, 2], [7, 21, 5]


class Counted(ToyReference):
    """The toy model, its calls noted."""

    def __init__(self) -> None:
        super().__init__(random_weights())
        self.calls: list[list[int]] = []

    def logits(self, ids: Any, attention_mask: Any = None) -> Any:
        """Logits (B, T, V)."""
        self.calls.append(ids[0].tolist())
        return super().logits(ids, attention_mask)


def slow_log_likelihood(context: list[int], continuation: list[int]) -> float:
    """log p(continuation | context), one token and one run of the model at a time, in float64."""
    total, before = 0.0, list(context)
    for token in continuation:
        row = ToyReference(random_weights()).logits(np.array([before]))[0, -1].astype(np.float64)
        total += row[token] - np.log(np.exp(row).sum())
        before.append(token)
    return total


def test_likelihood_equals_a_slow_loop() -> None:
    """One run over the sequence gives what one run per token gives."""
    found, _ = LikelihoodScorer(Counted(), 64).score(CONTEXT, CONTINUATION)
    # Three log-softmax rows in float32 of logits near 1: a few units in the last place each.
    assert found == pytest.approx(slow_log_likelihood(CONTEXT, CONTINUATION), rel=1e-5)


def test_likelihood_tells_greedy_continuations() -> None:
    """Only the most likely token after each prefix makes a greedy continuation."""
    model, before = Counted(), list(CONTEXT)
    for _ in range(3):
        before.append(int(model.logits(np.array([before]))[0, -1].argmax()))
    best = before[len(CONTEXT) :]
    scorer = LikelihoodScorer(model, 64)
    assert scorer.score(CONTEXT, best)[1]
    assert not scorer.score(CONTEXT, [*best[:-1], (best[-1] + 1) % VOCAB])[1]


def test_likelihood_cuts_long_contexts_on_the_left() -> None:
    """The model sees its last tokens; the last one of all is only predicted, never fed."""
    model = Counted()
    found, _ = LikelihoodScorer(model, 4).score(CONTEXT, CONTINUATION)
    assert model.calls == [[14, 2, 7, 21]]
    assert found == pytest.approx(slow_log_likelihood([14, 2], CONTINUATION), rel=1e-5)


def test_likelihood_runs_choices_of_one_token_once() -> None:
    """All answers A, B, C to one question share the run of the question."""
    model = Counted()
    scorer = LikelihoodScorer(model, 64)
    chances = [np.exp(scorer.score(CONTEXT, [token])[0]) for token in range(VOCAB)]
    assert model.calls == [CONTEXT]
    assert sum(chances) == pytest.approx(1, rel=1e-5)  # 24 float32 probabilities


def test_likelihood_of_nothing_is_certain() -> None:
    """An empty continuation has probability 1."""
    assert LikelihoodScorer(Counted(), 64).score(CONTEXT, []) == (0.0, True)


def test_likelihood_refuses_an_answer_longer_than_the_model() -> None:
    """Scoring a part of an answer would compare answers of different lengths."""
    with pytest.raises(ReportedError, match="has 3 tokens, the model takes 2") as caught:
        LikelihoodScorer(Counted(), 2).score(CONTEXT, CONTINUATION)
    assert (caught.value.error_id, caught.value.exit_code) == ("E-TASK-LENGTH", 3)
