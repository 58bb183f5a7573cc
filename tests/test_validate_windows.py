"""The evaluation protocol and the perplexity that is measured by it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from validators.errors import ValidationError
from validators.perplexity import measure_perplexity, perplexity, sum_nll
from validators.windows import evaluation_windows, ids_sha256

BOS, EOS = 1, 2


class LetterTokenizer:
    """One token for each letter, ``ord(letter)``; counts how many texts it was given."""

    def __init__(self, *, bos: bool = True, eos: int | None = EOS) -> None:
        self.bos_token_id: int | None = BOS if bos else None
        self.eos_token_id = eos
        self.texts = 0

    def __call__(self, text: Any, **options: Any) -> dict[str, Any]:
        """Ids of a text or of a list of texts."""
        if isinstance(text, list):
            return {"input_ids": [self(part, **options)["input_ids"] for part in text]}
        self.texts += 1
        special = options.get("add_special_tokens", True) and self.bos_token_id is not None
        return {"input_ids": [BOS] * special + [ord(letter) for letter in text]}


def test_windows_of_one_text_follow_each_other() -> None:
    """One BOS at the very start, windows without overlap, the tail dropped and counted."""
    made = evaluation_windows(["abcdefgh"], "text", LetterTokenizer(), seqlen=4)
    assert made.ids.tolist() == [[BOS, *map(ord, "abc")], [*map(ord, "defg")]]
    assert made.protocol.dropped_tail_tokens == 1
    assert (made.protocol.bos, made.protocol.join) == (True, "single text")
    assert (made.protocol.windows, made.protocol.predicted_tokens) == (2, 6)
    assert made.protocol.sha256 == ids_sha256(made.ids)


def test_documents_are_joined_with_the_end_token() -> None:
    """Between two documents stands one EOS, at the end none, and empty documents leave no trace."""
    made = evaluation_windows(["ab", "", "cd"], "documents", LetterTokenizer(bos=False), seqlen=5)
    assert made.ids.tolist() == [[*map(ord, "ab"), EOS, *map(ord, "cd")]]
    assert (made.protocol.bos, made.protocol.join) == (False, "eos token")
    assert made.protocol.dropped_tail_tokens == 0


def test_documents_without_end_token_are_joined_by_a_blank_line() -> None:
    """A tokenizer without an end token gets one text."""
    made = evaluation_windows(["ab", "cd"], "documents", LetterTokenizer(eos=None, bos=False), seqlen=6)
    assert made.ids.tolist() == [[*map(ord, "ab\n\ncd")]]
    assert made.protocol.join == "blank line"


def test_max_windows_takes_the_first_and_stops_reading() -> None:
    """With a limit the first windows are the same, and later documents are not tokenized."""
    documents, tokenizer = ["abcd"] * 2000, LetterTokenizer()
    some = evaluation_windows(documents, "documents", tokenizer, seqlen=4, max_windows=3)
    assert tokenizer.texts < 1000
    everything = evaluation_windows(documents, "documents", LetterTokenizer(), seqlen=4)
    assert np.array_equal(some.ids, everything.ids[:3])
    assert some.protocol.dropped_tail_tokens is None


@pytest.mark.parametrize(("documents", "error_id"), [([" \n"], "E-EVAL-EMPTY"), (["abc"], "E-EVAL-SHORT")])
def test_windows_refuse_text_that_fills_none(documents: list[str], error_id: str) -> None:
    """Nothing to evaluate on is an error that says what is missing."""
    with pytest.raises(ValidationError) as caught:
        evaluation_windows(documents, "text", LetterTokenizer(), seqlen=8)
    assert caught.value.error_id == error_id
    assert caught.value.exit_code == 3


def test_sum_nll_equals_the_plain_formula() -> None:
    """It is -sum log softmax of the next token, per window."""
    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    shares = torch.log_softmax(logits.double(), dim=-1)
    plain = [-sum(shares[b, t, ids[b, t + 1]].item() for t in range(6)) for b in range(3)]
    # The slices are computed in float32, whose rounding is 6e-8 relative.
    assert sum_nll(logits, ids).tolist() == pytest.approx(plain, rel=1e-6)


def test_sum_nll_does_not_depend_on_its_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A slice of one token at a time gives the same sums."""
    logits = torch.randn(2, 9, 5, generator=torch.Generator().manual_seed(0))
    ids = torch.randint(0, 5, (2, 9), generator=torch.Generator().manual_seed(1))
    whole = sum_nll(logits, ids)
    monkeypatch.setattr("validators.perplexity._SLICE_NUMBERS", 1)
    assert torch.allclose(sum_nll(logits, ids), whole, rtol=1e-12)


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    """A model that knows nothing is as perplexed as there are tokens."""
    windows = np.arange(24, dtype=np.int64).reshape(2, 12) % 7
    seen: list[tuple[int, int]] = []

    def uniform(ids: np.ndarray) -> np.ndarray:
        return np.zeros((*ids.shape, 7), np.float32)

    measured = measure_perplexity(uniform, windows, lambda done, total: seen.append((done, total)))
    assert measured == pytest.approx(7, rel=1e-6)  # float32 log softmax
    assert seen == [(1, 2), (2, 2)]


def test_perplexity_overflow_is_infinite_and_nan_stays() -> None:
    """What exp cannot hold is infinite, and NaN is not hidden."""
    assert perplexity(1e6, 1) == math.inf
    assert math.isnan(perplexity(math.nan, 1))
    with pytest.raises(ValueError, match="at least one"):
        perplexity(1.0, 0)
