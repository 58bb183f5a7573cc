"""What a tokenizer can emit, against what a model has rows for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from compressor.errors import InputRefused

__all__ = ["adds_bos", "refuse_ids_beyond", "refuse_tokenizer_beyond"]

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer itself puts its BOS token before a text."""
    bos = tokenizer.bos_token_id
    return bos is not None and list(tokenizer("a")["input_ids"])[:1] == [bos]


def refuse_tokenizer_beyond(tokenizer: Any, vocab_rows: int) -> None:
    """Refuse a tokenizer with a token that the embedding has no row for.

    A special token without a role (such as the image placeholder that Gemma's text-only checkpoints carry) is
    passed over: no text has it unless it spells it out, and then ``refuse_ids_beyond`` sees it.

    Raises:
        InputRefused: E-TOKEN-OUT-OF-RANGE.
    """
    with_role = {getattr(tokenizer, f"{role}_token_id", None) for role in _ROLES}
    placeholders = {
        token
        for token, added in getattr(tokenizer, "added_tokens_decoder", {}).items()
        if added.special and token not in with_role
    }
    beyond = {
        token: text
        for text, token in tokenizer.get_vocab().items()
        if token >= vocab_rows and token not in placeholders
    }
    if beyond:
        first = min(beyond)
        raise _out_of_range(f"{first} ({beyond[first]!r})", vocab_rows)


def refuse_ids_beyond(ids: Iterable[int], vocab_rows: int) -> None:
    """Refuse token ids that the embedding has no row for.

    Raises:
        InputRefused: E-TOKEN-OUT-OF-RANGE.
    """
    largest = max(ids, default=0)
    if largest >= vocab_rows:
        raise _out_of_range(str(largest), vocab_rows)


def _out_of_range(token: str, vocab_rows: int) -> InputRefused:
    return InputRefused(
        "E-TOKEN-OUT-OF-RANGE",
        f"the tokenizer can emit token {token}, the embedding has {vocab_rows} rows",
        "use the tokenizer that belongs to the model",
    )
