"""Runs of the command line in children of a process that has done the imports: ``python fork_server.py``.

Each line of standard input is one run as JSON: ``argv``, ``environment`` (added to the process's), ``kill_after_s``
(or null), ``file_limit``, the most bytes that a file may get (or null), and ``log``, a file for what the run prints.
Each is answered by a line: ``code``, negative for the signal that ended it, and ``seconds``. No tensor is touched in
this process, so that no thread of torch is lost in a fork.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

import onnxruntime  # noqa: F401  # so that the children need not
import torch.onnx  # noqa: F401
import transformers  # noqa: F401

import compressor.models.export_view
import compressor.pipeline  # noqa: F401
from compressor.cli import main


def run(request: dict[str, Any]) -> dict[str, Any]:
    """One child, from its start to its end."""
    started = time.perf_counter()
    child = os.fork()
    if child == 0:
        _become(request)
    killed_at = request["kill_after_s"]
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if killed_at is not None and time.perf_counter() - started >= killed_at:
            os.kill(child, signal.SIGKILL)
            killed_at = None
        time.sleep(0.002)
    return {"code": os.waitstatus_to_exitcode(status), "seconds": time.perf_counter() - started}


def _become(request: dict[str, Any]) -> None:
    """Turn this child into the run; it does not come back."""
    code = 1
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["environment"])
        if request["file_limit"] is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_limit"],) * 2)
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
