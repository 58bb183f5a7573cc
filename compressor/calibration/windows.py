"""Calibration windows: token ids that statistics and repair see, and a few kept apart for selection.

Notation: N windows to work on, H held-out windows, T tokens in each.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compressor.calibration.strict import strict_windows
from compressor.calibration.text import TextSource, stretch_of
from compressor.calibration.tokens import adds_bos, refuse_ids_beyond
from compressor.errors import InputRefused

__all__ = ["Windows", "calibration_windows"]

_DOCUMENTS_PER_CALL = 64


@dataclass(frozen=True)
class Windows:
    """Token windows and how they were made.

    Attributes:
        ids: Windows to work on, (N, T) int64.
        heldout: Windows that only select, (H, T) int64; they share no token with ``ids``.
        protocol: How they were made, in plain values for the report.
        sha256: Hex digest of both shapes (``N,T;H,T;``) and of all ids as little-endian int64, ``ids`` first: one text
            in shorter windows, or with more of them held out, has another.
    """

    ids: Tensor
    heldout: Tensor
    protocol: dict[str, Any]
    sha256: str

    @property
    def count(self) -> int:
        """Windows of both kinds together."""
        return len(self.ids) + len(self.heldout)


def calibration_windows(
    text: TextSource,
    tokenizer: Any,
    *,
    num_samples: int,
    seqlen: int,
    sampler: Literal["joined", "strict"],
    heldout_share: float,
    seed: int,
    vocab_rows: int,
) -> Windows:
    """The windows of ``text``; the same for the same arguments.

    ``joined``: documents, in an order drawn with ``seed``, are joined with the end-of-text token into one
    stream, which is cut into windows; the last ones are held out. Of a single text, windows that do not
    overlap are drawn from its beginning, and the last ones are held out. ``num_samples`` is N + H; where the
    text has fewer windows, all are used.

    ``strict``: the published sampler, see ``strict_windows``; ``num_samples`` is N, the held-out windows come
    from other documents.

    Args:
        text: The text.
        tokenizer: A Hugging Face tokenizer.
        num_samples: Windows that are wanted.
        seqlen: T, at least 2.
        sampler: How windows are drawn.
        heldout_share: H as a share of ``num_samples``; at least one window is held out.
        seed: Seed of the drawing.
        vocab_rows: Rows of the model's embedding.

    Raises:
        InputRefused: E-CALIBRATION-SHORT: the text does not fill two windows, or no document is longer than one;
            E-TOKEN-OUT-OF-RANGE: the text has tokens that the model has no row for.
    """
    if seqlen < 2:
        raise ValueError(f"a window needs at least 2 tokens, got {seqlen}")
    heldout = max(1, round(num_samples * heldout_share))
    if sampler == "strict":
        drawn = strict_windows(text, tokenizer, count=num_samples, heldout=heldout, seqlen=seqlen, seed=seed)
        ids, held = drawn.ids, drawn.heldout
        facts: dict[str, Any] = {"bos": drawn.bos, "join": "none", "documents_used": drawn.documents}
    else:
        total = max(2, num_samples)
        chunks, facts = _joined(text, tokenizer, total, seqlen, seed)
        ids, held = _split(chunks, heldout_share, text, seqlen)
    refuse_ids_beyond((max(window) for window in (*ids, *held)), vocab_rows)
    protocol = {
        "sampler": sampler,
        "window_tokens": seqlen,
        "windows": len(ids),
        "heldout_windows": len(held),
        "requested_windows": num_samples,
        "documents": len(text.documents),
        **facts,
        "seed": seed,
    }
    first, second = torch.tensor(ids, dtype=torch.int64), torch.tensor(held, dtype=torch.int64)
    digest = _digest(first, second)
    return Windows(first, second, {**protocol, "sha256": digest}, digest)


def _digest(ids: Tensor, heldout: Tensor) -> str:
    """Hex digest of the shapes and ids of both kinds of windows."""
    found = hashlib.sha256()
    for windows in (ids, heldout):
        found.update((",".join(map(str, windows.shape)) + ";").encode())
    for windows in (ids, heldout):
        found.update(windows.numpy().astype("<i8").tobytes())
    return found.hexdigest()


def _split(
    chunks: list[list[int]], heldout_share: float, text: TextSource, seqlen: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Windows to work on and held-out ones, the last."""
    if len(chunks) < 2:
        raise InputRefused(
            "E-CALIBRATION-SHORT",
            f"{text.spec} fills {len(chunks)} windows of {seqlen} tokens, at least 2 are needed (one is held out)",
            "give a longer text with --calibration, or shorter windows with --seqlen",
        )
    held = min(max(1, round(len(chunks) * heldout_share)), len(chunks) - 1)
    return chunks[:-held], chunks[-held:]


def _joined(
    text: TextSource, tokenizer: Any, total: int, seqlen: int, seed: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """At most ``total`` windows of one stream, and how it was made."""
    rng = random.Random(seed)
    bos = adds_bos(tokenizer)
    stream = [tokenizer.bos_token_id] if bos else []
    if text.kind == "text":
        stretch = stretch_of(text.documents[0], total * seqlen, rng)
        stream += tokenizer(stretch, add_special_tokens=False, verbose=False)["input_ids"]
        chunks = _cut(stream, seqlen)
        if len(chunks) > total:
            # In the order of the text, so that what is held out is its last part.
            chunks = [chunks[place] for place in sorted(rng.sample(range(len(chunks)), total))]
        return chunks, {"bos": _bos_words(bos), "join": "single text", "documents_used": 1}
    used = 0
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for tokens in _tokenized(_shuffled(text.documents, rng), tokenizer):
        stream += (separator if used else []) + tokens
        used += 1
        if len(stream) >= total * seqlen:
            break
    join = (
        f"end-of-text token {tokenizer.eos_token}"
        if separator
        else "nothing (the tokenizer has no end-of-text token)"
    )
    return _cut(stream, seqlen)[:total], {"bos": _bos_words(bos), "join": join, "documents_used": used}


def _shuffled(documents: Sequence[str], rng: random.Random) -> list[str]:
    filled = [document for document in documents if document.strip()]
    rng.shuffle(filled)
    return filled


def _tokenized(documents: Sequence[str], tokenizer: Any) -> Iterator[list[int]]:
    """The tokens of each document, without special ones; a few documents are tokenized ahead."""
    for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
        batch = documents[start : start + _DOCUMENTS_PER_CALL]
        yield from tokenizer(list(batch), add_special_tokens=False, verbose=False)["input_ids"]


def _cut(stream: list[int], seqlen: int) -> list[list[int]]:
    """The stream in windows that do not overlap; the tail that fills none is dropped."""
    return [stream[start : start + seqlen] for start in range(0, len(stream) - seqlen + 1, seqlen)]


def _bos_words(bos: bool) -> str:
    return "once, at the start of the stream" if bos else "none"
