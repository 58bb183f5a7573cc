"""A block's attention becomes one node where every step of it is known, and means what the nodes meant."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from architectures import VARIANTS, build
from exported_models import Exported, cut, exported, padded_tokens
from numpy.typing import NDArray
from small_graphs import op_types, results

from compressor.recipe import ExportRecipe
from exporters.attention_function import attention_function, called_nodes
from exporters.block_check import check_blocks
from exporters.cached_attention import attention_functions, join_cached_attention
from exporters.causal_lm import BlockGraph, LoadedParts, build_graph
from exporters.densify import densify
from exporters.errors import ExportError
from exporters.packed_function import DOMAIN
from exporters.packed_graph import pack_graph
from exporters.read import read_model
from exporters.wire import write_model

ROTARY, CACHED = "RotaryAttention", "CachedAttention"

# Gemma 2 bounds its scores before the mask, BLOOM multiplies in three axes and adds its position bias before the mask.
OPERATORS: Mapping[str, list[str]] = {
    **{name: [ROTARY, ROTARY] for name in VARIANTS},
    "gpt2": [CACHED, CACHED],
    "opt": [CACHED, CACHED],
    "smollm3": [ROTARY, CACHED],
    "gemma2": [],
    "bloom": [],
}


def own_nodes(proto: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in proto.graph.node if node.domain == DOMAIN]


def joined(name: str, **overrides: Any) -> Exported:
    model = build(name, **overrides)
    return Exported(model, LoadedParts(model), joined_attention=True)


def assert_same(found: Any, expected: Any) -> None:
    """Logits and caches: both sides sum the same numbers in another order."""
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=2e-5)
    assert found[1].keys() == expected[1].keys()
    for name, cache in expected[1].items():
        np.testing.assert_allclose(found[1][name], cache, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compute_the_same_with_joined_attention(name: str) -> None:
    """Prompt, padded rows, and tokens behind a cache; the first cache may be empty and of a wrong width."""
    plain, one = exported(name), joined(name)
    assert own_nodes(one.graph.proto) == OPERATORS[name]
    assert {function.name for function in one.graph.proto.functions} == set(OPERATORS[name])
    tokens = padded_tokens()
    empty = {part: np.zeros((3, 1, 0, 3), np.float32) for part in plain.empty_past(3)}
    first, rest = cut(tokens, 0, 7), cut(tokens, 7, 11)
    prompt = plain.run(first, plain.empty_past(3))
    assert_same(one.run(first, empty), prompt)
    assert_same(one.run(rest, prompt[1]), plain.run(rest, prompt[1]))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {"num_key_value_heads": 4}),
        (
            "gpt_neox",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}},
        ),
        (
            "phi3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        ),
    ],
)
def test_other_forms_of_variants_compute_the_same(name: str, overrides: dict[str, Any]) -> None:
    """A key head for each query head; heads that are rotated wholly or partly where the variant's are not."""
    model, one = build(name, **overrides), joined(name, **overrides)
    plain, tokens = Exported(model, LoadedParts(model)), padded_tokens()
    assert own_nodes(one.graph.proto) == [ROTARY, ROTARY]
    assert_same(one.run(tokens, one.empty_past(3)), plain.run(tokens, plain.empty_past(3)))


def test_joined_blocks_are_checked_against_pytorch() -> None:
    """A block that is cut out brings the functions that its nodes call."""
    one = joined("smollm3")
    assert max(check_blocks(one.parts, one.graph).errors) < 2e-6


def test_numbers_around_the_scores_are_one_scale() -> None:
    """OPT scales its queries before they are apart, Llama queries and keys, each by a root."""
    for name, width in (("opt", 8), ("llama", 8), ("qwen3", 16)):
        node = next(node for node in joined(name).graph.proto.graph.node if node.domain == DOMAIN)
        given = {attribute.name: attribute for attribute in node.attribute}
        assert given["scale"].f == pytest.approx(width**-0.5, rel=1e-6)
        assert (given["num_heads"].i, given["kv_heads"].i) == (4, 4 if name == "opt" else 2)


def test_other_types_and_newer_operators_stay() -> None:
    """The operators compute in float32; at opset 23 PyTorch's exporter has one node for attention itself."""
    half, newer = build("llama").half(), build("llama")
    for graph in (
        build_graph(LoadedParts(half), joined_attention=True),
        build_graph(LoadedParts(newer), opset=23, joined_attention=True),
    ):
        assert own_nodes(graph.proto) == []
        assert not graph.proto.functions


# An attention of 6 query heads of which each 3 share a key head; {} are what the cases change.
GRAPH = """
<ir_version: 10, opset_import: ["" : 18]>
attention (float[B, S, 24] Q, float[B, S, 8] K, float[B, S, 8] V, float[B, 2, P, 4] past_k, float[B, 2, P, 4] past_v,
           float[{mask}] mask, float[B, 1, S, {width}] cos, float[B, 1, S, {width}] sin)
  => (float[{y}] y, float[B, 2, T, 4] keys, float[B, 2, T, 4] values{outputs})
<int64[4] split = {{0, 0, -1, 4}}, int64[4] two = {{0, 2, -1, 0}}, int64[4] six = {{0, 6, -1, 0}},
 {flat}, float half = {{0.5}}, float[1] third = {{0.333}}, float[4] many = {{1, 2, 3, 4}},
 float[{y}] joined, float[B, S, 6, 4] q_apart, float[B, S, 2, 4] k_apart, float[B, S, 2, 4] v_apart,
 float[B, 6, S, 4] q, float[B, 2, S, 4] k, float[B, 2, S, 4] v,
 float[B, 6, S, 2] q1, float[B, 6, S, 2] q2, float[B, 2, S, 2] k1, float[B, 2, S, 2] k2,
 float[B, 6, S, 4] q_turned, float[B, 2, S, 4] k_turned>
{{
  q_apart = Reshape (Q, split)
  k_apart = Reshape (K, split)
  v_apart = Reshape (V, split)
  q = Transpose <perm = [0, 2, 1, 3]> (q_apart)
  k = Transpose <perm = [0, 2, 1, 3]> (k_apart)
  v = Transpose <perm = [0, 2, 1, 3]> (v_apart)
  {rotation}
  keys = Concat <axis = {axis}> (past_k, {key})
  values = Concat <axis = -2> (past_v, v)
  turned = Transpose <perm = [0, 1, 3, 2]> (keys)
  rows = Reshape ({query}, two)
  {scores}
  softmaxed = Softmax <axis = {softmax}> (masked)
  weights = Reshape (softmaxed, two)
  weighted = MatMul (weights, {weighed})
  heads = Reshape (weighted, six)
  tokens = Transpose <perm = [{tokens}]> (heads)
  joined = Reshape (tokens, flat)
  y = Abs (joined)
}}
"""
ROTATION = """
  q_cos = Mul (q, {cos_of_q}) q1, q2 = Split <axis = -1, num_outputs = 2> (q)
  q_swapped = Concat <axis = -1> ({swapped}) q_sin = Mul (sin, q_swapped) q_turned = Add (q_sin, q_cos)
  k_cos = Mul (cos, k) k1, k2 = Split <axis = -1, num_outputs = 2> (k)
  k_swapped = Concat <axis = -1> (k2, k1) k_sin = Mul (k_swapped, sin) k_turned = Add (k_cos, k_sin)
"""
ROTATED = {
    "rotation": ROTATION.format(cos_of_q="cos", swapped="q2, q1"),
    "query": "q_turned",
    "key": "k_turned",
}
USUAL = {
    "mask": "B, 1, S, T",
    "width": "4",
    "outputs": "",
    "y": "B, S, 24",
    "flat": "int64[3] flat = {0, 0, -1}",
    "rotation": "",
    "query": "q",
    "key": "k",
    "axis": "2",
    "scores": "score_rows = MatMul (rows, turned) scores = Reshape (score_rows, six) masked = Add (scores, mask)",
    "softmax": "-1",
    "weighed": "values",
    "tokens": "0, 2, 1, 3",
}


def parsed(**changes: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(GRAPH.format(**USUAL | changes)))


def with_functions(model: ir.Model) -> ir.Model:
    proto = ir.serde.serialize_model(model)
    proto.functions.extend(attention_functions(model.graph, 18))
    proto.opset_import.append(onnx.helper.make_opsetid(DOMAIN, 1))
    return ir.serde.deserialize_model(proto)


def feeds(mask: tuple[int, ...], past: int, length: int = 3) -> dict[str, NDArray[np.float32]]:
    generator = np.random.default_rng(past)
    sizes: dict[str, tuple[int, ...]] = {
        "Q": (2, length, 24),
        "K": (2, length, 8),
        "V": (2, length, 8),
        "past_k": (2, 2, past, 4),
        "past_v": (2, 2, past, 4),
        "mask": mask,
        "cos": (2, 1, length, 4),
        "sin": (2, 1, length, 4),
    }
    return {name: generator.standard_normal(size).astype(np.float32) for name, size in sizes.items()}


SCALED = "q_scaled = Mul (half, rows) k_scaled = Div (turned, third) scored = MatMul (q_scaled, k_scaled)"


@pytest.mark.parametrize(
    ("changes", "operator", "mask"),
    [
        ({}, CACHED, (2, 1, 3, 8)),
        ({"axis": "-2", "mask": "1, 6, 1, T", "softmax": "3"}, CACHED, (1, 6, 1, 8)),
        ({"scores": USUAL["scores"].replace("scores, mask", "mask, scores")}, CACHED, (2, 1, 3, 8)),
        (
            {"scores": f"{SCALED} more = Mul (scored, half) s = Reshape (more, six) masked = Add (s, mask)"},
            CACHED,
            (2, 1, 3, 8),
        ),
        ({"y": "N, 24", "flat": "int64[2] flat = {-1, 24}"}, CACHED, (2, 1, 3, 8)),
        (ROTATED, ROTARY, (2, 1, 3, 8)),
        # Keys and queries that are not rotated alike keep their own nodes.
        (
            {**ROTATED, "rotation": ROTATION.format(cos_of_q="sin", swapped="q2, q1")},
            CACHED,
            (2, 1, 3, 8),
        ),
        ({**ROTATED, "rotation": ROTATION.format(cos_of_q="cos", swapped="q1, q2")}, CACHED, (2, 1, 3, 8)),
        ({**ROTATED, "key": "k"}, CACHED, (2, 1, 3, 8)),
    ],
)
def test_attention_becomes_one_node(changes: dict[str, str], operator: str, mask: tuple[int, ...]) -> None:
    """With numbers at any of its factors and masks that are spread; y and both caches are the same."""
    model, after = (parsed(**changes) for _ in range(2))
    join_cached_attention(after.graph)
    found = op_types(after.graph)
    assert found.count(operator) == 1
    assert not {"Softmax", "MatMul"} & set(found)
    if operator == ROTARY or "rotation" not in changes:
        assert found == [operator, *(["Reshape"] if "flat" in changes else []), "Abs"]
    assert [value.name for value in model.graph.inputs] == [value.name for value in after.graph.inputs]
    given = feeds(mask, past=5)
    for one, other in zip(results(with_functions(after), given), results(model, given), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"softmax": "1"},
        {"axis": "1"},
        {"tokens": "0, 2, 3, 1"},
        {"mask": "B, 1, S, 1"},
        {"mask": "B, 3, S, T"},
        {"mask": "B, 1, 2, T"},
        {"mask": "B, 1, S, L"},
        {"mask": "S, T"},
        {"y": "B, N, 24"},
        {"y": "N, 24", "flat": "int64[2] flat = {0, 24}"},
        {"outputs": ", float[B, S, 24] joined"},
        {"outputs": ", float[B, 6, S, T] softmaxed"},
        {"outputs": ", float[B, 2, L, T] score_rows"},
        {"weighed": "keys"},
        {"scores": USUAL["scores"].replace("Add (scores, mask)", "Mul (scores, mask)")},
        {"scores": USUAL["scores"].replace("Add (scores, mask)", "Tanh (scores)")},
        {
            "scores": "score_rows = MatMul (rows, turned) s = Reshape (score_rows, six) t = Tanh (s) "
            "masked = Add (t, mask)"
        },
        {
            "scores": "q_scaled = Mul (rows, many) s = MatMul (q_scaled, turned) t = Reshape (s, six) "
            "masked = Add (t, mask)"
        },
        {"scores": "s = MatMul (rows, turned) t = Reshape (s, two) masked = Add (t, mask)"},
        {"scores": USUAL["scores"] + " other = Shape (keys)", "outputs": ", int64[4] other"},
        {
            "scores": "inverse = Div (half, rows) s = MatMul (inverse, turned) t = Reshape (s, six) "
            "masked = Add (t, mask)"
        },
    ],
)
def test_anything_else_stays(changes: dict[str, str]) -> None:
    """Another axis, mask, cache or step between, or another use of what lies between: the graph is left as it is."""
    model = parsed(**changes)
    before = ir.serde.serialize_model(model)
    join_cached_attention(model.graph)
    assert ir.serde.serialize_model(model) == before


@pytest.mark.parametrize(
    ("settings", "joins"),
    [
        ({}, False),
        ({"dtype": "float16"}, False),
        ({"dtype": "int8"}, True),
        ({"encoding": "packed"}, True),
        ({"dtype": "int4", "attention": "standard"}, False),
    ],
)
def test_only_packed_exports_join_attention(settings: dict[str, Any], joins: bool) -> None:
    """By default; ``export.attention: standard`` keeps standard operators there too."""
    assert ExportRecipe(**settings).joins_attention is joins


def packed_file(graph: BlockGraph, path: Path, pruned: set[str] = frozenset()) -> onnx.ModelProto:  # type: ignore[assignment]
    """The graph written as a packed export, and its nodes."""
    made = pack_graph(graph.proto, graph.weights, pruned=pruned, quantized={}, activation_bits=32)
    write_model(made.proto, made.weights, path, f"{path.name}.data", encoding="packed", pruned=pruned)
    onnx.checker.check_model(str(path))
    return made.proto


def test_packed_files_have_the_domain_once(tmp_path: Path) -> None:
    """With weights that are packed, and without any; each operator of ours has its function."""
    model = build("llama")
    name = "model.layers.0.mlp.up_proj.weight"
    model.get_parameter(name)[torch.rand(56, 32, generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    for pruned, operators in ((set(), {ROTARY}), ({name}, {ROTARY, "SparseMatMul"})):
        graph = build_graph(LoadedParts(model), joined_attention=True)
        proto = packed_file(graph, tmp_path / "model.onnx", pruned)
        assert set(own_nodes(proto)) == operators == {function.name for function in proto.functions}
        assert [entry.domain for entry in proto.opset_import].count(DOMAIN) == 1


def optimised(path: Path) -> tuple[Counter[str], onnxruntime.InferenceSession]:
    """How many nodes of each operator stock ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(path.with_suffix(".optimised"))
    options.log_severity_level = 3  # that it is optimised for this machine
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node
    return Counter(node.op_type for node in nodes), session


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("llama", {}),
        ("llama", {"num_key_value_heads": 4}),
        ("qwen3", {}),
        ("gpt2", {}),
        ("falcon", {}),
        ("smollm3", {}),
        ("gpt_neox", {}),
    ],
)
def test_dense_rivals_of_packed_exports_run_as_standard_exports(
    tmp_path: Path, name: str, overrides: dict[str, Any]
) -> None:
    """Stock ONNX Runtime runs the same nodes; only the sizes that all blocks share are constants, not computed."""
    model = build(name, **overrides)
    standard = build_graph(LoadedParts(model))
    write_model(
        standard.proto, standard.weights, tmp_path / "standard.onnx", "standard.onnx.data", encoding="dense"
    )
    packed_file(build_graph(LoadedParts(model), joined_attention=True), tmp_path / "packed.onnx")
    densify(read_model(tmp_path / "packed.onnx"), tmp_path / "rival.onnx")
    rival = onnx.load(str(tmp_path / "rival.onnx"), load_external_data=False)
    assert own_nodes(rival) == []
    assert not rival.functions
    (expected, _), (found, session) = (
        optimised(tmp_path / "standard.onnx"),
        optimised(tmp_path / "rival.onnx"),
    )
    assert found - expected == {}
    # GPT-NeoX reshapes each block's output to the shape that it has.
    assert expected - found <= Counter(Concat=2, Reshape=2 if name == "gpt_neox" else 0)
    plain = Exported(model, LoadedParts(model))
    one, tokens = joined(name, **overrides), padded_tokens()
    one.session = session
    assert_same(one.run(tokens, one.empty_past(3)), plain.run(tokens, plain.empty_past(3)))


@pytest.mark.parametrize("broken", ["inputs", "outputs", "attributes", "graph", "reference"])
def test_attention_that_its_function_does_not_fit_is_refused(broken: str) -> None:
    """Before anything is made of it."""
    function = attention_function(CACHED, rows=False, widths=(), apart=(), opset=18)
    inputs, outputs = [*"qkv", "past_k", "past_v", "mask"], ["y", "keys", "values"]
    attributes = {"num_heads": 4, "kv_heads": 4, "scale": 0.5}
    if broken == "inputs":
        inputs.pop()
    elif broken == "outputs":
        outputs.pop()
    elif broken == "attributes":
        del attributes["scale"]
    elif broken == "graph":
        inner = onnx.helper.make_graph([], "inner", [], [])
        function.node.append(onnx.helper.make_node("If", ["q"], ["z"], then_branch=inner, else_branch=inner))
    else:
        function.node[0].attribute[0].ref_attr_name = "epsilon"
    node = onnx.helper.make_node(CACHED, inputs, outputs, name="a", domain=DOMAIN, **attributes)
    with pytest.raises(ExportError, match="CachedAttention with"):
        called_nodes(node, function)


def test_attention_without_its_function_is_refused(tmp_path: Path) -> None:
    """A file whose functions were taken out says no longer what to run in the place of the operator."""
    path = tmp_path / "packed.onnx"
    packed_file(build_graph(LoadedParts(build("llama")), joined_attention=True), path)
    model = read_model(path)
    del model.proto.functions[:]
    with pytest.raises(ExportError, match="without its function"):
        densify(model, tmp_path / "rival.onnx")
