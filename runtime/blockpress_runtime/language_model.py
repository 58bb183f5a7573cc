"""An exported causal language model, token by token over its KV cache; and the files that lie beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blockpress_runtime.library import BlockpressRuntimeError, import_onnxruntime, session

Floats = NDArray[np.float32]

_FLOATS = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_INTEGERS = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}
_PLAIN_INPUTS = ("input_ids", "attention_mask", "position_ids")
# In the metadata of a file: "1" where new keys and values may be written into room behind the past ones (ATTENTION.md).
_CACHE_ROOM = "blockpress.cache_room"
_LEAST_ROOM = 256  # tokens
# The graph gives logits for every token that goes in: with a long prompt and a large vocabulary that is much memory.
_TOKENS_AT_ONCE = 128


@dataclass(frozen=True)
class ModelFiles:
    """A model and what lies beside it.

    Attributes:
        model: The ``.onnx`` file.
        tokenizer: ``tokenizer.json``.
        end_tokens: Tokens after which a text is complete.
        max_tokens: The longest sequence that the model knows positions for; None where its config does not say.
    """

    model: Path
    tokenizer: Path
    end_tokens: frozenset[int]
    max_tokens: int | None


def find_files(path: Path) -> ModelFiles:
    """The files of a model: ``path`` is its folder, or its ``.onnx`` file.

    The tokenizer is looked for beside the file, then in the folder ``NAME.hf`` that ``compress run`` leaves.

    Raises:
        BlockpressRuntimeError: The model or its tokenizer is not there.
    """
    model = _model_in(path) if path.is_dir() else path
    if not model.is_file():
        raise BlockpressRuntimeError(
            f"there is no file {model}: give an .onnx file or the folder that holds one"
        )
    for folder in (model.parent, model.with_suffix(".hf")):
        tokenizer = folder / "tokenizer.json"
        if tokenizer.is_file():
            configs = [_config(folder / name) for name in ("generation_config.json", "config.json")]
            return ModelFiles(model, tokenizer, _end_tokens(configs), _max_tokens(configs))
    raise BlockpressRuntimeError(f"no tokenizer.json was found beside {model}: copy the model's own there")


class LanguageModel:
    """The model in a session, and the tokens that it has read."""

    def __init__(self, path: Path, **options: Any) -> None:
        """Load ``path``; ``options`` are those of :func:`blockpress_runtime.session`.

        Raises:
            BlockpressRuntimeError: ONNX Runtime or the library is missing, or the graph is no causal language model.
        """
        self._session = session(path, **options)
        self._ort = import_onnxruntime()
        self._inputs = {port.name: port for port in self._session.get_inputs()}
        outputs = [port.name for port in self._session.get_outputs()]
        self._cache = {name: _present(name) for name in self._inputs if name not in _PLAIN_INPUTS}
        missing = [name for name in ("logits", *self._cache.values()) if name not in outputs]
        if "input_ids" not in self._inputs or missing:
            raise BlockpressRuntimeError(
                f"{path} is no causal language model: input_ids, logits and, for every past_key_values.N.key or "
                f".value, a present one are expected; missing: {', '.join(missing) or 'input_ids'}"
            )
        self._past = {name: self._empty(self._inputs[name]) for name in self._cache}
        self._extends = self._session.get_modelmeta().custom_metadata_map.get(_CACHE_ROOM) == "1"
        self._room = 0  # tokens that the cache has places for, where it is extended in place
        self._binding: Any = None  # of such a cache
        self.read: list[int] = []

    def next_logits(self, tokens: Sequence[int]) -> Floats:
        """The logits (V,) of what follows after ``tokens`` (at least one) are read too.

        Raises:
            BlockpressRuntimeError: The graph does not run.
        """
        if not tokens:
            raise ValueError("at least one token is needed")
        if not self._cache:
            return self._run([*self.read, *tokens], 0)
        for start in range(0, len(tokens), _TOKENS_AT_ONCE):
            logits = self._run(list(tokens[start : start + _TOKENS_AT_ONCE]), len(self.read))
        return logits

    def _run(self, tokens: list[int], read: int) -> Floats:
        """One run on tokens that follow after ``read`` others, which the cache holds."""
        total = read + len(tokens)
        plain = {
            "input_ids": np.array([tokens]),
            "attention_mask": np.ones((1, total)),
            "position_ids": np.arange(read, total)[None],
        }
        feeds = {name: self._value(array, name) for name, array in plain.items() if name in self._inputs}
        try:
            # Only a first run tells how many heads the cache has.
            logits = self._extend(feeds, total) if self._extends and read else self._grow(feeds)
        except Exception as error:  # ONNX Runtime's exceptions share no base class but Exception
            raise BlockpressRuntimeError(f"the model does not run: {error}") from error
        self.read = [*self.read[:read], *tokens]
        return np.asarray(logits.numpy()[0, -1], np.float32)

    def _grow(self, feeds: dict[str, Any]) -> Any:
        """A run that makes a cache with the new tokens behind the past ones."""
        names = ["logits", *self._cache.values()]
        logits, *presents = self._session.run_with_ort_values(names, {**feeds, **self._past})
        self._past = dict(zip(self._cache, presents, strict=True))
        return logits

    def _extend(self, feeds: dict[str, Any], total: int) -> Any:
        """A run that writes the new tokens into the cache, which has places for all ``total``."""
        if total > self._room:
            self._make_room(max(_LEAST_ROOM, 2 * total))
        for name, value in feeds.items():
            self._binding.bind_ortvalue_input(name, value)
        self._binding.bind_output("logits")
        self._session.run_with_iobinding(self._binding)
        # The one output without a wrapper for each of the others, which take 0.2 ms in a model of 18 blocks.
        return self._binding.get_outputs_as_ortvaluevector()[0]

    def _make_room(self, tokens: int) -> None:
        """Move the cache to where there is room for so many tokens."""
        self._binding = self._session.io_binding()
        self._binding.bind_output("logits")
        for name, present in self._cache.items():
            array = self._past[name].numpy()
            roomy = np.zeros((*array.shape[:2], tokens, array.shape[3]), array.dtype)
            roomy[:, :, : array.shape[2]] = array
            self._past[name] = self._ort.OrtValue.ortvalue_from_numpy(roomy)
            self._binding.bind_ortvalue_input(name, self._past[name])
            self._binding.bind_ortvalue_output(present, self._past[name])
        self._room = tokens

    def _value(self, array: NDArray[Any], name: str) -> Any:
        dtype = _INTEGERS.get(self._inputs[name].type)
        if dtype is None:
            raise BlockpressRuntimeError(
                f"input {name} of type {self._inputs[name].type} is none of whole numbers"
            )
        return self._ort.OrtValue.ortvalue_from_numpy(array.astype(dtype))

    def _empty(self, port: Any) -> Any:
        """A cache of no tokens: (1, heads, 0, head size); symbols are taken as 1, as Concat ignores what is empty."""
        if port.type not in _FLOATS or len(port.shape) != 4:
            raise BlockpressRuntimeError(
                f"input {port.name} of type {port.type} and {len(port.shape)} axes is no key-value cache"
            )
        heads, size = (side if isinstance(side, int) else 1 for side in (port.shape[1], port.shape[3]))
        return self._ort.OrtValue.ortvalue_from_numpy(np.zeros((1, heads, 0, size), _FLOATS[port.type]))


def _present(past: str) -> str:
    """``present.0.key`` for ``past_key_values.0.key``."""
    return "present" + past[past.find(".") :] if "." in past else past


def _model_in(folder: Path) -> Path:
    models = sorted(folder.glob("*.onnx"))
    if folder / "model.onnx" in models or not models:
        return folder / "model.onnx"
    if len(models) > 1:
        names = ", ".join(model.name for model in models)
        raise BlockpressRuntimeError(f"{folder} holds several models ({names}): name one of them")
    return models[0]


def _config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BlockpressRuntimeError(f"{path} is not JSON: {error}") from error
    return config if isinstance(config, dict) else {}


def _end_tokens(configs: list[dict[str, Any]]) -> frozenset[int]:
    """``eos_token_id`` of the first config that has one: a number or a list."""
    for config in configs:
        found = config.get("eos_token_id")
        if isinstance(found, int):
            return frozenset([found])
        if isinstance(found, list):
            return frozenset(token for token in found if isinstance(token, int))
    return frozenset()


def _max_tokens(configs: list[dict[str, Any]]) -> int | None:
    for config in configs:
        found = config.get("max_position_embeddings")
        if isinstance(found, int) and found > 0:
            return found
    return None
