"""A process that measures one model: ``python -m validators.speed.worker``.

One JSON object per line comes in and one goes out, and between two of them the process sleeps: so several models can
be loaded and take turns, each in a memory of its own, without disturbing each other. Native code that crashes on a
file takes this process with it and not its parent. It ends when its standard input does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from validators.causal_lm import CausalLM
from validators.errors import ValidationError, ValidationResourceError
from validators.session import (
    BoundSession,
    Session,
    import_onnxruntime,
    is_out_of_memory,
    out_of_memory,
    packed_runtime,
    to_float32,
)
from validators.speed.bandwidth import Reader
from validators.speed.quantised import quantise
from validators.speed.resident import anonymous_bytes, mapped_bytes


class Worker:
    """What this process holds: one model, or the buffer by which bandwidth is measured."""

    def __init__(self) -> None:
        self._model: CausalLM | None = None
        self._reader: Reader | None = None
        self._vocabulary = 1
        self._anonymous_before: int | None = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request: ``do`` names a method, the rest are its arguments."""
        methods: dict[str, Callable[..., dict[str, Any]]] = {
            "load": self.load,
            "turn": self.turn,
            "memory": self.memory,
            "open_reader": self.open_reader,
            "read": self.read,
            "quantise": self.quantise,
        }
        return methods[request.pop("do")](**request)

    def load(self, path: str, threads: int, packed: bool, require_library: bool) -> dict[str, Any]:
        """Load a model; ``load_s`` is what ONNX Runtime took.

        Args:
            path: The ``.onnx`` file.
            threads: Threads of ONNX Runtime.
            packed: Whether it has operators of the library, which is then used if it is installed.
            require_library: Refuse to run them without it.

        Raises:
            ValidationResourceError: E-BENCH-LIBRARY.
            ValidationError: E-BENCH-NO-CACHE, and what ``Session`` and ``CausalLM`` raise.
        """
        import_onnxruntime()  # before memory is looked at: the module itself is nobody's model
        lacking = packed_runtime() if packed else None
        if lacking is not None and require_library:
            raise ValidationResourceError(
                "E-BENCH-LIBRARY",
                f"{Path(path).name}: packed weights need the operator library, and {lacking}",
                "pip install blockpress-runtime, or leave out --require-library",
            )
        library = packed and lacking is None
        gc.collect()
        self._anonymous_before = anonymous_bytes()
        session = Session(Path(path), "CPU", library=library, threads=threads)
        self._model = CausalLM(session)
        if not self._model.cache:
            raise ValidationError(
                "E-BENCH-NO-CACHE",
                f"{Path(path).name}: the graph has no KV cache, so it cannot decode token by token",
                "export it as text-generation-with-past",
            )
        return {
            "load_s": session.load_s,
            "library": _library_version() if library else None,
            "notices": list(session.notices),
        }

    def turn(self, batch: int, prompt_tokens: int, decode_tokens: int, seed: int) -> dict[str, Any]:
        """Prefill a prompt of random tokens, then decode random tokens one by one; seconds of each.

        Inputs are made before the clock runs. The next token is looked for in the logits, as a server does, but a
        random one is fed: so every model computes the same, whatever it would have said. A cache that the graph can
        extend in place gets room for all tokens, as a part of the prefill.
        """
        assert self._model is not None
        model = self._model
        ids = np.random.default_rng(seed).integers(
            0, self._vocabulary, (batch, prompt_tokens + decode_tokens), np.int64
        )
        mask = np.ones_like(ids)
        past: dict[str, Any] = {}
        roomy: BoundSession | None = None
        stops = [prompt_tokens, *range(prompt_tokens + 1, prompt_tokens + decode_tokens + 1)]
        seconds, start = [], 0
        for stop in stops:
            feeds = model.feeds(ids[:, start:stop], mask[:, :stop])
            began = time.perf_counter()
            if roomy is not None:
                logits = roomy.run(feeds)
            else:
                logits, past = model.step(feeds, past)
                roomy = model.with_room(past, stops[-1]) if model.has_cache_room else None
            to_float32(logits)[:, -1].argmax(axis=-1)
            seconds.append(time.perf_counter() - began)
            start = stop
        self._vocabulary = int(logits.shape()[-1])  # 1 until a first turn has told it
        return {"prefill_s": seconds[0], "step_s": seconds[1:], "vocabulary": self._vocabulary}

    def memory(self, files: list[str]) -> dict[str, Any]:
        """Resident memory: what loading and running have added of its own, and the pages of the model's files.

        Pages of files that are mapped are not the process's own: they are read again where memory is short.
        """
        after = anonymous_bytes()
        added = None if after is None or self._anonymous_before is None else after - self._anonymous_before
        return {
            "anonymous_bytes": None if added is None else max(0, added),
            "mapped_bytes": mapped_bytes([Path(file) for file in files]),
        }

    def open_reader(self, threads: int, size_bytes: int | None) -> dict[str, Any]:
        """Make the buffer by which bandwidth is measured."""
        self._reader = Reader(threads, size_bytes)
        return {}

    def read(self) -> dict[str, Any]:
        """Bytes per second of reading it once."""
        assert self._reader is not None
        return {"bytes_per_s": self._reader.read()}

    def quantise(self, form: str, source: str, target: str) -> dict[str, Any]:
        """Make a quantised baseline; here, because it takes several times the model's size in memory."""
        quantise(form, Path(source), Path(target))
        return {}


def _library_version() -> str:
    try:
        return metadata.version("blockpress-runtime")
    except metadata.PackageNotFoundError:  # run from its source folder
        return "of unknown version"


def main() -> None:
    """Answer requests until there are no more."""
    answers = _own_stdout()
    worker = Worker()
    for line in sys.stdin:
        answers.write(json.dumps(_outcome(worker, json.loads(line))) + "\n")
        answers.flush()


def _outcome(worker: Worker, request: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error as its parts."""
    from exporters.errors import ReportedError

    try:
        return {"answer": worker.answer(request)}
    except ReportedError as error:
        return _error(error)
    except Exception as error:
        if is_out_of_memory(error):
            return _error(out_of_memory("while a model was measured"))
        return {"broken": traceback.format_exc()}


def _error(error: Any) -> dict[str, Any]:
    parts = {name: getattr(error, name) for name in ("error_id", "message", "remedy", "exit_code")}
    return {"error": parts}


def _own_stdout() -> TextIO:
    """The pipe to the parent; whatever else in this process prints goes to standard error from now on."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


if __name__ == "__main__":
    main()
