"""config.json is hostile input: what it may hold is checked here, before transformers sees it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.errors import InputRefused
from exporters.plain_files import read_plain

__all__ = ["read_json_object", "read_settings"]

MAX_FILE_BYTES = 16 * 2**20
MAX_DEPTH = 32

# Far above any model in existence, far below what an allocation by size alone would need to do harm.
_SIZE_LIMITS = {
    2**10: ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    2**14: (
        "num_attention_heads",
        "num_key_value_heads",
        "n_head",
        "num_heads",
        "num_kv_heads",
        "num_labels",
    ),
    2**15: ("num_experts", "num_local_experts", "num_experts_per_tok", "head_dim"),
    2**18: ("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "moe_intermediate_size"),
    2**22: ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"),
    2**24: ("vocab_size",),
    2**28: ("max_position_embeddings", "n_positions", "n_ctx", "sliding_window"),
}
_LIMIT_OF = {key: limit for limit, keys in _SIZE_LIMITS.items() for key in keys}
_LARGEST_INTEGER = 2**53
# A key that may be zero or null: it switches something off.
_MAY_BE_ZERO = frozenset({"num_labels", "sliding_window"})

_IMPLEMENTATIONS = frozenset(
    {"_attn_implementation", "_attn_implementation_internal", "attn_implementation"}
    | {"_experts_implementation", "_experts_implementation_internal", "experts_implementation"}
)
# Keys with an underscore that transformers itself writes, or once wrote, and that choose no code.
_HARMLESS_PRIVATE: dict[str, type | tuple[type, ...]] = {
    "_name_or_path": str,
    "_commit_hash": (str, type(None)),
    "_from_model_config": bool,
    "_attn_implementation_autoset": bool,
    "_sliding_window_pattern": (int, type(None)),
    "_remove_final_layer_norm": bool,
    "__float__": str,  # how transformers spells Infinity
}


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        InputRefused: E-CONFIG-SYNTAX: not a JSON object in UTF-8, one key twice, a NaN, nested or large beyond reason.
    """
    try:
        text = read_plain(path, MAX_FILE_BYTES).decode("utf-8")
        content = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_constant)
    except (OSError, ValueError, RecursionError) as error:
        raise InputRefused(
            "E-CONFIG-SYNTAX", f"{path.name} cannot be read: {_first_line(error)}", "fetch the file again"
        ) from None
    if not isinstance(content, dict):
        raise InputRefused(
            "E-CONFIG-SYNTAX", f"{path.name} must hold one JSON object", "fetch the file again"
        )
    return content


def read_settings(path: Path) -> dict[str, Any]:
    """The content of a ``config.json``, safe to hand to transformers.

    ``auto_map`` may stand in it: many checkpoints of architectures that transformers knows carry it, and it
    has no effect unless the user trusts the checkpoint's code.

    Raises:
        InputRefused: E-CONFIG-SYNTAX; E-CONFIG-UNSAFE: a key reaches into the loader or names code to run;
            E-CONFIG-SIZE: a size is no whole number within reason; E-CONFIG-INVALID: architectures is no list of names.
    """
    settings = read_json_object(path)
    for where, key, value in _entries(settings, path.name):
        _refuse_unsafe(where, key, value)
        _refuse_absurd(where, key, value)
    names = settings.get("architectures")
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputRefused(
            "E-CONFIG-INVALID",
            f"{path.name}: architectures must be a list of class names, got {repr(names)[:80]}",
            "fetch it again",
        )
    return settings


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        raise ValueError("a key stands twice")
    return unique


def _constant(name: str) -> float:
    if name == "NaN":  # which no comparison refuses; an infinite limit may be meant
        raise ValueError("a value is NaN")
    return float(name)


def _entries(node: Any, where: str, depth: int = 0) -> Iterator[tuple[str, str, Any]]:
    """Every (place, key, value) of a JSON tree; list items carry their list's key."""
    if depth > MAX_DEPTH:
        raise InputRefused(
            "E-CONFIG-SYNTAX", f"{where} is nested deeper than {MAX_DEPTH} levels", "fetch the file again"
        )
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield f"{where}: {key}", str(key), value
            yield from _entries(value, f"{where}: {key}", depth + 1)
    elif isinstance(node, list):
        for value in node:
            if isinstance(value, (Mapping, list)):
                yield from _entries(value, where, depth + 1)
            else:
                yield where, "", value


def _refuse_unsafe(where: str, key: str, value: Any) -> None:
    if key in _IMPLEMENTATIONS:
        # A name with a slash would make transformers fetch a kernel from the hub and run it.
        if value is not None and not (isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{1,64}", value)):
            raise _unsafe(where, f"names code to fetch ({str(value)[:80]!r})")
    elif key.startswith("_"):
        allowed = _HARMLESS_PRIVATE.get(key)
        if allowed is None or not isinstance(value, allowed):
            raise _unsafe(where, "reaches into the loader")
    elif key in ("trust_remote_code", "custom_pipelines", "kernel_config", "use_kernels") and value:
        raise _unsafe(where, "asks to run code")
    elif key == "transformers_weights" and value is not None:
        raise _unsafe(where, f"names other weights than those that are checked ({str(value)[:80]!r})")
    elif key == "auto_map" and not isinstance(value, (Mapping, type(None))):
        raise _unsafe(where, "is no mapping")


def _refuse_absurd(where: str, key: str, value: Any) -> None:
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise _absurd(where, value)
    limit = _LIMIT_OF.get(key)
    if limit is None or value is None:
        return
    least = 0 if key in _MAY_BE_ZERO else 1
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= limit:
        raise _absurd(where, value, limit)


def _unsafe(where: str, what: str) -> InputRefused:
    return InputRefused(
        "E-CONFIG-UNSAFE",
        f"{where} {what}",
        "take the key out of the file if you know what it does, or use another checkpoint",
    )


def _absurd(where: str, value: Any, limit: int = _LARGEST_INTEGER) -> InputRefused:
    return InputRefused(
        "E-CONFIG-SIZE",
        f"{where} must be a whole number of at most {limit}, got {str(value)[:40]}",
        "fetch the file again",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
