"""What lm-eval's own models make of tasks; run by an interpreter that has lm-eval.

`python lm_eval_scores.py REQUEST.json ANSWER.json`: the request is a list of the keyword arguments of `scores`, the
answer a list of what it returned.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager


def scores(
    model: str, model_args: dict[str, Any], tasks: list[str], folder: str
) -> dict[str, dict[str, float]]:
    """Zero-shot figures by task and metric, by the model type that lm-eval has under the name `model`."""
    os.chdir(folder)  # the data files are named from there
    found = lm_eval.simple_evaluate(
        model=model,
        model_args=model_args,
        tasks=tasks,
        num_fewshot=0,
        batch_size=1,
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=folder, include_defaults=False),
    )
    return {
        task: {key.removesuffix(",none"): value for key, value in figures.items() if key.endswith(",none")}
        for task, figures in found["results"].items()
    }


def main(request: str, answer: str) -> None:
    """Answer the request."""
    wanted = json.loads(Path(request).read_text(encoding="utf-8"))
    answers = [scores(**one) for one in wanted]
    Path(answer).write_text(json.dumps(answers), encoding="utf-8")


if __name__ == "__main__":
    main(*map(os.path.abspath, sys.argv[1:]))
