"""`compress validate` and `compress compare` with the real lm-eval-harness, on the example model and local tasks.

lm-eval is an optional extra. Name an interpreter that has it and this project in BLOCKPRESS_LM_EVAL_PYTHON to run
these tests; `lm-eval[hf]` brings what lm-eval's own PyTorch model needs, which is compared with ours:

    python -m venv lm-eval-env
    lm-eval-env/bin/pip install -c constraints.txt torch
    lm-eval-env/bin/pip install -c constraints.txt -e '.[gpu,eval]' 'lm-eval[hf]'
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models

INTERPRETER = os.environ.get("BLOCKPRESS_LM_EVAL_PYTHON")
ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "tiny-llm"
MAX_TOKENS = 256  # the example model's positions

pytestmark = pytest.mark.skipif(
    not INTERPRETER, reason="BLOCKPRESS_LM_EVAL_PYTHON names no interpreter that has lm-eval"
)

QUESTIONS = [
    ("Return the number of items in a", " list", " banana", 0),
    ("If the argument is not given, then the", " default value", " river", 0),
    ("Return True if the", " soup is warm", " object", 1),
    ("The default value is", " None", " purple", 0),
    ("Open a file for", " singing", " reading and writing", 1),
    ("Raises ValueError if the", " argument is", " moon is", 0),
    ("Return the number of items in a", " list", " banana", 1),  # no model should have this one right
]
CHOICES = """
task: next_words
dataset_path: json
dataset_kwargs: {data_files: {test: next_words.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ENDINGS = """
task: endings
dataset_path: json
dataset_kwargs: {data_files: {test: next_words.jsonl}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
ROLLING = """
task: long_text
dataset_path: json
dataset_kwargs: {data_files: {test: long_text.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
GENERATING = """
task: writes
dataset_path: json
dataset_kwargs: {data_files: {test: next_words.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[answer]}}"
metric_list: [{metric: exact_match}]
"""


@dataclass(frozen=True)
class Exports:
    """The example model, pruned: as a file with its PyTorch folder, and as a folder."""

    file: Path
    folder: Path
    text: Path
    tasks: Path

    @property
    def reference(self) -> Path:
        """The PyTorch sparse model."""
        return self.file.with_suffix(".hf")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Exports of the example model, an evaluation text of several windows, and local tasks."""
    from compressor import compress

    root = tmp_path_factory.mktemp("lm-eval")
    made = Exports(root / "sparse.onnx", root / "folder", root / "evaluation.txt", root / "tasks")
    recipe = tiny_models.short_recipe(tiny_models.write_texts(root), recovery__method="none")
    for out in (made.file, made.folder):
        compress(EXAMPLE, out, recipe, validate=False)
    words = (ROOT / "LICENSE").read_text(encoding="utf-8")
    made.text.write_text(words[:6000], encoding="utf-8")
    made.tasks.mkdir()
    yamls = {"next_words": CHOICES, "endings": ENDINGS, "long_text": ROLLING, "writes": GENERATING}
    for name, yaml in yamls.items():
        (made.tasks / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    rows = [{"question": q, "choices": [a, b], "answer": n} for q, a, b, n in QUESTIONS]
    texts = [{"text": words[:3000]}, {"text": words[3000:3100]}]
    for name, documents in {"next_words": rows, "long_text": texts}.items():
        lines = "".join(json.dumps(row) + "\n" for row in documents)
        (made.tasks / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return made


def run(scratch: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A command of the interpreter with lm-eval, on this checkout, its caches in ``scratch``."""
    caches = {"HF_HOME": str(scratch / "hf"), "BLOCKPRESS_CACHE": str(scratch / "cache")}
    return subprocess.run(
        [str(INTERPRETER), *map(str, arguments)],
        cwd=scratch, env={**os.environ, "PYTHONPATH": str(ROOT), **caches},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def validated(scratch: Path, *arguments: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of ``compress validate`` there."""
    ended = run(scratch, "-m", "compressor", "validate", *arguments, "--json", "-q")
    assert ended.stdout, ended.stderr[-4000:]
    return ended.returncode, json.loads(ended.stdout)


def compared(scratch: Path, exports: Exports, tasks: str) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON document of ``compress compare`` there: magnitude and flap, pruned only."""
    ended = run(
        scratch, "-m", "compressor", "compare", EXAMPLE, "--out", scratch / "compare", "--json", "-q",
        "--pruners", "magnitude,flap", "--recoveries", "none", "--sparsities", "0.3",
        "--num-calibration-samples", "8", "--eval-data", exports.text,
        "--tasks", tasks, "--tasks-folder", exports.tasks,
    )  # fmt: skip
    assert ended.stdout, ended.stderr[-4000:]
    return ended.returncode, json.loads(ended.stdout)


def lm_eval_scores(scratch: Path, wanted: list[dict[str, Any]]) -> list[dict[str, dict[str, float]]]:
    """What lm-eval's own models score."""
    request, answer = scratch / "request.json", scratch / "answer.json"
    request.write_text(json.dumps(wanted), encoding="utf-8")
    ended = run(scratch, Path(__file__).with_name("lm_eval_scores.py"), request, answer)
    assert ended.returncode == 0, ended.stderr[-4000:]
    found: list[dict[str, dict[str, float]]] = json.loads(answer.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("layout", ["file", "folder"])
def test_lm_eval_backend_measures_our_perplexity(exports: Exports, tmp_path: Path, layout: str) -> None:
    """The check is made, required, and passes; on the CPU the figures agree far below the limit."""
    code, document = validated(
        tmp_path, getattr(exports, layout), "--lm-eval", "--eval-data", exports.text,
        "--require", "lm-eval-perplexity",
    )  # fmt: skip
    check = {check["name"]: check for check in document["validation"]["checks"]}["lm-eval-perplexity"]
    print(check["why"])
    assert (code, check["status"], check["limit"]) == (0, "passed", 1e-3)
    assert check["measured"] < 1e-5  # one file, one provider: only float32 sums of 255 logarithms differ


def test_tasks_score_what_lm_eval_scores(exports: Exports, tmp_path: Path) -> None:
    """Figures of the PyTorch model equal those of lm-eval's own model `hf`, and ONNX stands beside them."""
    tasks = ["next_words", "endings", "long_text"]
    code, document = validated(
        tmp_path, exports.file, "--eval-data", exports.text,
        "--tasks", ",".join(tasks), "--tasks-folder", exports.tasks,
    )  # fmt: skip
    assert code == 0, document
    (theirs,) = lm_eval_scores(
        tmp_path,
        [
            {
                "model": "hf",
                "model_args": {
                    "pretrained": str(exports.reference),
                    "dtype": "float32",
                    "device": "cpu",
                    "max_length": MAX_TOKENS,
                },
                "tasks": tasks,
                "folder": str(exports.tasks),
            }
        ],
    )
    rows = {(row["task"], row["metric"]): row for row in document["tasks"]}
    for (task, metric), row in rows.items():
        print(task, metric, theirs[task][metric], row["recovered"], row["onnx"])
    assert {f"{task} {metric}" for task, metric in rows} == {
        "next_words acc", "next_words acc_norm", "endings acc", "endings perplexity",
        "long_text word_perplexity", "long_text byte_perplexity", "long_text bits_per_byte",
    }  # fmt: skip
    for (task, metric), row in rows.items():
        # The same model in float32, its attention computed by the same library: rounding, raised to the power of
        # the tokens per word where it is a word's perplexity.
        assert row["recovered"]["value"] == pytest.approx(theirs[task][metric], rel=1e-4), (task, metric)
        assert row["onnx"]["value"] == pytest.approx(row["recovered"]["value"], rel=1e-4), (task, metric)
    assert rows["endings", "perplexity"]["higher_is_better"] is False
    assert rows["next_words", "acc"]["documents"] == len(QUESTIONS)
    assert rows["next_words", "acc"]["higher_is_better"] is True
    assert rows["next_words", "acc"]["onnx"]["stderr"] is not None


def test_tasks_limit_and_a_folder_without_reference(exports: Exports, tmp_path: Path) -> None:
    """The first documents alone, on the ONNX model alone."""
    code, document = validated(
        tmp_path, exports.folder, "--eval-data", exports.text, "--tasks", "next_words",
        "--tasks-folder", exports.tasks, "--tasks-limit", "2",
    )  # fmt: skip
    assert code == 0, document
    assert {(row["documents"], row["recovered"] is None) for row in document["tasks"]} == {(2, True)}


@pytest.mark.parametrize(
    ("task", "code", "error_id"),
    [
        ("no_such_task", 2, "E-TASK-UNKNOWN"),
        ("writes", 2, "E-TASK-KIND"),
        ("absent", 3, "E-TASK-DATA"),
        ("crooked", 3, "E-TASK-FAILED"),
    ],
)
def test_tasks_that_cannot_be_run_are_refused(
    exports: Exports, tmp_path: Path, task: str, code: int, error_id: str
) -> None:
    """Unknown names, tasks that write, data that are not there, wrong fields: an id each, and no traceback."""
    absent = CHOICES.replace("next_words.jsonl", "no_such_file.jsonl").replace("next_words", "absent")
    # The first document is rendered when the task is loaded; the fifth has a shorter question.
    crooked = CHOICES.replace("{{question}}", "{{question[20]}}").replace("task: next_words", "task: crooked")
    for name, yaml in {"absent": absent, "crooked": crooked}.items():
        (exports.tasks / f"{name}.yaml").write_text(yaml, encoding="utf-8")
    ended, document = validated(
        tmp_path, exports.file, "--eval-data", exports.text, "--tasks", task, "--tasks-folder", exports.tasks
    )
    print(document["error"]["message"])
    assert (ended, document["error"]["id"]) == (code, error_id)


def test_compare_scores_what_lm_eval_scores(exports: Exports, tmp_path: Path) -> None:
    """The dense model's figures equal those of lm-eval's own model `hf`; every cell has as many; a second call none."""
    tasks = ["next_words", "endings", "long_text"]
    code, document = compared(tmp_path, exports, ",".join(tasks))
    assert code == 0, document
    arguments = {"pretrained": str(EXAMPLE), "dtype": "float32", "device": "cpu", "max_length": MAX_TOKENS}
    wanted = {"model": "hf", "model_args": arguments, "tasks": tasks, "folder": str(exports.tasks)}
    (theirs,) = lm_eval_scores(tmp_path, [wanted])
    dense = document["tasks"]["dense"]["results"]
    assert len(dense) == 7
    for row in dense:
        assert row["value"] == pytest.approx(theirs[row["task"]][row["metric"]], rel=1e-4), row
    for cell in document["cells"]:
        assert [row["documents"] for row in cell["scores"]["results"]] == [row["documents"] for row in dense]
        assert cell["scores"]["results"] != dense
    assert compared(tmp_path, exports, ",".join(tasks)) == (0, document)


@pytest.mark.parametrize(
    ("task", "error_id"), [("no_such_task", "E-TASK-UNKNOWN"), ("writes", "E-TASK-KIND")]
)
def test_compare_tasks_that_cannot_be_run_end_it_before_any_cell(
    exports: Exports, tmp_path: Path, task: str, error_id: str
) -> None:
    """An unknown task, or one that writes, is exit 2 and no cell is made."""
    code, document = compared(tmp_path, exports, task)
    assert (code, document["error"]["id"]) == (2, error_id)
    assert [
        row["status"] for row in json.loads((tmp_path / "compare" / "compare.json").read_text())["cells"]
    ] == [
        "open",
        "open",
    ]
