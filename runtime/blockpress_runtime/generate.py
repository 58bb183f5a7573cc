"""Text from an exported model: ``generate()`` and the command ``blockpress-generate``."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from blockpress_runtime.language_model import Floats, LanguageModel, find_files
from blockpress_runtime.library import BlockpressRuntimeError, import_onnxruntime

_CONTEXT_TOKENS = (
    5  # tokens of the prompt that the first new ones are decoded with: spaces depend on what is before
)
_INCOMPLETE = "\ufffd"  # what a tokenizer gives for bytes that are not yet a whole character


def generate(
    path: str | PathLike[str],
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int = 0,
    seed: int | None = None,
    **options: Any,
) -> Iterator[str]:
    """The text that follows the prompt, in pieces as they come.

    Args:
        path: The model's folder or ``.onnx`` file; ``tokenizer.json`` lies beside it.
        prompt: What the model reads first, as it is: no chat template is put around it.
        max_new_tokens: Tokens at most; a token that ends a text ends it earlier.
        temperature: By what the logits are divided before one token is drawn; 0 takes the likeliest.
        top_k: Draw among so many of the likeliest; 0 for all.
        seed: Of the drawing; None for another text each time.
        options: What :func:`blockpress_runtime.session` takes.

    Raises:
        BlockpressRuntimeError: Something is missing or does not fit, and what to do.
    """
    if temperature < 0 or top_k < 0 or max_new_tokens < 0:
        raise BlockpressRuntimeError("temperature, top_k and max_new_tokens must not be negative")
    files = find_files(Path(path))
    tokenizer = _load_tokenizer(files.tokenizer)
    tokens = tokenizer.encode(prompt).ids
    if not tokens:
        raise BlockpressRuntimeError("the prompt has no tokens: give at least one word")
    if files.max_tokens is not None:
        if len(tokens) > files.max_tokens:
            raise BlockpressRuntimeError(
                f"the prompt has {len(tokens)} tokens, the model reads at most {files.max_tokens}: shorten it"
            )
        max_new_tokens = min(max_new_tokens, files.max_tokens - len(tokens))
    model = LanguageModel(files.model, **options)
    text = _Text(tokenizer, tokens)
    random = np.random.default_rng(seed)
    fresh: Sequence[int] = tokens
    for _ in range(max_new_tokens):
        token = _choose(model.next_logits(fresh), temperature, top_k, random)
        if token in files.end_tokens:
            break
        fresh = [token]
        yield text.add(token)
    yield text.rest()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code: 0, 1 where something is missing or does not fit, 2 for wrong usage."""
    asked = _parser().parse_args(arguments)
    prompt = sys.stdin.read() if asked.prompt == "-" else asked.prompt
    started, pieces = time.perf_counter(), 0
    try:
        options: dict[str, Any] = {}
        if asked.threads:
            options["sess_options"] = import_onnxruntime().SessionOptions()
            options["sess_options"].intra_op_num_threads = asked.threads
        for piece in generate(
            asked.model,
            prompt,
            max_new_tokens=asked.max_new_tokens,
            temperature=asked.temperature,
            top_k=asked.top_k,
            seed=asked.seed,
            **options,
        ):
            print(piece, end="", flush=True)
            pieces += 1
        print()
    except BlockpressRuntimeError as error:
        print(f"blockpress-generate: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print()
        return 130
    if asked.time:
        elapsed_s = time.perf_counter() - started
        print(f"{pieces - 1} tokens in {elapsed_s:.2f} s, loading and prompt included", file=sys.stderr)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="blockpress-generate",
        description="Print the text with which an exported language model goes on.",
    )
    parser.add_argument(
        "model", metavar="FOLDER|MODEL.onnx", help="the exported model; tokenizer.json lies beside it"
    )
    parser.add_argument(
        "--prompt", required=True, help="what the model reads first, as it is; - for standard input"
    )
    parser.add_argument("--max-new-tokens", type=_natural, default=128, metavar="N", help="default: 128")
    parser.add_argument(
        "--temperature",
        type=_not_negative,
        default=0.0,
        metavar="T",
        help="0, the default, takes the likeliest token",
    )
    parser.add_argument(
        "--top-k", type=_natural, default=0, metavar="K", help="draw among the K likeliest; 0: all"
    )
    parser.add_argument("--seed", type=_natural, default=None, metavar="S", help="of the drawing")
    parser.add_argument("--threads", type=_natural, default=0, metavar="N", help="0: ONNX Runtime's choice")
    parser.add_argument("--time", action="store_true", help="say on standard error how long it took")
    return parser


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return number


def _not_negative(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 on")
    return number


def _load_tokenizer(path: Path) -> Any:
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise BlockpressRuntimeError(
            f"tokenizers is not installed ({error}): pip install tokenizers"
        ) from error
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # whatever its Rust side makes of a broken file
        raise BlockpressRuntimeError(f"{path} cannot be read: {error}") from error


def _choose(logits: Floats, temperature: float, top_k: int, random: np.random.Generator) -> int:
    """The next token of logits (V,)."""
    if not np.isfinite(logits).any():
        raise BlockpressRuntimeError("the model gives no finite logits: validate its file")
    if temperature == 0:
        return int(np.nanargmax(logits))
    scores = np.where(np.isnan(logits), -np.inf, logits).astype(np.float64)
    if 0 < top_k < len(scores):
        scores[scores < np.partition(scores, -top_k)[-top_k]] = -np.inf
    weights = np.exp((scores - scores.max()) / temperature)
    return int(random.choice(len(weights), p=weights / weights.sum()))


class _Text:
    """Tokens as text, as far as they are whole characters."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-_CONTEXT_TOKENS:])
        self._shown = len(self._tokens)  # tokens whose text is out

    def add(self, token: int) -> str:
        """What can be shown after this token: nothing where it ends within a character."""
        self._tokens.append(token)
        return "" if self._pending().endswith(_INCOMPLETE) else self.rest()

    def rest(self) -> str:
        """What was not yet shown."""
        pending = self._pending()
        del self._tokens[:-_CONTEXT_TOKENS]
        self._shown = len(self._tokens)
        return pending

    def _pending(self) -> str:
        before = self._tokenizer.decode(self._tokens[: self._shown])
        return str(self._tokenizer.decode(self._tokens))[len(before) :]


if __name__ == "__main__":
    raise SystemExit(main())
