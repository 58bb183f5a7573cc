"""The process that makes cells for a comparison: ``python -m compressor.comparison.child SETTINGS.json``.

It loads the libraries once, and for each cell makes a copy of itself (fork) that opens the model, works and ends. So
peak memory is the cell's, what one cell leaves behind is not in the next one's way, and a cell that the system kills
takes nothing along. Where a process cannot copy itself (Windows), it makes one cell and ends, and the parent starts
another one.

Standard input brings one request per line, ``{"cell": …}`` or ``{"scoring": …}`` for zero-shot tasks on a model, the
next one only after the last one has ended; meanwhile an empty line asks it to stop at the next safe point, and when the
input ends the parent is gone, and so is this process. Standard output carries one JSON object per line: ``ready``,
progress, what was measured or the failure, ``ended``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

# What every cell needs, loaded before the first copy is made; a model of any architecture loads what Llama's does.
_PRELOADED = ("compressor.comparison.cell", "compressor.opening", "transformers.models.llama.modeling_llama")
_ORPHANED = 143


def main(settings_path: str) -> None:
    """Serve until the input ends."""
    events = _own_stdout()
    settings = json.loads(Path(settings_path).read_text(encoding="utf-8"))
    sys.path[:] = settings["sys_path"]
    os.chdir(settings["folder"])
    for name in _PRELOADED:
        importlib.import_module(name)
    _send(events, event="ready")
    while (line := _next_request()) is not None:
        code = _in_a_copy(events, line) if hasattr(os, "fork") else _make(events, line)
        _send(events, event="ended", code=code)
        if not hasattr(os, "fork"):
            return


def _in_a_copy(events: int, line: bytes) -> int:
    """Make one cell in a copy of this process; its exit code, negative for a signal.

    Nothing has computed here yet, so no pool of threads is lost in the copy; CUDA is not in use either.
    """
    with warnings.catch_warnings():
        # Python 3.12 warns of any thread that a library keeps, and those of the linear algebra survive a copy.
        warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            code = _make(events, line)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _make(events: int, line: bytes) -> int:
    """Make what the line describes; 0 when its outcome was told."""
    started = time.perf_counter()
    asked = threading.Event()
    threading.Thread(target=_listen, args=(asked,), daemon=True).start()
    _send(events, **_outcome(json.loads(line), events, asked, started))
    return 0


def _outcome(content: dict[str, Any], events: int, asked: threading.Event, started: float) -> dict[str, Any]:
    """The last event of a cell or a scoring: what was measured, or the failure."""
    from compressor.comparison.cell import run_cell
    from compressor.comparison.failures import failure_of
    from compressor.comparison.request import CellRequest, ScoringRequest
    from compressor.comparison.results import measured_tree
    from compressor.opening import open_model
    from compressor.progress import Event
    from compressor.report.schema import PeakMemory
    from compressor.run.measure import peak_device_bytes, peak_host_bytes

    def tell(event: Event) -> None:
        _send(events, event="progress", kind=type(event).__name__, fields=asdict(event))

    stage = "open"
    try:
        if "scoring" in content:
            from compressor.comparison.scored_model import score_model

            scoring = ScoringRequest.model_validate(content["scoring"])
            return _done(measured_tree(score_model(scoring, stop=asked.is_set, progress=tell)))
        request = CellRequest.model_validate(content["cell"])
        opened = open_model(
            request.model,
            dtype=request.recipe.export.dtype,
            device=request.device,
            revision=request.revision,
            trust_remote_code=request.trust_remote_code,
        )
        stage = "cell"
        figures = run_cell(request, opened, started=started, stop=asked.is_set, progress=tell)
    except Exception as error:
        return {"event": "failed", "stage": stage, "failure": failure_of(error).model_dump()}
    peaks = PeakMemory(host=peak_host_bytes(), device=peak_device_bytes())
    measured = figures.model_copy(update={"peak_memory_bytes": peaks})
    return _done(measured_tree(measured))


def _done(measured: dict[str, Any]) -> dict[str, Any]:
    return {"event": "done", "measured": measured}


def _send(events: int, **event: Any) -> None:
    line = (json.dumps(event) + "\n").encode()
    while line:
        line = line[os.write(events, line) :]


def _own_stdout() -> int:
    """The pipe to the parent; whatever else in this process prints goes to standard error from now on."""
    pipe = os.dup(1)
    os.dup2(2, 1)
    return pipe


def _next_request() -> bytes | None:
    """The next line that is not empty (one that asked to stop may come too late); None at the end of the input.

    Byte by byte: what follows the line is for the cell.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            return None
        if line or byte != b"\n":
            line += byte
    return bytes(line)


def _listen(asked: threading.Event) -> None:
    while os.read(0, 1):
        asked.set()
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main(sys.argv[1])
