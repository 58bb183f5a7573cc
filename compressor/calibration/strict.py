"""The calibration sampler that SparseGPT, Wanda, DSnoT and EBFT share.

Source: ``get_c4`` in the published code of SparseGPT (arXiv 2301.00774) and of those that took it over: a
document is drawn until one has more tokens than the window, then a crop of it; documents may repeat; index
and crop come from one stream of random numbers, so that what is drawn depends on tokenizer and window.
Differences: the drawing ends with an error where no document is long enough, instead of never, and held-out
    windows are drawn afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from compressor.calibration.text import TextSource, stretch_of
from compressor.calibration.tokens import adds_bos
from compressor.errors import InputRefused

__all__ = ["StrictWindows", "strict_windows"]

# Draws without success after which the drawing ends, for each document: a single long one is missed with
# probability exp(-40).
_DRAWS_PER_DOCUMENT = 40


@dataclass(frozen=True)
class StrictWindows:
    """What the sampler drew.

    Attributes:
        ids: Windows to work on.
        heldout: Windows of documents that ``ids`` has nothing of; of a single text, of its last part.
        documents: Documents that were cropped.
        bos: Where BOS tokens stand.
    """

    ids: list[list[int]]
    heldout: list[list[int]]
    documents: int
    bos: str


def strict_windows(
    text: TextSource, tokenizer: Any, *, count: int, heldout: int, seqlen: int, seed: int
) -> StrictWindows:
    """``count`` windows of ``seqlen`` tokens as published, then ``heldout`` more of other documents.

    Raises:
        InputRefused: E-CALIBRATION-SHORT: no document is longer than a window, or none is left to hold out.
    """
    rng = random.Random(seed)
    bos = "where a crop starts at the document's start" if adds_bos(tokenizer) else "none"
    if text.kind == "text":
        ids, held = _of_one_text(text, tokenizer, count, heldout, seqlen, rng)
        return StrictWindows(ids, held, 1, bos)
    lengths: dict[int, list[int] | None] = {}

    def tokens_of(index: int) -> list[int] | None:
        """The document's tokens, ``None`` where it is too short."""
        if index not in lengths:
            tokens = list(tokenizer(text.documents[index], verbose=False)["input_ids"])
            lengths[index] = tokens if len(tokens) > seqlen else None
        return lengths[index]

    used: set[int] = set()
    ids = [_draw(text, tokens_of, seqlen, rng, used, frozenset()) for _ in range(count)]
    taken = frozenset(used)
    held = [_draw(text, tokens_of, seqlen, rng, used, taken) for _ in range(heldout)]
    return StrictWindows(ids, held, len(used), bos)


def _draw(
    text: TextSource,
    tokens_of: Callable[[int], list[int] | None],
    seqlen: int,
    rng: random.Random,
    used: set[int],
    excluded: frozenset[int],
) -> list[int]:
    """A crop of a document that is long enough and not excluded; the document is added to ``used``."""
    last = len(text.documents) - 1
    for _ in range(_DRAWS_PER_DOCUMENT * len(text.documents)):
        index = rng.randint(0, last)
        tokens = tokens_of(index)
        if tokens is not None and index not in excluded:
            used.add(index)
            return _crop(tokens, seqlen, rng)
    if excluded:
        raise _short(f"{text.spec} has no document of more than {seqlen} tokens left to hold out")
    raise _short(f"{text.spec} has no document of more than {seqlen} tokens")


def _crop(tokens: Sequence[int], seqlen: int, rng: random.Random) -> list[int]:
    start = rng.randint(0, len(tokens) - seqlen - 1)
    return list(tokens[start : start + seqlen])


def _of_one_text(
    text: TextSource, tokenizer: Any, count: int, heldout: int, seqlen: int, rng: random.Random
) -> tuple[list[list[int]], list[list[int]]]:
    """Crops of one text; the last part of it, in proportion, is left to the held-out ones."""
    stretch = stretch_of(text.documents[0], (count + heldout) * seqlen, rng)
    tokens = list(tokenizer(stretch, verbose=False)["input_ids"])
    kept_apart = max(seqlen + 1, len(tokens) * heldout // (count + heldout))
    if len(tokens) - kept_apart <= seqlen:
        raise _short(
            f"{text.spec} has {len(tokens)} tokens, windows of {seqlen} need at least {2 * seqlen + 2}"
        )
    front, back = tokens[:-kept_apart], tokens[-kept_apart:]
    ids = [_crop(front, seqlen, rng) for _ in range(count)]
    return ids, [_crop(back, seqlen, rng) for _ in range(heldout)]


def _short(what: str) -> InputRefused:
    return InputRefused(
        "E-CALIBRATION-SHORT",
        what,
        "give longer documents with --calibration, shorter windows with --seqlen, or calibration.sampler: joined",
    )
