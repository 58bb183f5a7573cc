"""Evaluation windows: the one protocol by which every perplexity in this project is measured.

The text is one stream of tokens. One text is one tokenizer call; documents are tokenized each on its own and
joined with the end-of-text token. One BOS token stands at the very start of the stream if the tokenizer adds
one. The stream is cut into windows that do not overlap, and the tail that fills none is dropped. This is the
WikiText-2 protocol of GPTQ, SparseGPT and Wanda (Wanda, arXiv 2306.11695, evaluation code).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from validators.errors import ValidationError

_DOCUMENTS_PER_CALL = 256


class Tokenizer(Protocol):
    """What is used of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None

    def __call__(self, text: Any, **options: Any) -> Any:
        """Token ids under ``input_ids``: one list for a text, a list of lists for a list of texts."""
        ...


@dataclass(frozen=True)
class EvaluationProtocol:
    """How the windows were made; enough to make them again.

    Attributes:
        window_tokens: Tokens in each window; each predicts one fewer.
        stride_tokens: Tokens from one window's start to the next; equals ``window_tokens``: no overlap.
        windows: Number of windows.
        predicted_tokens: Tokens that count in the mean: windows x (window_tokens - 1).
        bos: Whether one BOS token stands at the start of the stream (never at the start of each window).
        join: What stands between documents: "single text", "eos token", or "blank line" for a tokenizer
            without an end-of-text token.
        documents: Documents or texts that the stream was made of.
        dropped_tail_tokens: Tokens at the end that fill no window; None where the stream was not read to its
            end because ``max_windows`` was reached.
        sha256: Digest of the ids, as little-endian int64 in C order.
    """

    window_tokens: int
    stride_tokens: int
    windows: int
    predicted_tokens: int
    bos: bool
    join: str
    documents: int
    dropped_tail_tokens: int | None
    sha256: str


@dataclass(frozen=True)
class EvaluationWindows:
    """Token windows (N, T) int64 and how they were made."""

    ids: NDArray[np.int64]
    protocol: EvaluationProtocol


def evaluation_windows(
    documents: Sequence[str],
    kind: Literal["text", "documents"],
    tokenizer: Tokenizer,
    *,
    seqlen: int,
    max_windows: int | None = None,
) -> EvaluationWindows:
    """The first ``max_windows`` windows (None: all) of ``seqlen`` tokens.

    Args:
        documents: Documents, or texts that are taken as one.
        kind: "text" makes one tokenizer call for all, "documents" one for each.
        tokenizer: A Hugging Face tokenizer.
        seqlen: Tokens in a window, at least 2.
        max_windows: Stop after this many.

    Raises:
        ValidationError: E-EVAL-EMPTY: there is no text; E-EVAL-SHORT: it fills no window.
    """
    if seqlen < 2:
        raise ValueError(f"a window needs at least 2 tokens to predict one, got {seqlen}")
    if not any(document.strip() for document in documents):
        raise ValidationError("E-EVAL-EMPTY", "the evaluation text is empty", "give a text with --eval-data")
    wanted = None if max_windows is None else max_windows * seqlen
    join = _join(kind, tokenizer)
    bos = _adds_bos(tokenizer)
    stream = [tokenizer.bos_token_id] if bos else []
    to_the_end = True
    for part in _token_parts(documents, join, tokenizer):
        if wanted is not None and len(stream) >= wanted:
            to_the_end = False
            break
        stream.extend(part)
    windows = len(stream) // seqlen if wanted is None else min(len(stream) // seqlen, wanted // seqlen)
    if windows == 0:
        raise ValidationError(
            "E-EVAL-SHORT",
            f"the evaluation text has {len(stream)} tokens, one window needs {seqlen}",
            "give a longer text with --eval-data, or shorter windows with --seqlen",
        )
    ids = np.asarray(stream[: windows * seqlen], dtype=np.int64).reshape(windows, seqlen)
    tail = len(stream) % seqlen if to_the_end and len(stream) // seqlen == windows else None
    protocol = EvaluationProtocol(
        window_tokens=seqlen,
        stride_tokens=seqlen,
        windows=windows,
        predicted_tokens=windows * (seqlen - 1),
        bos=bos,
        join=join,
        documents=len(documents),
        dropped_tail_tokens=tail,
        sha256=ids_sha256(ids),
    )
    return EvaluationWindows(ids, protocol)


def ids_sha256(ids: NDArray[np.int64]) -> str:
    """Hex digest of token ids as little-endian int64 in C order."""
    return hashlib.sha256(np.ascontiguousarray(ids, dtype="<i8").tobytes()).hexdigest()


def _join(kind: str, tokenizer: Tokenizer) -> str:
    if kind == "text":
        return "single text"
    return "eos token" if tokenizer.eos_token_id is not None else "blank line"


def _adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether the tokenizer itself puts its BOS token before a text."""
    if tokenizer.bos_token_id is None:
        return False
    return bool(list(tokenizer("a")["input_ids"])[:1] == [tokenizer.bos_token_id])


def _token_parts(documents: Sequence[str], join: str, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Stretches of the stream, in order, without the BOS token."""
    options = {"add_special_tokens": False, "verbose": False}  # verbose warns of a length that is cut later
    if join != "eos token":
        yield list(tokenizer("\n\n".join(documents), **options)["input_ids"])
        return
    filled = [document for document in documents if document]
    separator: list[int] = []
    for start in range(0, len(filled), _DOCUMENTS_PER_CALL):
        for ids in tokenizer(filled[start : start + _DOCUMENTS_PER_CALL], **options)["input_ids"]:
            yield separator + list(ids)
            separator = [tokenizer.eos_token_id]  # type: ignore[list-item]  # join says that there is one
