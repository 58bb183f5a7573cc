"""Mutated files given to the real command, one process for each: ``python -m compressor``, or forked from a process
that has done the imports and goes on with the command's ``main``."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from faults.interrupted_runs import KILLED, ForkServer
from fuzz.formats import FORMATS
from fuzz.mutations import mutated

from compressor.run.output import name_output

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 180  # of a whole process with its imports, or a whole run, on a machine that others use too
REFUSED = (2, 3)
# The smallest run there is, whatever a mutated recipe or config asks for.
SMALLEST = (
    "--no-validate", "--calibration", "calibration.jsonl", "--num-calibration-samples", "4", "--seqlen", "16",
    "--eval-data", "evaluation.jsonl", "--max-eval-windows", "2", "--pruner", "magnitude", "--recovery", "none",
    "--set", "finish.method=none",
)  # fmt: skip
RUN = ("run", "model", "--out", "new.onnx", *SMALLEST)
COMMANDS: dict[str, tuple[str, ...]] = {
    "safetensors": RUN,
    "config": RUN,
    "tokenizer": RUN,
    "recipe": (*RUN, "--recipe", "recipe.yaml"),
    "manifest": ("validate", "out/sparse.onnx"),
    "onnx": ("validate", "out/sparse.onnx"),
    "state": (),  # that of the run which the state is of
}


@dataclass(frozen=True)
class CommandEnded:
    """What a command left: exit code, None where it took too long, and what it printed."""

    code: int | None
    out: str
    err: str


Start = Callable[[tuple[str, ...], Path], CommandEnded]


def fuzz_commands(name: str, samples: Path, numbers: range, seed: int, start: Start) -> dict[str, list[int]]:
    """Numbers of the mutations by what became of them, as ``fuzzing.fuzz`` tells them.

    Args:
        name: The format.
        samples: The folder of the right files.
        numbers: Of the mutations.
        seed: Of all mutations.
        start: Runs words of the command line in a folder: ``in_own_process``, or ``in_fork_of`` a server.
    """
    outcomes: dict[str, list[int]] = collections.defaultdict(list)
    for number in numbers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "samples"
            shutil.copytree(samples, folder)
            outcomes[_outcome(name, folder, random.Random(f"{name} {seed} {number}"), start)].append(number)
    return outcomes


def _outcome(name: str, folder: Path, rng: random.Random, start: Start) -> str:
    words = COMMANDS[name]
    place = folder / FORMATS[name].path
    if name == "state":
        words = tuple(json.loads((folder / "argv.json").read_text(encoding="utf-8")))
        state = name_output(folder / "new.onnx").state
        (folder / "state").rename(state)
        place = state / place.name
    whole = place.read_bytes()
    content = mutated(whole, FORMATS[name].kind, rng)
    place.write_bytes(content)
    before = _digests(folder)
    ended = start((*words, "--json", "-q"), folder)
    after = _digests(folder)
    outcome = _judged(ended)
    if outcome == "taken" and name == "onnx" and content != whole:
        return "broken: an altered model file was accepted"
    if name == "state":  # which a run replaces as it goes on
        before, after = _without_state(before), _without_state(after)
    if any(after.get(key) != digest for key, digest in before.items()):
        return "broken: an input was changed or removed"
    left = {key for key in after.keys() - before.keys() if outcome != "taken" or not key.startswith("new.")}
    return f"escaped: {min(left)} is left" if left else outcome


def _judged(ended: CommandEnded) -> str:
    if ended.code is None:
        return f"slow: more than {LIMIT_S} s"
    if "Traceback" in ended.err:
        return f"broken: a traceback, exit {ended.code}"
    if ended.code == 0:
        return "taken"
    try:
        error: dict[str, Any] = json.loads(ended.out)["error"]
    except (ValueError, KeyError, TypeError):
        return f"broken: exit {ended.code} without an error in JSON"
    if ended.code not in REFUSED or error["exit_code"] != ended.code or not error["remedy"]:
        return f"exit {ended.code}: {error['id']} {error['message'][:100]}"
    return f"refused {error['id']}"


def in_fork_of(server: ForkServer) -> Start:
    """Runs the command in children of a server."""

    def start(words: tuple[str, ...], folder: Path) -> CommandEnded:
        ended = server.run(words, folder=folder, kill_after_s=LIMIT_S, apart=True)
        return CommandEnded(None if ended.code == KILLED else ended.code, ended.said, ended.errors)

    return start


def in_own_process(words: tuple[str, ...], folder: Path) -> CommandEnded:
    """Runs the command as a user does, interpreter, imports and all."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BLOCKPRESS_CACHE": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "compressor", *words],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return CommandEnded(None, "", "")
    return CommandEnded(done.returncode, done.stdout, done.stderr)


def _without_state(found: dict[str, str]) -> dict[str, str]:
    return {key: digest for key, digest in found.items() if ".state" not in key}


def _digests(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` by its path, with the sha256 of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
