"""Seeded mutations of a file: of its bytes, of the numbers in its text, of the tree that it stands for."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

NUMBERS = (0, 1, -1, 7, 255, 65_536, 2**31 - 1, 2**31, 2**53, 2**62, 2**63 - 1, -(2**63), 2**64, 10**30)
VALUES: tuple[Any, ...] = (
    None, True, False, "", "x" * 5000, "../../etc/passwd", "/etc/passwd", "\0", "😀", "NaN", [], {}, [[[[]]]],
    {"a": {"b": 1}}, 1e308, float("nan"), float("inf"), *NUMBERS,
)  # fmt: skip
YAML = (
    "!!python/object/apply:os.system ['touch canary']", "!!python/name:os.system", "&a [*a]", "{", "[", "'", "\t- x",
    "<<: *a", "? x", "%YAML 9.9", "2:4", "0x7f", "1e999", "~",
)  # fmt: skip
_NEST = "a deep nest comes here"
Mutation = Callable[[bytes, random.Random], bytes]


def mutated(content: bytes, kind: str, rng: random.Random) -> bytes:
    """``content`` after one to three mutations that suit its kind: ``binary``, ``json`` or ``yaml``."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        content = rng.choice(_BY_KIND[kind])(content, rng)
    return content


def _place(content: bytes, rng: random.Random) -> int:
    """A place in the file; its first kilobyte, where headers are, half of the time."""
    end = min(len(content), 1024) if rng.random() < 0.5 else len(content)
    return rng.randrange(end) if end else 0


def _flip(content: bytes, rng: random.Random) -> bytes:
    if not content:
        return b"\0"
    changed, place = bytearray(content), _place(content, rng)
    changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _overwrite(content: bytes, rng: random.Random) -> bytes:
    place, length = _place(content, rng), rng.choice((1, 2, 4, 8, 64))
    return content[:place] + rng.randbytes(length) + content[place + length :]


def _number(content: bytes, rng: random.Random) -> bytes:
    """A machine number of eight bytes or four."""
    place, size = _place(content, rng), rng.choice((4, 8))
    value = rng.choice(NUMBERS) % 2 ** (8 * size)
    return content[:place] + value.to_bytes(size, "little") + content[place + size :]


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def _remove(content: bytes, rng: random.Random) -> bytes:
    place = _place(content, rng)
    return content[:place] + content[place + rng.choice((1, 2, 8, 100)) :]


def _repeat(content: bytes, rng: random.Random) -> bytes:
    place, length = _place(content, rng), rng.choice((1, 8, 200))
    return (
        content[: place + length] + content[place : place + length] * rng.choice((1, 3, 50)) + content[place:]
    )


def _digits(content: bytes, rng: random.Random) -> bytes:
    """Another number in the place of one that stands in the text."""
    found = list(re.finditer(rb"-?\d+(\.\d+)?", content[:200_000]))
    if not found:
        return _flip(content, rng)
    match = rng.choice(found)
    return content[: match.start()] + str(rng.choice(NUMBERS)).encode() + content[match.end() :]


def _tree(content: bytes, rng: random.Random) -> bytes:
    """Another value, a missing or a doubled key, or a deep nest, somewhere in the JSON tree."""
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return _flip(content, rng)
    nodes = list(_nodes(tree))
    if not nodes:
        return b"[]"
    parent, key = rng.choice(nodes)
    action = rng.randrange(5)
    if action == 0:
        del parent[key]
    elif action == 1:
        parent[key] = _NEST
    elif action == 2 and isinstance(parent, dict):
        parent[str(rng.choice(VALUES))[:50]] = parent[key]
    elif action == 3 and isinstance(parent[key], str):
        parent[key] = parent[key][::-1]
    else:
        parent[key] = rng.choice(VALUES)
    depth = rng.choice((3, 200, 3000, 100_000))
    text = json.dumps(tree).replace(json.dumps(_NEST), "[" * depth + "1" + "]" * depth)
    return text.encode("utf-8", "surrogatepass")


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict | list):
            for key in list(node if isinstance(node, dict) else range(len(node)))[:300]:
                yield node, key
                waiting.append(node[key])


def _line(content: bytes, rng: random.Random) -> bytes:
    """Another value behind a key, a line more, or one in another place."""
    lines = content.decode("utf-8", "replace").splitlines() or [""]
    place = rng.randrange(len(lines))
    key = lines[place].partition(":")[0]
    choices = (
        f"{key}: {rng.choice(YAML)}",
        f"{key}: {rng.choice(VALUES)}",
        rng.choice(YAML),
        lines[place] * 2,
    )
    lines[place] = rng.choice(choices)
    if rng.random() < 0.2:
        rng.shuffle(lines)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


_BYTES: tuple[Mutation, ...] = (_flip, _overwrite, _number, _cut, _remove, _repeat)
_BY_KIND: dict[str, tuple[Mutation, ...]] = {
    "binary": (*_BYTES, _digits),
    "json": (*_BYTES, _digits, _tree, _tree, _tree, _tree),
    "yaml": (*_BYTES, _digits, _line, _line, _line),
}
