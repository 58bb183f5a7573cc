"""Names that try to leave a folder, things that lie in the place of a file, and a watch over what is opened."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CANARY = "secret.safetensors"  # lies beside the folder that a reader is given, and is what it would take
FILE = "x.safetensors"  # of the folder

# ``{canary}`` is the canary's absolute path, ``{home}`` the folder's.
NAMES = {
    "absolute": "{canary}",
    "absolute with two slashes": "/{canary}",
    "absolute through dots": "{home}/../" + CANARY,
    "parent": f"../{CANARY}",
    "parent behind a dot": f"./../{CANARY}",
    "parent behind a folder": f"sub/../../{CANARY}",
    "parent behind folders": f"a/b/../../../{CANARY}",
    "parent with two slashes": f"..//{CANARY}",
    "parent a thousand times": f"{'../' * 1000}{CANARY}",
    "parent that comes back": "../{name}/../" + CANARY,
    "parent with dots left over": f"....//{CANARY}",
    "parent by backslash": f"..\\{CANARY}",
    "parent by backslash behind a folder": f"sub\\..\\..\\{CANARY}",
    "parent by both": f"..\\../{CANARY}",
    "parent behind a blank": f" ../{CANARY}",
    "parent behind a line": f"x\n../{CANARY}",
    "parent in percent": f"%2e%2e/{CANARY}",
    "parent and slash in percent": f"%2e%2e%2f{CANARY}",
    "slash in percent": f"..%2f{CANARY}",
    "slash in percent twice": f"..%252f{CANARY}",
    "parent in one sign": f"\u2025/{CANARY}",
    "parent in wide dots": f"\uff0e\uff0e/{CANARY}",
    "parent and wide slash": f"..\uff0f{CANARY}",
    "parent and division slash": f"..\u2215{CANARY}",
    "parent and fraction slash": f"..\u2044{CANARY}",
    "parent and wide backslash": f"..\uff3c{CANARY}",
    "parent behind nothing": f"\u200b../{CANARY}",
    "written backwards": f"\u202e../{CANARY}",
    "with a NUL": f"{FILE}\0",
    "with a NUL and more": f"{FILE}\0/../../{CANARY}",
    "with a NUL in percent": f"../{CANARY}%00",
    "with half a character": "\ud800.safetensors",
    "drive": f"C:\\{CANARY}",
    "drive with a slash": f"C:/{CANARY}",
    "drive without": f"C:{CANARY}",
    "share": f"\\\\server\\share\\{CANARY}",
    "share with slashes": f"//server/share/{CANARY}",
    "device share": f"\\\\?\\C:\\{CANARY}",
    "raw device": "\\\\.\\PhysicalDrive0",
    "second stream": f"{FILE}::$DATA",
    "address of a file": "file://{canary}",
    "address of a host": f"http://127.0.0.1/{CANARY}",
    "home": f"~/{CANARY}",
    "home of root": f"~root/{CANARY}",
    "home by variable": f"$HOME/{CANARY}",
    "command": "$(touch canary).safetensors",
    "command of old": "`touch canary`.safetensors",
    "console": "CON",
    "printer": "LPT1.safetensors",
    "null device": "NUL.safetensors",
    "zeros": "/dev/zero",
    "standard input": "/dev/stdin",
    "environment": "/proc/self/environ",
    "memory": "/proc/self/mem",
    "descriptor": "/proc/self/fd/0",
    "root of a process": "/proc/self/root/etc/hostname",
    "through the working folder": f"/proc/self/cwd/{CANARY}",
    "nothing": "",
    "here": ".",
    "above": "..",
    "root": "/",
    "blank": " ",
    "option": "-rf.safetensors",
    "name of 300": f"{'a' * 300}.safetensors",
    "path of 6000": f"{'a/' * 3000}{FILE}",
}


def _socket(place: Path, _: Path) -> None:
    working = os.getcwd()
    os.chdir(place.parent)  # an address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(place.name)
    finally:
        os.chdir(working)


def _chain(place: Path, canary: Path) -> None:
    (place.parent / "one").symlink_to(canary)
    (place.parent / "two").symlink_to("one")
    place.symlink_to("two")


# What lies at the place of a file of the folder, made from that place and the canary.
THINGS: dict[str, Callable[[Path, Path], object]] = {
    "link out": lambda place, canary: place.symlink_to(canary),
    "link out through the parent": lambda place, canary: place.symlink_to(f"../{canary.name}"),
    "link to a link out": _chain,
    "link in a circle": lambda place, _: place.symlink_to(place.name),
    "link to nothing": lambda place, canary: place.symlink_to(canary.with_name("nothing")),
    "link to zeros": lambda place, _: place.symlink_to("/dev/zero"),
    "link to the environment": lambda place, _: place.symlink_to("/proc/self/environ"),
    "link to memory": lambda place, _: place.symlink_to("/proc/self/mem"),
    "link to standard input": lambda place, _: place.symlink_to("/dev/stdin"),
    "link to a folder": lambda place, canary: place.symlink_to(canary.parent),
    "pipe": lambda place, _: os.mkfifo(place),
    "socket": _socket,
    "folder": lambda place, _: place.mkdir(),
}

_opened: list[str] | None = None


def _listen(event: str, arguments: tuple[object, ...]) -> None:
    if _opened is not None and event == "open" and isinstance(arguments[0], (str, bytes)):
        _opened.append(os.path.realpath(os.fsdecode(arguments[0])))


sys.addaudithook(_listen)  # stays for the life of the process; it costs nothing while nobody watches


@contextmanager
def nothing_outside(home: Path) -> Iterator[None]:
    """Meanwhile Python opens neither the canary beside ``home``, nor a device, nor a file of the system."""
    global _opened
    _opened = []
    try:
        yield
    finally:
        opened, _opened = _opened, None
    forbidden = ("/dev/zero", "/dev/stdin", "/proc/", "/etc/", os.path.realpath(home.parent / CANARY))
    assert [path for path in opened if path.startswith(forbidden)] == []
