"""Model folders for tests: a tiny random model of any variant with a tokenizer that fits it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from architectures import VOCAB, build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compressor.models.quiet import quiet_transformers


def make_tokenizer(size: int = VOCAB, **roles: str) -> PreTrainedTokenizerFast:
    """A byte-like tokenizer of ``size`` tokens: three special ones, then one per printable character."""
    characters = [chr(code) for code in range(32, 32 + size - 3)]
    vocab = {token: place for place, token in enumerate(["<pad>", "<s>", "</s>", *characters])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", **roles}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **named)


def write_checkpoint(
    folder: Path, name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """A model folder of one variant, with its tokenizer; returns the folder."""
    with quiet_transformers():
        build(name, seed=seed, **overrides).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def change_json(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; ``None`` stays ``null``."""
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")
