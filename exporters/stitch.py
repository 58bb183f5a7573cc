"""The whole graph: prologue, every block as an instance of its template with its own weights, epilogue."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from exporters.attention_function import CACHE_ROOM
from exporters.cache_room import has_cache_room
from exporters.errors import ExportError
from exporters.graph_weights import GraphWeight, WeightTable, WeightUse, onnx_dtype, weight_uses
from exporters.parts import ModelParts
from exporters.sections import EPILOGUE, PROLOGUE, Section, split_sections
from exporters.template import Template
from exporters.trace import TracedModel

__all__ = ["Stitched", "stitch"]

IR_VERSION = 10  # the newest that ONNX Runtime 1.20 reads
_BATCH, _LENGTH, _PAST = "batch_size", "sequence_length", "past_sequence_length"
_TOTAL = f"{_PAST} + {_LENGTH}"

_Axis = int | str | None


@dataclass(frozen=True)
class Stitched:
    """The graph without its weights, the weights, and the names of the hidden states between blocks."""

    model: ir.Model
    weights: list[GraphWeight]
    embedded: str
    block_outputs: list[str]


def stitch(parts: ModelParts, templates: Sequence[Template], traced: TracedModel, opset: int) -> Stitched:
    """Return the graph of the whole model, in time linear in the number of blocks.

    The traced nodes of a template are copied for every block that it serves; prologue and epilogue once.
    """
    assembly = _Assembly(parts, templates, traced)
    embedded = assembly.add_prologue()
    block_outputs = [assembly.add_block(index) for index in range(len(parts.blocks))]
    assembly.add_epilogue()
    graph = ir.Graph(
        assembly.inputs,
        assembly.outputs,
        nodes=assembly.nodes,
        initializers=[*assembly.constants, *assembly.table.constants],
        opset_imports={"": traced.opset_imports.get("", opset)},
        name="causal_lm",
    )
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="blockpress")
    if has_cache_room(traced):
        model.metadata_props[CACHE_ROOM] = "1"
    return Stitched(model, assembly.table.weights, embedded, block_outputs)


class _Assembly:
    """The graph as it grows. `_known` says which new value stands for a value of the trace."""

    def __init__(self, parts: ModelParts, templates: Sequence[Template], traced: TracedModel) -> None:
        self.table = WeightTable(parts)
        self.nodes: list[ir.Node] = []
        self._blocks = parts.blocks
        self._traced = traced
        self._sections = split_sections(traced)
        self._template_of = {index: number for number, t in enumerate(templates) for index in t.members}
        self._outer_uses = weight_uses(traced.weights)
        self._inner_uses = [weight_uses(block.weights) for block in traced.blocks]
        self._times_named: Counter[str] = Counter()
        self._known: dict[ir.Value, ir.Value] = {}
        self.constants = [self._constant(value) for value in traced.graph.initializers.values()]
        tokens = [self._token(name, value) for name, value in traced.tokens.items()]
        self._past = _past_inputs(templates, len(parts.blocks))
        self._known[traced.past_length] = self._past[0][0]
        self.inputs = [
            *(token for token in tokens if token is not None),
            *(value for pair in self._past for value in pair),
        ]
        self._hidden = traced.embedded
        self._presents: list[ir.Value] = []
        self._logits = traced.logits

    @property
    def outputs(self) -> list[ir.Value]:
        """The logits, then key and value of each block."""
        return [self._logits, *self._presents]

    def add_prologue(self) -> str:
        """Add what is computed once and return the name of the hidden state that it leaves."""
        self._copy(PROLOGUE, "prologue", self._outer_uses, "")
        axes = (_BATCH, _LENGTH, _size(self._traced.embedded, -1))
        self._hidden = self._output(self._traced.embedded, "prologue/hidden_states", axes)
        return "prologue/hidden_states"

    def add_block(self, index: int) -> str:
        """Add a copy of the block's template and return the name of its hidden state."""
        number = self._template_of[index]
        block, name = self._traced.blocks[number], self._blocks.block_name(index)
        key, value = self._past[index]
        self._known.update({block.hidden: self._hidden, block.key: key, block.value: value})
        self._copy(number, name, self._inner_uses[number], f"{name}.")
        hidden_axes = (_BATCH, _LENGTH, _size(block.hidden_out, -1))
        self._hidden = self._output(block.hidden_out, f"{name}/hidden_states", hidden_axes)
        for traced, past, part in ((block.key_out, key, "key"), (block.value_out, value, "value")):
            axes = (_BATCH, _size(past, 1), _TOTAL, _size(past, 3))
            self._presents.append(self._output(traced, f"present.{index}.{part}", axes))
        return f"{name}/hidden_states"

    def add_epilogue(self) -> None:
        """Add final norm and head."""
        self._known[self._traced.head_hidden] = self._hidden
        self._copy(EPILOGUE, "epilogue", self._outer_uses, "")
        axes = (_BATCH, _LENGTH, _size(self._traced.logits, -1))
        self._logits = self._output(self._traced.logits, "logits", axes)

    def _constant(self, traced: ir.Value) -> ir.Value:
        value = ir.Value(name=f"constant/{traced.name}", const_value=traced.const_value)
        value.type, value.shape = traced.type, traced.shape
        self._known[traced] = value
        return value

    def _token(self, name: str, traced: ir.Value) -> ir.Value | None:
        """Return the graph's input for a token input, or None for positions that the model does not use."""
        if name == "position_ids" and not traced.uses():
            return None
        axes = (_BATCH, _TOTAL if name == "attention_mask" else _LENGTH)
        self._known[traced] = ir.Value(name=name, type=traced.type, shape=ir.Shape(axes))
        return self._known[traced]

    def _output(self, traced: ir.Value, name: str, axes: Sequence[_Axis]) -> ir.Value:
        value = self._known[traced]
        value.name, value.type, value.shape = name, traced.type, ir.Shape(axes)
        return value

    def _copy(self, section: Section, prefix: str, uses: Mapping[ir.Value, WeightUse], scope: str) -> None:
        """Add copies of a section's nodes; a weight that they use is called `scope` + its name in `uses`."""
        for node in self._sections[section]:
            if node.outputs[0] in uses:
                continue  # a Transpose that storing the weight transposed makes superfluous
            _refuse_control_flow(node, prefix)
            inputs = [self._input(value, uses, scope) for value in node.inputs]
            outputs = [ir.Value(name=f"{prefix}/{value.name}") for value in node.outputs]
            self._known.update(zip(node.outputs, outputs, strict=True))
            self.nodes.append(
                ir.Node(
                    node.domain,
                    node.op_type,
                    inputs,
                    list(node.attributes.values()),
                    outputs=outputs,
                    name=self._node_name(node, prefix, uses),
                )
            )

    def _input(
        self, traced: ir.Value | None, uses: Mapping[ir.Value, WeightUse], scope: str
    ) -> ir.Value | None:
        if traced is None or traced not in uses:
            return None if traced is None else self._known[traced]
        value, cast = self.table.value(uses[traced], scope)
        if cast is not None:
            self.nodes.append(cast)
        return value

    def _node_name(self, node: ir.Node, prefix: str, uses: Mapping[ir.Value, WeightUse]) -> str:
        """Return a name that tells the module by the weight that the node uses, if it uses one."""
        weight = next(
            (uses[value].name for value in node.inputs if value is not None and value in uses), None
        )
        if weight is None:
            name = f"{prefix}/{(node.name or node.op_type).removeprefix('node_')}"
        else:
            name = "/".join([prefix, *weight.split(".")[:-1], node.op_type])
        self._times_named[name] += 1
        return name if self._times_named[name] == 1 else f"{name}_{self._times_named[name]}"


def _refuse_control_flow(node: ir.Node, where: str) -> None:
    if any(a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()):
        raise ExportError(
            "E-EXPORT-CONTROL-FLOW",
            f"{where} was traced with control flow ({node.op_type}), which cannot be copied",
            "Export a model of a supported architecture.",
        )


def _past_inputs(templates: Sequence[Template], count: int) -> list[tuple[ir.Value, ir.Value]]:
    """Return the inputs for past keys and values of each block.

    Heads and width are symbols although they are fixed: optimum's ORTModelForCausalLM makes a first, empty
    cache whose width is wrong for several architectures, and only symbols let it pass; joining something
    empty changes nothing.
    """
    shapes = [kv for _, kv in sorted((i, t.key_value) for t in templates for i in t.members)]
    past = []
    for index in range(count):
        kv = shapes[index]
        of_block = "" if len(set(shapes)) == 1 else f"_{index}"
        of_value = "" if (kv.key_heads, kv.key_dim) == (kv.value_heads, kv.value_dim) else "value_"
        axes = (f"num_{{}}key_value_heads{of_block}", f"{{}}head_dim{of_block}")
        pair = []
        for part, symbol in (("key", ""), ("value", of_value)):
            heads, width = (axis.format(symbol) for axis in axes)
            shape = ir.Shape((_BATCH, heads, _PAST, width))
            dtype = ir.TensorType(onnx_dtype(f"past_key_values.{index}.{part}", kv.dtype))
            pair.append(ir.Value(name=f"past_key_values.{index}.{part}", type=dtype, shape=shape))
        past.append((pair[0], pair[1]))
    return past


def _size(value: ir.Value, axis: int) -> _Axis:
    if value.shape is None:
        raise RuntimeError(f"the exporter gave {value.name} no shape")
    size = value.shape[axis]
    return size.value if isinstance(size, ir.SymbolicDim) else size
