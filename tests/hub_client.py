"""Asks a hub for models and texts, in a process of its own: the libraries read HF_ENDPOINT when they are loaded.

Run as a program it reads a list of calls from stdin and writes what each left to stdout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fake_hub import FakeHub

ROOT = Path(__file__).resolve().parent.parent

Call = dict[str, Any]


@dataclass(frozen=True)
class Client:
    """A user of a hub.

    Attributes:
        hub: The hub.
        home: HF_HOME, the folder of the caches.
    """

    hub: FakeHub
    home: Path

    def fetch(self, repository: str, token: str = "", **options: Any) -> Any:
        """What ``compressor.models.hub.fetch`` leaves: folder and commit, or id, message and exit code of an error."""
        return self.ask([fetching(repository, token, **options)])[0]

    def text(self, source: str, token: str = "", **options: Any) -> Any:
        """What ``read_text`` leaves: documents, kind and description, or id, message and exit code of an error."""
        return self.ask([reading(source, token, **options)])[0]

    def ask(self, calls: list[Call], **environment: str) -> list[Any]:
        """What each of the calls leaves, one after the other in one process."""
        ended = self._run([sys.executable, __file__], json.dumps(calls), environment)
        assert ended.returncode == 0, ended.stderr
        outcomes: list[Any] = json.loads(ended.stdout)
        return outcomes

    def compress(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What a command line leaves."""
        return self._run([sys.executable, "-m", "compressor", *map(str, arguments)], "", {})

    def _run(
        self, command: list[str], given: str, environment: dict[str, str]
    ) -> subprocess.CompletedProcess[str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        ours = {
            "HF_ENDPOINT": self.hub.endpoint,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # otherwise datasets counts loads at another host
            "NO_PROXY": "localhost,127.0.0.1",
        }
        return subprocess.run(
            command,
            input=given,
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**inherited, **ours, **environment},
            check=False,
            timeout=300,
        )


def fetching(repository: str, token: str = "", **options: Any) -> Call:
    """The call that fetches a model."""
    return {"call": "fetch", "token": token, "repository": repository, "revision": None, **options}


def reading(source: str, token: str = "", **options: Any) -> Call:
    """The call that reads a text."""
    return {"call": "text", "token": token, "source": source, "role": "calibration", **options}


def _outcome(call: str, token: str, **options: Any) -> dict[str, Any]:
    from compressor.calibration.text import read_text
    from compressor.errors import ReportedError
    from compressor.models.hub import fetch

    os.environ["HF_TOKEN"] = token
    try:
        if call == "fetch":
            folder, commit = fetch(**options)
            return {"folder": str(folder), "commit": commit}
        text = read_text(**options)
        return {"documents": text.documents, "kind": text.kind, "description": text.description}
    except ReportedError as error:
        said = {"error_id": error.error_id, "message": error.message, "remedy": error.remedy}
        return {**said, "exit_code": error.exit_code}


if __name__ == "__main__":
    time.sleep = lambda _: None  # the libraries wait half a minute between their tries
    print(json.dumps([_outcome(**call) for call in json.load(sys.stdin)]))
