"""How likely a text is to go on in a given way: what multiple-choice tasks and rolling perplexity rest on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch

from validators.errors import ValidationError
from validators.reference import Floats, Ids


class LanguageModel(Protocol):
    """What gives logits: ``validators.causal_lm.CausalLM`` and every ``validators.reference.Reference``."""

    def logits(self, ids: Ids, attention_mask: Ids | None = None) -> Floats:
        """Logits (B, T, V) of token ids (B, T); no mask means no padding."""
        ...


class LikelihoodScorer:
    """Scores continuations with a model, one sequence at a time.

    Args:
        model: The model.
        max_tokens: Tokens that it takes at once; longer contexts are cut on the left.
    """

    def __init__(self, model: LanguageModel, max_tokens: int) -> None:
        self._model = model
        self._max_tokens = max_tokens
        self._inputs: list[int] = []
        self._logits: Floats | None = None

    def score(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """(sum of log p(continuation | context) in nats, whether each of its tokens is the most likely one).

        The sequence without its last token goes in; row t of the logits predicts token t + 1. Log-softmax in
        float32, the sum in float64: lm-eval's model ``hf`` does the same.

        Raises:
            ValidationError: E-TASK-LENGTH: the continuation alone is longer than the model's window.
        """
        if not continuation:
            return 0.0, True
        if len(continuation) > self._max_tokens:
            raise ValidationError(
                "E-TASK-LENGTH",
                f"an answer of a task has {len(continuation)} tokens, the model takes {self._max_tokens}",
                "leave that task out of --tasks",
            )
        inputs = [*context, *continuation][-(self._max_tokens + 1) : -1]
        logits = torch.from_numpy(self._logits_of(inputs)[-len(continuation) :])  # (continuation, V)
        targets = torch.tensor(continuation)
        log_probabilities = torch.log_softmax(logits.float(), dim=-1)
        chosen = log_probabilities.gather(-1, targets[:, None]).double()
        return float(chosen.sum().item()), bool((logits.argmax(dim=-1) == targets).all().item())

    def _logits_of(self, inputs: list[int]) -> Floats:
        """Logits (T, V); choices of one token each share the run of their question."""
        if self._logits is None or inputs != self._inputs:
            self._logits = self._model.logits(np.asarray([inputs], dtype=np.int64))[0]
            self._inputs = inputs
        return self._logits
