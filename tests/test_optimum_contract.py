"""An exported folder loads in optimum's ORTModelForCausalLM and generates what the PyTorch sparse model does.

optimum-onnx needs an older transformers than this project, so it lives in an environment of its own. Name its
interpreter in BLOCKPRESS_OPTIMUM_PYTHON to run these tests:

    python3.11 -m venv optimum-env
    optimum-env/bin/pip install torch optimum-onnx onnxruntime
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor import compress
from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm

INTERPRETER = os.environ.get("BLOCKPRESS_OPTIMUM_PYTHON")
SCRIPT = Path(__file__).with_name("optimum_generate.py")
EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llm"
NEW_TOKENS = 12

pytestmark = pytest.mark.skipif(
    not INTERPRETER, reason="BLOCKPRESS_OPTIMUM_PYTHON names no interpreter that has optimum-onnx"
)

Rows = list[list[int]]
Prompts = Mapping[str, tuple[Rows, Rows]]  # ids and attention mask by name

# A single sequence longer than a sliding window, and a batch whose first row is padded on the left.
PROMPTS: Prompts = {
    "single": ([[5, 17, 40, 9, 33, 71, 12, 28, 64]], [[1] * 9]),
    "padded": (
        [[0, 0, 0, 21, 8, 54, 33], [7, 61, 14, 90, 11, 36, 25]],
        [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]],
    ),
}


def check_same_tokens(
    model: Path, scratch: Path, prompts: Prompts, attention: str = "sdpa", **settings: Any
) -> None:
    """Prune `model`, export it as a folder, and compare optimum's greedy tokens on it with PyTorch's."""
    texts = tiny_models.write_texts(scratch)
    recipe = tiny_models.short_recipe(texts, recovery__method="none", **settings)
    for out in ("sparse.onnx", "folder"):  # the same weights twice: the first leaves the PyTorch model
        compress(model, scratch / out, recipe, validate=False)
    expected = torch_greedy(scratch / "sparse.hf", prompts, attention)
    for found, name in zip(optimum_greedy(scratch / "folder", prompts), prompts, strict=True):
        assert found == expected[name], name


def torch_greedy(folder: Path, prompts: Prompts, attention: str) -> dict[str, Rows]:
    """What the model in `folder` generates in PyTorch, by prompt."""
    checkpoint = open_checkpoint(folder)
    if checkpoint.structure is None:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=attention
        ).eval()
    else:  # layers with widths of their own, which transformers does not load
        model = load_causal_lm(checkpoint, torch.float32)
    made = {}
    for name, (ids, mask) in prompts.items():
        rows = model.generate(
            input_ids=torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )
        assert rows.shape == (len(ids), len(ids[0]) + NEW_TOKENS)
        made[name] = rows.tolist()
    return made


def optimum_greedy(folder: Path, prompts: Prompts) -> list[Rows]:
    """What the exported folder generates in optimum, in the order of the prompts."""
    wanted = [
        {"folder": str(folder), "ids": ids, "mask": mask, "new_tokens": NEW_TOKENS}
        for ids, mask in prompts.values()
    ]
    request, answer = folder.with_suffix(".request.json"), folder.with_suffix(".answer.json")
    request.write_text(json.dumps(wanted), encoding="utf-8")
    # Without this project's own packages, which that environment must not import.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    ended = subprocess.run(
        [str(INTERPRETER), str(SCRIPT), str(request), str(answer)],
        cwd=folder.parent, env=env, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-4000:]
    made: list[Rows] = json.loads(answer.read_text(encoding="utf-8"))
    return made


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_optimum_generates_the_tokens_of_the_sparse_model(tmp_path: Path, name: str) -> None:
    """Alone and in a left-padded batch, greedy decoding over the cache gives PyTorch's tokens."""
    model = tiny_models.save_variant(tmp_path / name, name)
    check_same_tokens(model, tmp_path, PROMPTS, architectures.ATTENTION.get(name, "sdpa"))


@pytest.mark.parametrize("name", ["mistral", "qwen3", "gpt2"])
@pytest.mark.parametrize("uniform", [True, False])
def test_optimum_generates_the_tokens_of_a_model_without_some_heads(
    tmp_path: Path, name: str, uniform: bool
) -> None:
    """Fewer heads and neurons, as many in every layer or not, decode to PyTorch's tokens as well."""
    model = tiny_models.save_variant(tmp_path / name, name)
    settings = {"pruning__method": "flap", "pruning__sparsity": 0.4, "pruning__flap__uniform": uniform}
    check_same_tokens(model, tmp_path, PROMPTS, **settings)


def test_optimum_generates_the_tokens_of_the_example_model(tmp_path: Path) -> None:
    """The example model, which was trained, gives the same text as in PyTorch."""
    tokenizer = AutoTokenizer.from_pretrained(EXAMPLE, padding_side="left")
    prompts = {}
    for name, texts in {
        "single": ["Return the number of items in a"],
        "padded": ["Open a file", "If the argument is not given, then the default"],
    }.items():
        encoded = tokenizer(texts, padding=True)
        prompts[name] = (encoded["input_ids"], encoded["attention_mask"])
    check_same_tokens(EXAMPLE, tmp_path, prompts)
