"""Mutated files given to the real command, ``python -m compressor``, one process for each."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
class Ended:
    """What a command left: exit code, None where it took too long, and what it printed."""

    code: int | None
    out: str
    err: str


def fuzz_commands(name: str, samples: Path, numbers: range, seed: int) -> dict[str, list[int]]:
    """Numbers of the mutations by what became of them, as ``fuzzing.fuzz`` tells them."""
    outcomes: dict[str, list[int]] = collections.defaultdict(list)
    for number in numbers:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "samples"
            shutil.copytree(samples, folder)
            outcomes[_outcome(name, folder, random.Random(f"{name} {seed} {number}"))].append(number)
    return outcomes


def _outcome(name: str, folder: Path, rng: random.Random) -> str:
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
    ended = _run(words, folder)
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


def _judged(ended: Ended) -> str:
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


def _run(words: tuple[str, ...], folder: Path) -> Ended:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "BLOCKPRESS_CACHE": str(folder.parent / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        done = subprocess.run(
            [sys.executable, "-m", "compressor", *words, "--json", "-q"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Ended(None, "", "")
    return Ended(done.returncode, done.stdout, done.stderr)


def _without_state(found: dict[str, str]) -> dict[str, str]:
    return {key: digest for key, digest in found.items() if ".state" not in key}


def _digests(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` by its path, with the sha256 of its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
