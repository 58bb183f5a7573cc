"""A hub on this machine: it answers over HTTP what the Hugging Face libraries ask, from files in memory.

The answers follow huggingface.co: 401 without a code for what is missing or private, X-Error-Code for the rest,
large files behind a redirect to another host, old names of repositories redirected to the new ones.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

MEMBER = "hf_member"  # a token that may read everything
STRANGER = "hf_stranger"  # a token of somebody who was given access to nothing

_LARGE = (".safetensors", ".parquet", ".bin")
_NAME = r"(?P<name>[^/]+(?:/(?!resolve/|revision/|tree/)[^/]+)?)"
_API = re.compile(rf"/api/(?P<kind>models|datasets)/{_NAME}(?:/(?P<page>revision|tree)/(?P<rest>.+))?")
_RESOLVE = re.compile(rf"/(?:(?P<kind>datasets)/)?{_NAME}/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
_STORED = re.compile(r"/stored/(?P<repository>.+)@(?P<commit>\w+)/(?P<file>.+)")


@dataclass
class Repository:
    """A model or dataset.

    Attributes:
        commits: The files of each commit, by path.
        refs: The commit of each branch and tag.
        visible: "public", "private" (nobody is told that it exists) or "gated" (only its content is kept back).
        claimed: Sizes that its page tells instead of the real ones, by path.
    """

    commits: dict[str, Mapping[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    visible: str = "public"
    claimed: dict[str, int] = field(default_factory=dict)


@dataclass
class Trouble:
    """What goes wrong with a page or file.

    Attributes:
        status: The HTTP status that is answered; None where the connection is cut.
        after: Bytes of the content that are sent before it is cut.
        times: How often, before all is well.
    """

    status: int | None = None
    after: int | None = None
    times: int = 10**6


@dataclass
class FakeHub:
    """A running hub, its repositories, and what it was asked.

    Attributes:
        repositories: By "models/owner/name" and "datasets/owner/name".
        moved: New names of repositories by "models/old-name" and "datasets/old-name".
        troubles: What goes wrong, by the end of the address that it befalls.
        asked: "GET /address" of every request, in order.
        sent: The paths of the files whose content was asked for, in order.
    """

    server: ThreadingHTTPServer
    repositories: dict[str, Repository] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)
    troubles: dict[str, Trouble] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: list[str] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        """Its address for HF_ENDPOINT; large files lie at 127.0.0.1, which clients take for another host."""
        return f"http://localhost:{self.server.server_port}"

    def publish(
        self, repository: str, files: Mapping[str, bytes], *tags: str, visible: str = "public"
    ) -> str:
        """Put files on the main branch of a repository, and tags to them; returns the commit."""
        digest = hashlib.sha256(repository.encode())
        for path in sorted(files):
            digest.update(path.encode() + files[path])
        commit = digest.hexdigest()[:40]
        stored = self.repositories.setdefault(repository, Repository())
        stored.visible = visible
        stored.commits[commit] = dict(files)
        stored.refs.update(dict.fromkeys(("main", *tags), commit))
        return commit

    def close(self) -> None:
        """Be gone: whoever asks is refused the connection."""
        self.server.shutdown()
        self.server.server_close()


class _Refusal(Exception):
    """An answer other than the page that was asked for."""

    def __init__(self, status: int, code: str = "", message: str = "", location: str = "") -> None:
        self.status = status
        headers = {"X-Error-Code": code, "X-Error-Message": message, "Location": location}
        self.headers = {name: value for name, value in headers.items() if value}


class _Request(BaseHTTPRequestHandler):
    """One request; HTTP/1.0, so that each connection ends with its answer."""

    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        """Nothing: the tests read ``asked``."""

    def do_GET(self) -> None:
        """A page or a file."""
        address = urlsplit(self.path)
        path = unquote(address.path)
        self.hub.asked.append(f"{self.command} {path}")
        trouble = self._trouble(path)
        if trouble is not None and trouble.status is None and trouble.after is None:
            return  # without a word
        try:
            if trouble is not None and trouble.status is not None:
                raise _Refusal(trouble.status)
            status, headers, content = self._answer(path, parse_qs(address.query))
            if self.command == "GET" and "X-Repo-Commit" in headers and status < 300:
                self.hub.sent.append(path.rpartition("/")[2])
        except _Refusal as refusal:
            status, headers, content = refusal.status, refusal.headers, b'{"error": "no"}'
        self._send(status, headers, content, None if trouble is None else trouble.after)

    do_HEAD = do_GET

    def _trouble(self, path: str) -> Trouble | None:
        for end, trouble in self.hub.troubles.items():
            befalls = trouble.after is None or self.command == "GET"
            if path.endswith(end) and befalls and trouble.times > 0:
                trouble.times -= 1
                return trouble
        return None

    def _answer(self, path: str, query: Mapping[str, list[str]]) -> tuple[int, dict[str, str], bytes]:
        if found := _STORED.fullmatch(path):
            if "Authorization" in self.headers:
                raise _Refusal(400)  # the storage has an authorisation of its own in its addresses
            content = self.hub.repositories[found["repository"]].commits[found["commit"]][found["file"]]
            return self._content(content, {"X-Repo-Commit": found["commit"]})
        if found := _API.fullmatch(path):
            page = self._page(found, query.get("recursive", ["False"]) == ["True"])
            return 200, {"Content-Type": "application/json"}, json.dumps(page).encode()
        if found := _RESOLVE.fullmatch(path):
            return self._file(found)
        raise _Refusal(404)

    def _open(self, kind: str, name: str, revision: str) -> tuple[Repository, str]:
        """The repository and commit, if there are such and whoever asks may know."""
        key = f"{kind}/{name}"
        if key in self.hub.moved:
            raise _Refusal(307, location=self.path.replace(name, self.hub.moved[key], 1))
        token = self._token()
        if token not in ("", MEMBER, STRANGER):
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        repository = self.hub.repositories.get(key)
        if repository is None or (repository.visible == "private" and token != MEMBER):
            if token:
                raise _Refusal(404, code="RepoNotFound", message="Repository not found")
            raise _Refusal(401, message="Invalid username or password.")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refusal(404, code="RevisionNotFound", message=f"Invalid rev id: {revision}")
        return repository, commit

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _file(self, found: re.Match[str]) -> tuple[int, dict[str, str], bytes]:
        kind, name, path = found["kind"] or "models", found["name"], found["file"]
        repository, commit = self._open(kind, name, found["revision"])
        if repository.visible == "gated" and self._token() != MEMBER:
            raise _Refusal(
                403 if self._token() else 401, code="GatedRepo", message=f"Access to {name} is restricted"
            )
        headers = {"X-Repo-Commit": commit}
        content = repository.commits[commit].get(path)
        if content is None:
            raise _Refusal(404, code="EntryNotFound", message="Entry not found")
        digest = hashlib.sha256(content).hexdigest()
        if not path.endswith(_LARGE):
            return self._content(content, headers | {"ETag": f'"{digest[:40]}"'})
        place = f"http://127.0.0.1:{self.hub.server.server_port}/stored/{kind}/{name}@{commit}/{path}"
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content)), "Location": place}
        return 302, headers | linked, b""

    def _content(self, content: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """A file, or the part of it that is asked for."""
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if part is None:
            return 200, headers, content
        start, stop = int(part[1]), int(part[2] or len(content) - 1) + 1
        shown = f"bytes {start}-{min(stop, len(content)) - 1}/{len(content)}"
        return 206, headers | {"Content-Range": shown}, content[start:stop]

    def _page(self, found: re.Match[str], recursive: bool) -> Any:
        """What the API tells of a repository, or of a folder in it."""
        rest = found["rest"] or "main"
        revision, _, folder = rest.partition("/") if found["page"] == "tree" else (rest, "", "")
        repository, commit = self._open(found["kind"], found["name"], revision)
        files = repository.commits[commit]
        if found["page"] == "tree":
            return _tree(files, f"{folder}/" if folder else "", recursive)
        siblings = [
            {"rfilename": path, "size": repository.claimed.get(path, len(content))}
            for path, content in files.items()
        ]
        return {"id": found["name"], "sha": commit, "siblings": siblings}

    def _send(self, status: int, headers: Mapping[str, str], content: bytes, cut: int | None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])


def _tree(files: Mapping[str, bytes], prefix: str, recursive: bool) -> list[dict[str, Any]]:
    """The entries of a folder, and where ``recursive`` is set of those below it."""
    entries: dict[str, dict[str, Any]] = {}
    for path, content in files.items():
        if not path.startswith(prefix):
            continue
        parts = path.removeprefix(prefix).split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            above = prefix + "/".join(parts[:depth])
            entries[above] = {"type": "directory", "path": above, "oid": "0" * 40, "size": 0}
        if recursive or len(parts) == 1:
            entry: dict[str, Any] = {"type": "file", "path": path, "oid": "0" * 40, "size": len(content)}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries[path] = entry
    if prefix and not entries:
        raise _Refusal(404, code="EntryNotFound", message=f"{prefix} does not exist")
    return list(entries.values())


@contextmanager
def running_hub() -> Iterator[FakeHub]:
    """A hub without repositories, gone at the end."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Request)
    hub = FakeHub(server)
    server.RequestHandlerClass = type("Request", (_Request,), {"hub": hub})
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        hub.close()
