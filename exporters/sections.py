"""The traced graph's nodes by the part of the model that they belong to."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from exporters.cache_room import read_past_from_mask
from exporters.trace import TracedModel

__all__ = ["EPILOGUE", "PROLOGUE", "Section", "split_sections"]

Section = int  # a template's number, or one of the two below
PROLOGUE: Section = -1
EPILOGUE: Section = -2


def split_sections(traced: TracedModel) -> dict[Section, list[ir.Node]]:
    """Return the nodes of each section in execution order.

    A node that depends on a template's inputs belongs to the template, one that depends on the hidden state
    that enters the head belongs to the epilogue, everything else is computed once and belongs to the prologue.
    """
    _share_sizes(traced)
    read_past_from_mask(traced)
    owners = _owners(traced)
    sections: dict[Section, list[ir.Node]] = {owner: [] for owner in range(len(traced.blocks))}
    sections[PROLOGUE], sections[EPILOGUE] = [], []
    for node in traced.graph:
        sections[owners[node]].append(node)
    return sections


def _share_sizes(traced: TracedModel) -> None:
    """Make every size that is read from an input be read from the first input that has it.

    The exporter reads batch, length and past from whichever input it likes; read from a block's hidden state
    they would make the prologue depend on that block.
    """
    preferred = [*traced.tokens.values(), traced.past_length]
    source: dict[str, tuple[ir.Value, int]] = {}
    for value in [*preferred, *traced.graph.inputs]:
        for axis, size in enumerate(value.shape or ()):
            if isinstance(size, ir.SymbolicDim) and size.value is not None:
                source.setdefault(size.value, (value, axis))
    inputs = set(traced.graph.inputs)
    for node in traced.graph:
        read = node.inputs[0] if node.op_type == "Shape" else None
        if read is None or read not in inputs or read.shape is None or "end" not in node.attributes:
            continue
        start, end = (node.attributes[name].as_int() for name in ("start", "end"))
        size = read.shape[start]
        if end == start + 1 and isinstance(size, ir.SymbolicDim) and size.value in source:
            first, axis = source[size.value]
            node.replace_input_with(0, first)
            node.attributes["start"] = ir.AttrInt64("start", axis)
            node.attributes["end"] = ir.AttrInt64("end", axis + 1)


def _owners(traced: TracedModel) -> dict[ir.Node, Section]:
    of_value: dict[ir.Value, Section] = {traced.head_hidden: EPILOGUE}
    for number, block in enumerate(traced.blocks):
        for value in (block.hidden, block.key, block.value, *block.weights.values()):
            of_value[value] = number
    owners: dict[ir.Node, Section] = {}
    for node in traced.graph:
        found = {of_value[value] for value in node.inputs if value is not None and value in of_value}
        found.discard(PROLOGUE)
        if len(found) > 1:
            raise RuntimeError(f"{node.op_type} {node.name} mixes parts of the model: {sorted(found)}")
        owners[node] = found.pop() if found else PROLOGUE
        of_value.update(dict.fromkeys(node.outputs, owners[node]))
    _move_late(traced.graph, owners)
    return owners


def _move_late(graph: ir.Graph, owners: dict[ir.Node, Section]) -> None:
    """Give what only the epilogue uses, such as a tied head's transposition, to the epilogue."""
    for node in reversed(graph):
        users: Sequence[Section] = [owners[use.node] for value in node.outputs for use in value.uses()]
        leaves = any(value.is_graph_output() for value in node.outputs)
        if owners[node] == PROLOGUE and users and not leaves and set(users) == {EPILOGUE}:
            owners[node] = EPILOGUE
