"""Tiny models as folders on the disk, with a tokenizer of their own and a text that it can read.

A run needs a checkpoint, a calibration text and an evaluation text. All three are made here, the same for the
same arguments, so that no test needs a file from elsewhere.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import architectures
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from compressor.recipe import Recipe
from compressor.recipe_file import read_recipe

# A place in the vocabulary is its token id; the configs of `architectures` name the first three.
SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>")
TOKENS = 96  # fewer than the rows of the embedding, as in models whose vocabulary is padded

_NAMES = ("anna", "ben", "clara", "david", "ella", "frank", "greta", "henry")
_VERBS = ("finds", "sees", "takes", "likes", "paints", "hides", "sells", "wants")
_ADJECTIVES = ("red", "small", "old", "quick", "quiet", "green", "heavy", "bright")
_THINGS = ("boat", "house", "apple", "table", "garden", "letter", "window", "kite")
_PLACES = ("by the river", "in the town", "under a tree", "near the hill")


@dataclass(frozen=True)
class Texts:
    """A calibration and an evaluation file, one JSON document a line."""

    calibration: Path
    evaluation: Path


def documents(count: int, seed: int) -> list[str]:
    """`count` short stories, the same for the same seed."""
    rng = random.Random(seed)
    return [" ".join(_sentence(rng) for _ in range(rng.randint(4, 9))) for _ in range(count)]


def write_texts(folder: Path) -> Texts:
    """The two text files, written into `folder`."""
    texts = Texts(folder / "calibration.jsonl", folder / "evaluation.jsonl")
    for path, count, seed in ((texts.calibration, 60, 1), (texts.evaluation, 20, 2)):
        lines = (json.dumps({"text": document}) for document in documents(count, seed))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return texts


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-pair tokenizer for the words of the documents, with fewer tokens than the models have rows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=list(SPECIAL_TOKENS), show_progress=False)
    tokenizer.train_from_iterator(documents(60, seed=1), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def save_model(folder: Path, model: Any) -> Path:
    """Write `model` and the tiny tokenizer as a checkpoint; returns the folder."""
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_variant(folder: Path, name: str, **overrides: Any) -> Path:
    """Write a random model of one variant and the tiny tokenizer as a checkpoint; returns the folder."""
    return save_model(folder, architectures.build(name, **overrides))


def short_recipe(texts: Texts, **overrides: Any) -> Recipe:
    """A recipe that takes a second: few and short windows, one epoch block by block, a fixed learning rate.

    Keyword names are dotted keys with two underscores in the place of the dot: `pruning__pattern="2:4"`.
    """
    settings = {
        "calibration.source": str(texts.calibration),
        "calibration.num_samples": 10,
        "calibration.seqlen": 24,
        "evaluation.source": str(texts.evaluation),
        "evaluation.max_windows": 8,
        "pruning.method": "wanda",
        "finish.method": "none",
        "recovery.epochs": 1,
        "recovery.batch_size": 4,
        "recovery.lr": 1e-3,
    }
    if overrides.get("recovery__method", "ebft") == "ebft":
        settings["recovery.window"] = "block"
    settings.update({key.replace("__", "."): value for key, value in overrides.items()})
    if not {"pruning.sparsity", "pruning.pattern"} & settings.keys():
        settings["pruning.sparsity"] = 0.5
    return read_recipe(None, settings)


def _sentence(rng: random.Random) -> str:
    name, verb, adjective, thing = (rng.choice(words) for words in (_NAMES, _VERBS, _ADJECTIVES, _THINGS))
    place = f" {rng.choice(_PLACES)}" if rng.random() < 0.5 else ""
    return f"{name} {verb} the {adjective} {thing}{place}."
