"""Things that would make a file if somebody ran them: pickles, modules, templates, tags, native libraries."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from tiny_checkpoints import change_json

PICKLES = ("pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "training_args.bin", "optimizer.pt")
# Modules of a model, modules that Python or a test runner looks for, and modules that hide a library's.
MODULES = (
    "modeling_mine.py", "configuration_mine.py", "tokenization_mine.py", "custom_generate/generate.py", "handler.py",
    "__init__.py", "conftest.py", "setup.py", "sitecustomize.py", "usercustomize.py", "torch.py", "numpy.py", "json.py",
    "onnxruntime.py", "safetensors.py", "transformers/__init__.py", "validators/child.py",
)  # fmt: skip
TAGS = (
    "!!python/object/apply:os.system ['touch {canary}']",
    "!!python/object/new:os.system ['touch {canary}']",
    "!!python/object/apply:subprocess.check_output [[touch, '{canary}']]",
    "!!python/object/apply:builtins.eval [\"open('{canary}', 'w')\"]",
    "!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{canary}']]",
    "!!python/name:os.system",
    "!!python/module:os",
    "!!python/object:pathlib.Path {{}}",
    "!include {canary}",
    "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
)


class _Trap:
    """An object whose pickle touches a file when it is read."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def template(canary: Path) -> str:
    """A chat template that leaves a sandbox where there is none."""
    return "{{ cycler.__init__.__globals__.os.system('touch " + str(canary) + "') }}"


def set_traps(model: Path, canary: Path) -> None:
    """Put every trap into a model's folder that is otherwise right."""
    for name in PICKLES:
        torch.save(_Trap(canary), model / name)
    for name in MODULES:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(f"open({str(canary)!r}, 'w').close()\n", encoding="utf-8")
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text(template(canary), encoding="utf-8")
    own = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    change_json(model / "config.json", auto_map=own)
    mine = {"AutoTokenizer": ["tokenization_mine.Mine", "tokenization_mine.Mine"]}
    change_json(model / "tokenizer_config.json", auto_map=mine, chat_template=template(canary))
    generation = {"custom_generate": str(model)}
    (model / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    (model / "requirements.txt").write_text(f"evil @ file://{model}\n", encoding="utf-8")


def assert_traps_work(model: Path, canary: Path) -> None:
    """A trap that would not spring proves nothing: read one pickle and run one module, then take the canary away."""
    for spring in (_load_pickle, _run_module):
        spring(model)
        assert canary.exists()
        canary.unlink()


def _load_pickle(model: Path) -> None:
    torch.load(model / PICKLES[0], weights_only=False)


def _run_module(model: Path) -> None:
    exec((model / MODULES[0]).read_text(encoding="utf-8"), {})


def raw_pickle(canary: Path) -> bytes:
    """A pickle without torch's archive around it."""
    return pickle.dumps(_Trap(canary))


def native_library(folder: Path, canary: Path) -> Path | None:
    """A shared library that touches the canary when it is loaded; None without a compiler."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source = (
        f'#include <stdio.h>\n__attribute__((constructor)) void spring(void) {{ fopen("{canary}", "w"); }}\n'
    )
    (folder / "evil.c").write_text(source, encoding="utf-8")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", "evil.so", "evil.c"], cwd=folder, check=True)
    return folder / "evil.so"
