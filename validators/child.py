"""The child process of a validation: ``python -m validators.child REQUEST.json``.

ONNX Runtime and the checker run native code on a file that may be hostile; here they can crash, hang or take
all memory without taking the caller along. Standard output carries one JSON object per line: progress, and at
the end the report or the error. The parent holds standard input open; when that ends the parent is gone, and
so is this process.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

_ORPHANED = 143


def main(request_path: str) -> None:
    """Carry out the request in the file and write its events."""
    events = _own_stdout()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    handed_on = json.loads(Path(request_path).read_text(encoding="utf-8"))
    sys.path[:] = handed_on["sys_path"]
    os.chdir(handed_on["folder"])

    def send(**event: Any) -> None:
        events.write(json.dumps(event) + "\n")
        events.flush()

    try:
        send(**_outcome(handed_on["request"], send))
    except BaseException:
        send(event="broken", traceback=traceback.format_exc())


def _outcome(content: dict[str, Any], send: Any) -> dict[str, Any]:
    """The last event: the report, or the error as its four parts."""
    from exporters.errors import ReportedError
    from validators.events import ValidationProgress
    from validators.examine import examine
    from validators.request import ValidationRequest
    from validators.session import is_out_of_memory, out_of_memory

    def on_progress(progress: ValidationProgress) -> None:
        send(event="progress", stage=progress.stage, done=progress.done, total=progress.total)

    try:
        report = examine(ValidationRequest.from_json(content), on_progress)
    except ReportedError as error:
        return _error_event(error)
    except (MemoryError, RuntimeError) as error:  # torch reports a failed allocation as RuntimeError
        if is_out_of_memory(error):
            return _error_event(out_of_memory("in the validation's child process"))
        raise
    return {"event": "report", "report": report.to_json()}


def _error_event(error: Any) -> dict[str, Any]:
    return {
        "event": "error",
        "error_id": error.error_id,
        "message": error.message,
        "remedy": error.remedy,
        "exit_code": error.exit_code,
    }


def _own_stdout() -> TextIO:
    """The pipe to the parent; whatever else in this process prints goes to standard error from now on."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(_ORPHANED)


if __name__ == "__main__":
    main(sys.argv[1])
