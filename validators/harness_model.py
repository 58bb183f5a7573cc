"""A model of ours as lm-eval-harness sees one. Imported only where lm-eval is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from validators.errors import ValidationUsageError
from validators.likelihood import LanguageModel, LikelihoodScorer
from validators.windows import Tokenizer


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm-eval is not there when types are checked
    """Answers lm-eval's requests the way its own model ``hf`` does: same tokens, same truncation, same windows.

    Args:
        model: What gives logits.
        tokenizer: A Hugging Face tokenizer; whether it adds BOS is its own setting.
        max_tokens: Tokens that the model takes at once.
        on_request: Called with the requests done and in all, after each.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        max_tokens: int,
        on_request: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.max_length = max_tokens
        self._scorer = LikelihoodScorer(model, max_tokens)
        self._on_request = on_request

    @property
    def eot_token_id(self) -> int | None:
        """The end-of-text token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What stands before a text that has nothing before it."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; None leaves special tokens to the tokenizer, unless the text begins with BOS already."""
        options: dict[str, Any] = {"verbose": False}  # verbose warns of a length that is cut later
        bos = getattr(self.tokenizer, "bos_token", None)
        if add_special_tokens is None and bos and string.startswith(bos):
            add_special_tokens = False
        if add_special_tokens is not None:
            options["add_special_tokens"] = add_special_tokens
        return list(self.tokenizer(string, **options)["input_ids"])

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy) of each request's continuation after its context."""
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return answers

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        """Log-likelihood of each request's text, every token once, in windows that share one token."""
        answers = []
        for done, request in enumerate(requests, start=1):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            answers.append(sum(self._scorer.score(context, following)[0] for context, following in pairs))
            self._on_request(done, len(requests))
        return answers

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """Nothing: tasks that generate are refused before.

        Raises:
            ValidationUsageError: E-TASK-KIND.
        """
        raise generation_refused("a task")

    def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
        answers = []
        for done, (_, context, continuation) in enumerate(requests, start=1):
            answers.append(self._scorer.score(context, continuation))
            self._on_request(done, len(requests))
        return answers


def generation_refused(which: str) -> ValidationUsageError:
    """The error for a task whose answers are generated."""
    return ValidationUsageError(
        "E-TASK-KIND",
        f"{which} has the model write its answers; only tasks that score given answers are run",
        "leave it out of --tasks",
    )
