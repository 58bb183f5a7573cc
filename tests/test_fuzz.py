"""A slice of the fuzzing: mutated files are taken or refused, by id, and nothing else happens."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz.mutations import mutated

SCRIPT = Path(__file__).with_name("fuzz") / "fuzzing.py"
FORMATS = ("safetensors", "config", "tokenizer", "recipe", "manifest", "onnx", "state", "report")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the worker is forked")
def test_mutated_files_are_taken_or_refused(tmp_path: Path) -> None:
    """No death, no exception but a refusal, no file that comes or goes, no changed model file that is not seen."""
    environment = {**os.environ, "BLOCKPRESS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--mutations", "40", "--seed", "1"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in FORMATS:
        assert re.search(rf"^{name} +worker +40 ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("kind", ["binary", "json", "yaml"])
def test_mutations_are_the_same_for_the_same_seed_and_change_the_file(kind: str) -> None:
    """One number stands for one mutated file, and nearly all of them are other files."""
    content = b'{"a": [1, 2, {"b": "text"}], "c": 3.5}\nd: 4\n'
    made = [mutated(content, kind, random.Random(f"x {number}")) for number in range(200)]
    again = [mutated(content, kind, random.Random(f"x {number}")) for number in range(200)]
    assert made == again
    assert sum(one != content for one in made) > 180
    assert len(set(made)) > 120
