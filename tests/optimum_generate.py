"""Greedy tokens of exported folders in optimum's ORTModelForCausalLM; run by an interpreter that has optimum-onnx.

`python optimum_generate.py REQUEST.json ANSWER.json`: the request is a list of the keyword arguments
of `greedy`, the answer a list of what it returned.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def greedy(folder: str, ids: list[list[int]], mask: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Prompt (B, T) and `new_tokens` tokens generated greedily over the key-value cache."""
    model = ORTModelForCausalLM.from_pretrained(folder, use_cache=True)
    if not model.can_use_cache:
        raise SystemExit(f"{folder}: loaded without a key-value cache")
    made = model.generate(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
    )
    return made.tolist()


def main(request: str, answer: str) -> None:
    """Answer the request."""
    wanted = json.loads(Path(request).read_text(encoding="utf-8"))
    Path(answer).write_text(json.dumps([greedy(**one) for one in wanted]), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
