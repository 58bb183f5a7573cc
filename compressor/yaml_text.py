"""YAML as recipes, grids and options may hold it: no tags, no key twice, no expansion without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from exporters.plain_files import read_plain

__all__ = ["read_yaml", "yaml_value"]

MAX_FILE_BYTES = 2**20
MAX_NODES = 50_000  # counted where aliases stand, so that nine lines cannot become a billion values


def read_yaml(path: Path) -> Any:
    """What a YAML file says.

    Raises:
        OSError, yaml.YAMLError, ValueError, RecursionError: It cannot be read, or is not what is allowed here.
    """
    return yaml_value(read_plain(path, MAX_FILE_BYTES).decode("utf-8"))


def yaml_value(text: str) -> Any:
    """What a YAML text says; None for an empty one.

    Raises:
        yaml.YAMLError, ValueError, RecursionError: It is no YAML, or not what is allowed here.
    """
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _expanded(node, {}) > MAX_NODES:
            raise ValueError(f"it stands for more than {MAX_NODES} values")
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes ``node`` stands for when every alias is written out; its keys are looked at on the way."""
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias stands inside what it names")
        return known[id(node)]
    known[id(node)] = 0  # under way
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        _refuse_doubled(node)
        parts = [part for pair in node.value for part in pair]
    known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def _refuse_doubled(node: yaml.MappingNode) -> None:
    """PyYAML takes the last of two equal keys without a word."""
    seen = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in seen:
                raise ValueError(f"the key {key.value[:40]!r} stands twice (line {key.start_mark.line + 1})")
            seen.add(key.value)
