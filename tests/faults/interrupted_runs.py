"""A tiny model's run that is stopped at will and started again, and what is left in the end."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.full_disk import build_full_disk
from faults.local_ranks import environment_of, free_port
from tiny_models import save_variant, write_texts

from compressor.run.output import name_output

SERVER = Path(__file__).with_name("fork_server.py")
# What differs between two runs of the same settings.
MEASURED = ("timings", "peak_memory_bytes", "versions", "notices")
KILLED = -9


@dataclass(frozen=True)
class Ended:
    """How one run ended: its exit code, negative for a signal, its seconds, and what it printed.

    What went to stderr is in ``said`` too, but for a run that was asked to keep it apart.
    """

    code: int
    seconds: float
    said: str
    errors: str = ""


class ForkServer:
    """Starts runs in forked children.

    Attributes:
        fills_disks: Whether ``full_disk`` works in them.
    """

    def __init__(self, process: subprocess.Popen[str], folder: Path, *, fills_disks: bool) -> None:
        self._process, self._folder, self._count = process, folder, 0
        self.fills_disks = fills_disks

    def run(
        self,
        argv: Sequence[str],
        *,
        fault: str | None = None,
        kill_after_s: float | None = None,
        folder: Path | None = None,
        environment: Mapping[str, str] | None = None,
        apart: bool = False,
    ) -> Ended:
        """One run of the command line, to its end.

        Args:
            argv: Of the command.
            fault: What goes wrong, see ``compressor.run.faults``.
            kill_after_s: When it is killed.
            folder: In which it runs.
            environment: Variables of this run.
            apart: Whether stderr is kept apart from stdout.
        """
        request = {"kill_after_s": kill_after_s, "folder": folder and str(folder)}
        variables = {**(environment or {}), "BLOCKPRESS_FAULT": fault or ""}
        return self._start(argv, [variables], request, apart=apart)[0]

    def run_ranks(
        self,
        argv: Sequence[str],
        ranks: int,
        *,
        faults: Mapping[int, str] | None = None,
        patience_s: int = 120,
    ) -> list[Ended]:
        """One run of the command line in several processes that share it, to the end of all.

        Args:
            argv: Of each of them.
            ranks: How many.
            faults: What goes wrong, by rank.
            patience_s: After which one that does not answer is taken for lost; a paused one is killed at the end.
        """
        port = free_port()
        environments = [
            {
                **environment_of(rank, ranks, port),
                "BLOCKPRESS_FAULT": (faults or {}).get(rank, ""),
                "BLOCKPRESS_RANKS_TIMEOUT": str(patience_s),
            }
            for rank in range(ranks)
        ]
        return self._start(argv, environments, {"kill_after_s": None, "folder": None}, apart=False)

    def _start(
        self,
        argv: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        request: Mapping[str, Any],
        *,
        apart: bool,
    ) -> list[Ended]:
        self._count += 1
        logs = [self._folder / f"run-{self._count}-{place}.txt" for place in range(len(environments))]
        errors = [log.with_suffix(".err.txt") if apart else log for log in logs]
        cache = {"BLOCKPRESS_CACHE": str(self._folder / "cache")}
        processes = [
            {"environment": {**cache, **environment}, "log": str(log), "error_log": str(error_log)}
            for environment, log, error_log in zip(environments, logs, errors, strict=True)
        ]
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**request, "argv": list(argv), "processes": processes}) + "\n")
        self._process.stdin.flush()
        answer = json.loads(self._process.stdout.readline())
        return [
            Ended(code, answer["seconds"], _text(log), _text(error_log) if apart else "")
            for code, log, error_log in zip(answer["codes"], logs, errors, strict=True)
        ]


def _text(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")


@contextmanager
def fork_server(folder: Path) -> Iterator[ForkServer]:
    """A server for the time of the context; logs and the cache of its runs lie in ``folder``."""
    preloaded = build_full_disk(folder)
    process = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**os.environ, **preloaded},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        yield ForkServer(process, folder, fills_disks=bool(preloaded))
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(30)


@dataclass(frozen=True)
class TinyRun:
    """The command line of a run on a model of four blocks, without what differs between outputs."""

    model: Path
    settings: tuple[str, ...]

    def argv(self, out: Path, *more: str) -> list[str]:
        """The command for one output."""
        return ["run", str(self.model), "--out", str(out), *self.settings, *more]


def tiny_run(folder: Path, *, validate: bool = False, **recipe: Any) -> TinyRun:
    """A run of a few seconds: random weights, short windows. Keywords are recipe keys with ``__`` for the dot."""
    texts = write_texts(folder)
    settings: dict[str, Any] = {
        "calibration.source": texts.calibration,
        "calibration.num_samples": 10,
        "calibration.seqlen": 24,
        "evaluation.source": texts.evaluation,
        "evaluation.max_windows": 4,
        "pruning.method": "wanda",
        "pruning.sparsity": 0.5,
        "finish.method": "none",
        "recovery.epochs": 2,
        "recovery.batch_size": 4,
        "recovery.probe.epochs": 1,
        "recovery.probe.candidates": "[0.001, 0.003]",
    }
    settings |= {key.replace("__", "."): value for key, value in recipe.items()}
    assigned = [f"--set={key}={value}" for key, value in settings.items()]
    model = save_variant(folder / "model", "llama", num_hidden_layers=4)
    return TinyRun(model, (*assigned, *(() if validate else ("--no-validate",))))


def state_of(out: Path) -> Path:
    """Where the state of an unfinished run on ``out`` lies."""
    return name_output(out).state


def contents(out: Path) -> dict[str, str]:
    """Digest of every file of an output but its reports, by path; all of them are to be the same."""
    products = sorted(
        path for path in out.parent.rglob("*") if path.is_file() and ".report." not in path.name
    )
    return {
        str(path.relative_to(out.parent)): hashlib.sha256(path.read_bytes()).hexdigest() for path in products
    }


def report_facts(out: Path) -> Mapping[str, Any]:
    """The report without what is measured anew in each run."""
    report = json.loads(out.with_suffix(".report.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in report.items() if key not in MEASURED}
    return _without_measures(kept)


def _without_measures(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_measures(inner)
            for key, inner in value.items()
            if not key.endswith(("_s", "seconds", "resident_bytes"))
        }
    if isinstance(value, list):
        return [_without_measures(inner) for inner in value]
    return value
