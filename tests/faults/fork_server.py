"""Runs of the command line in children of a process that has done the imports: ``python fork_server.py``.

Each line of standard input is one run as JSON: ``argv``, ``folder`` it is run in (or null), ``processes`` and
``kill_after_s`` (or null). A run has one process or
several that share it, each with ``environment`` (added to this one's) and two files for what it prints, ``log`` and
``error_log``, which may be the same; the first one is killed. Each run is answered by a line:
``codes`` of the processes, negative for the signal that ended one, and ``seconds``. No tensor is touched in this
process, so that no thread of torch is lost in a fork.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot  # noqa: F401  # so that the children need not
import networkx  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript.rewriter  # noqa: F401
import torch.onnx._internal.exporter._core  # noqa: F401
import transformers  # noqa: F401

import compressor.models.export_view
import compressor.pipeline
import compressor.validation  # noqa: F401
from compressor.cli import main


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One run, from its start to the end of its last process."""
    started = time.perf_counter()
    children = []
    for process in request["processes"]:
        children.append(os.fork())
        if children[-1] == 0:
            _become(request, process)
    killed_at = request["kill_after_s"]
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        for child in children:
            ended, status = (0, 0) if child in codes else os.waitpid(child, os.WNOHANG)
            if ended:
                codes[child] = os.waitstatus_to_exitcode(status)
        if killed_at is not None and time.perf_counter() - started >= killed_at and children[0] not in codes:
            os.kill(children[0], signal.SIGKILL)
            killed_at = None
        left = [child for child in children if child not in codes]
        if len(left) == 1 < len(children):
            _kill_if_stopped(left[0])
        time.sleep(0.002)
    return {"codes": [codes[child] for child in children], "seconds": time.perf_counter() - started}


def _kill_if_stopped(child: int) -> None:
    """End a process that a fault has paused, once the others are gone."""
    state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
    if state == "T":
        os.kill(child, signal.SIGKILL)


def _become(request: dict[str, Any], process: dict[str, Any]) -> None:
    """Turn this child into one process of the run; it does not come back."""
    code = 1
    try:
        for descriptor, log in ((1, process["log"]), (2, process["error_log"])):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
        os.environ.update(process["environment"])
        if request["folder"] is not None:
            os.chdir(request["folder"])
        sys.argv = ["compress", *request["argv"]]
        try:
            code = main() or 0
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    finally:
        os._exit(code)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)
