"""Zero-shot tasks of lm-eval-harness on any model that gives logits: ONNX or PyTorch.

    tasks = load_tasks(["piqa", "my_task"], folder="my-tasks")
    results = evaluate_tasks(model, tokenizer, tasks, limit=100, max_tokens=2048)

Tasks are lm-eval's own YAML files: those it ships, whose data come from a hub, and those of a local folder.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.errors import ReportedError
from validators.checks import TaskResult
from validators.errors import ValidationError, ValidationUsageError
from validators.harness import check_installed
from validators.session import first_line, is_out_of_memory

_SCORED = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")

# Resamples for the standard error of metrics that have no formula for it (lm-eval's default takes minutes).
_BOOTSTRAP = 100


@dataclass(frozen=True)
class LoadedTasks:
    """Tasks with their documents in memory, good for any number of models.

    Attributes:
        names: What was asked for: tasks, groups or tags.
        folder: Where local tasks come from; paths in their YAML files are taken from there.
        loaded: What lm-eval's TaskManager made of them.
    """

    names: tuple[str, ...]
    folder: Path | None
    loaded: Mapping[str, Any]


def check_tasks(folder: str | Path | None) -> None:
    """Do nothing where tasks can be loaded, as far as can be told without doing it.

    Raises:
        ValidationResourceError: E-LM-EVAL-MISSING.
        ValidationUsageError: E-TASKS-FOLDER.
    """
    check_installed()
    if folder is not None and not os.path.isdir(folder):  # Path.is_dir raises for a name that is too long
        raise ValidationUsageError(
            "E-TASKS-FOLDER",
            f"there is no folder {folder}",
            "name the folder that holds the tasks' YAML files",
        )


def load_tasks(names: Sequence[str], folder: str | Path | None = None) -> LoadedTasks:
    """The tasks with these names, their documents read.

    Code that a YAML file of ``folder`` names (``!function``) is run.

    Args:
        names: Tasks, groups or tags of lm-eval or of the folder.
        folder: A folder of YAML files; they take precedence over lm-eval's own.

    Raises:
        ValidationResourceError: E-LM-EVAL-MISSING.
        ValidationUsageError: E-TASKS-FOLDER; E-TASK-UNKNOWN; E-TASK-KIND: a task has the model write.
        ValidationError: E-TASK-DATA: a task's YAML file or its documents cannot be read.
    """
    check_tasks(folder)
    place = None if folder is None else Path(folder).absolute()
    with _quiet_harness(place):
        try:
            manager = _manager(names, place)
            _refuse_unknown(names, manager, folder)
            loaded = manager.load(list(dict.fromkeys(names)))
        except Exception as error:  # whatever a YAML file, a data set or a hub makes of it
            if isinstance(error, ReportedError) or is_out_of_memory(error):
                raise
            raise ValidationError(
                "E-TASK-DATA",
                f"lm-eval cannot load {', '.join(names)}: {first_line(error)}",
                "look at the task's YAML file; where no hub is reachable, --tasks-folder takes tasks with local data",
            ) from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in _SCORED:
            from validators.harness_model import generation_refused

            raise generation_refused(f"task {name}")
        task.set_config(key="num_fewshot", value=0)
    return LoadedTasks(tuple(names), place, loaded)


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: LoadedTasks,
    *,
    limit: int | None = None,
    max_tokens: int = 2048,
    on_request: Callable[[int, int], None] | None = None,
) -> tuple[TaskResult, ...]:
    """Every metric of every task, zero-shot, tasks and metrics in lm-eval's order, groups after them.

    Tokens, truncation and scores are those of lm-eval's model ``hf``; no chat template is used. No global
    random seed is touched.

    Args:
        model: A ``validators.likelihood.LanguageModel``: ``CausalLM``, or any ``Reference``.
        tokenizer: Its Hugging Face tokenizer.
        tasks: From ``load_tasks``.
        limit: Documents per task, the first ones; None: all.
        max_tokens: Tokens that the model takes at once.
        on_request: Called with the requests done and in all, after each.

    Raises:
        ValidationError: E-TASK-FAILED: lm-eval cannot make requests of the documents, or score the answers;
            E-TASK-LENGTH.
        ReportedError: What the model raises.
    """
    harness_model: Any = importlib.import_module("validators.harness_model")
    evaluator: Any = importlib.import_module("lm_eval.evaluator")
    with _quiet_harness(tasks.folder) as aloud:

        def told(done: int, total: int) -> None:
            if on_request is not None:
                with aloud():
                    on_request(done, total)

        try:
            found = evaluator.evaluate(
                lm=harness_model.HarnessModel(model, tokenizer, max_tokens, told),
                task_dict=tasks.loaded,
                limit=limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=False,
            )
        except Exception as error:  # a task's own code, its templates, its metrics
            if isinstance(error, ReportedError) or is_out_of_memory(error):
                raise
            names = ", ".join(tasks.names)
            raise ValidationError(
                "E-TASK-FAILED",
                f"lm-eval cannot run {names}: {first_line(error)}",
                "look at the task's YAML file",
            ) from error
    return tuple(_results(found))


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks; its own 14 000 files are not read where the folder has all that is asked for."""
    manager_class: Any = importlib.import_module("lm_eval.tasks").TaskManager
    if folder is not None:
        local = manager_class(include_path=str(folder), include_defaults=False)
        if set(names) <= set(local.all_subtasks):
            return local
    return manager_class(include_path=None if folder is None else str(folder))


def _refuse_unknown(names: Sequence[str], manager: Any, folder: str | Path | None) -> None:
    for name in names:
        if name not in manager.all_tasks:
            places = "lm-eval" if folder is None else f"lm-eval or {folder}"
            raise ValidationUsageError(
                "E-TASK-UNKNOWN",
                f"there is no task {name} in {places}",
                "list them with: lm-eval ls tasks; a --tasks-folder adds those of its YAML files",
            )


def _results(found: Mapping[str, Any]) -> Iterator[TaskResult]:
    """lm-eval's results, whose metrics are keyed ``metric,filter`` and ``metric_stderr,filter``."""
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, comma, selection = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            stderr = figures.get(f"{metric}_stderr,{selection}")
            count = (
                figures["sample_len"] if "sample_len" in figures else found["n-samples"][task]["effective"]
            )
            yield TaskResult(
                task=task,
                metric=metric if selection == "none" else key,
                value=float(value),
                stderr=float(stderr) if isinstance(stderr, (int, float)) else None,
                documents=int(count),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
            )


@contextlib.contextmanager
def _quiet_harness(folder: Path | None) -> Iterator[Callable[[], contextlib.ExitStack]]:
    """Let lm-eval work in ``folder`` without progress bars, prints, and processes of its own.

    Gives a function whose context lets the caller's own progress through.
    """
    streams = sys.stdout, sys.stderr
    sink = io.StringIO()

    def aloud() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(contextlib.redirect_stdout(streams[0]))
        stack.enter_context(contextlib.redirect_stderr(streams[1]))
        return stack

    before = Path.cwd()
    alone = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"  # its bootstrap would start a process per core
    try:
        if folder is not None:
            os.chdir(folder)
        with contextlib.redirect_stdout(sink), contextlib.redirect_stderr(sink):
            yield aloud
    finally:
        os.chdir(before)
        if alone is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = alone
