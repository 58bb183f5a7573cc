"""The exported graph against PyTorch, and the contract that its names, axes and weights keep."""

from __future__ import annotations

import logging
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from architectures import VARIANTS, build
from exported_models import Exported, cut, exported, padded_tokens, real_tokens

from exporters.block_check import check_blocks
from exporters.causal_lm import LoadedParts, build_graph
from exporters.errors import ExportError

# Logits are of the order of 9 and differ in the order of float32 sums: some tens of roundings of 9 * 6e-8.
LOGIT_TOLERANCE = 2e-5


def assert_same_logits(found, model_export, tokens, tolerance=LOGIT_TOLERANCE):
    expected = real_tokens(model_export.reference(tokens), tokens)
    np.testing.assert_allclose(real_tokens(found, tokens), expected, atol=tolerance, rtol=0)


def decoded(model_export, tokens, prefill):
    """Return the logits of a run that prefills some tokens and decodes the rest one at a time."""
    batch, length = tokens["input_ids"].shape
    logits, past = model_export.run(cut(tokens, 0, prefill), model_export.empty_past(batch))
    steps = [logits]
    for position in range(prefill, length):
        logits, past = model_export.run(cut(tokens, position, position + 1), past)
        steps.append(logits)
    return np.concatenate(steps, axis=1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_matches_pytorch(variant):
    """Left-padded prefill, decoding over the cache, and a single row give PyTorch's logits; so does each block."""
    export, tokens = exported(variant), padded_tokens()
    assert_same_logits(export.run(tokens, export.empty_past(3))[0], export, tokens)
    assert_same_logits(decoded(export, tokens, prefill=6), export, tokens)
    row = {name: tensor[1:2] for name, tensor in tokens.items()}
    assert_same_logits(export.run(row, export.empty_past(1))[0], export, row)
    # One block sums over few numbers: float32 rounding keeps it two orders below the allowed difference.
    assert max(check_blocks(export.parts, export.graph).errors) < 2e-6


def test_graph_inputs_and_outputs_follow_the_contract():
    """Names, order, types and axes are what optimum's ORTModelForCausalLM looks for."""
    export = exported("qwen3")
    pairs = [f"{index}.{part}" for index in range(2) for part in ("key", "value")]
    assert list(export.inputs) == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{pair}" for pair in pairs),
    ]
    assert list(export.outputs) == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert export.inputs["input_ids"].type == "tensor(int64)"
    assert export.inputs["attention_mask"].shape == [
        "batch_size",
        "past_sequence_length + sequence_length",
    ]
    assert export.inputs["past_key_values.1.value"].shape == [
        "batch_size",
        "num_key_value_heads",
        "past_sequence_length",
        "head_dim",
    ]
    assert export.outputs["logits"].shape == ["batch_size", "sequence_length", 104]
    assert export.graph.proto.ir_version == 10


def test_graph_declares_positions_only_where_they_are_used():
    """A model with alibi biases takes no position_ids."""
    assert "position_ids" not in exported("bloom").inputs


@pytest.mark.parametrize("variant", ["llama", "gpt2", "mixtral", "gemma"])
def test_graph_stores_each_parameter_once_under_its_name(variant):
    """Initializers are the model's parameters, tied ones once, in the stored layout that is declared."""
    export = exported(variant)
    names = [weight.name for weight in export.graph.weights]
    assert sorted(names) == sorted(name for name, _ in export.model.named_parameters())
    for weight in export.graph.weights:
        parameter = export.model.get_parameter(weight.parameter)
        stored = parameter.t() if weight.transposed else parameter
        assert weight.shape == tuple(stored.shape)
        np.testing.assert_array_equal(weight.load(), stored.numpy())


def test_graph_transposes_linears_when_they_are_stored():
    """Linear layers and an untied head are stored ready to multiply; Conv1D is so already; a tied head is not."""
    llama = {weight.name: weight.transposed for weight in exported("llama").graph.weights}
    assert llama["model.layers.1.mlp.up_proj.weight"]
    assert llama["lm_head.weight"]
    assert not llama["model.embed_tokens.weight"]
    gpt2 = {weight.name: weight.transposed for weight in exported("gpt2").graph.weights}
    assert not gpt2["transformer.h.0.attn.c_attn.weight"]
    assert not gpt2["transformer.wte.weight"]
    assert "lm_head.weight" not in gpt2


def test_graph_has_no_weights_inline():
    """The message holds small constants only, and every other name that nodes read is a weight or computed."""
    export = exported("llama")
    graph = export.graph.proto.graph
    assert sum(np.prod(tensor.dims, dtype=int) for tensor in graph.initializer) < 100
    known = {value.name for value in (*graph.input, *graph.initializer)}
    known |= {weight.name for weight in export.graph.weights} | {
        n for node in graph.node for n in node.output
    }
    assert {name for node in graph.node for name in node.input if name} <= known


def test_graph_names_nodes_by_block_and_module():
    """Node names are unique, begin with the block's path, and tell the module whose weight they use."""
    graph = exported("llama").graph
    names = Counter(node.name for node in graph.proto.graph.node)
    assert max(names.values()) == 1
    assert "model.layers.1/self_attn/q_proj/MatMul" in names
    assert graph.block_outputs == ["model.layers.0/hidden_states", "model.layers.1/hidden_states"]
    in_block = Counter(name.split("/")[0] for name in names)
    assert in_block["model.layers.0"] == in_block["model.layers.1"]


def test_graph_serves_alike_blocks_with_one_template():
    """Blocks that differ in their weights only share a template, blocks of another kind have their own."""
    assert exported("llama").graph.templates == 1
    assert exported("gemma3_text").graph.templates == 2
    assert exported("smollm3").graph.templates == 2


def test_graph_follows_blocks_that_compute_with_their_number():
    """GPT-2's scaling by the block's number, which no attribute but the number shows, is exported per block."""
    model = build("gpt2", scale_attn_by_inverse_layer_idx=True)
    export, tokens = Exported(model, LoadedParts(model)), padded_tokens()
    assert export.graph.templates == 2
    assert_same_logits(export.run(tokens, export.empty_past(3))[0], export, tokens)


def test_graph_stores_bfloat16_and_computes_float32():
    """Weights are stored in bfloat16 and cast in the graph; logits equal those of the rounded model in float32."""
    model = build("llama3_rope")
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16().float())
    export, tokens = Exported(model, LoadedParts(model, torch.bfloat16)), padded_tokens()
    assert {weight.load().dtype for weight in export.graph.weights} == {np.dtype(ml_dtypes.bfloat16)}
    assert export.inputs["past_key_values.0.key"].type == "tensor(float)"
    assert_same_logits(export.run(tokens, export.empty_past(3))[0], export, tokens)
    assert max(check_blocks(export.parts, export.graph).errors) < 2e-6


def test_graph_computes_in_float16_when_the_model_does():
    """A float16 model gives a float16 graph with a float16 cache, close to PyTorch in float16."""
    model = build("gpt2").half()
    export, tokens = Exported(model, LoadedParts(model)), padded_tokens()
    assert export.inputs["past_key_values.1.value"].type == "tensor(float16)"
    assert export.outputs["logits"].type == "tensor(float16)"
    # Logits of the order of 6 carry roundings of 6 * 5e-4 in float16, a dozen of them.
    assert_same_logits(export.run(tokens, export.empty_past(3))[0], export, tokens, tolerance=4e-2)


def test_graph_rounds_a_position_bias_as_bfloat16_does():
    """Falcon's alibi bias, which the model computes in bfloat16, is the same in the graph."""
    model = build("falcon", alibi=True)
    export, tokens = Exported(model, LoadedParts(model)), padded_tokens()
    assert_same_logits(decoded(export, tokens, prefill=4), export, tokens)


def test_graph_switches_rotary_tables_with_the_length():
    """Phi-3's long and short rotary factors are chosen in the graph by the position, as in the model."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
        "original_max_position_embeddings": 8,
    }
    model = build("phi3", rope_parameters=rope, original_max_position_embeddings=8)
    export, tokens = Exported(model, LoadedParts(model)), padded_tokens()
    short = cut(tokens, 0, 7)
    assert_same_logits(export.run(tokens, export.empty_past(3))[0], export, tokens)
    assert_same_logits(export.run(short, export.empty_past(3))[0], export, short)


def test_graph_has_attention_nodes_at_opset_23():
    """From opset 23 on the attention of each block is one node, with the same logits."""
    model = build("qwen2")
    export, tokens = Exported(model, LoadedParts(model), opset=23), padded_tokens()
    operators = Counter(node.op_type for node in export.graph.proto.graph.node)
    assert operators["Attention"] == 2
    assert_same_logits(decoded(export, tokens, prefill=6), export, tokens)


class OneBlockAtATime(LoadedParts):
    """Parts whose blocks lie on the meta device except while one of them is open."""

    def __init__(self, model):
        super().__init__(model)
        self.open = 0
        self.loaded = []
        self._values = {name: tensor.clone() for name, tensor in self._tensors.items()}
        self._skeletons = list(self.blocks.modules)
        for block in self._skeletons:
            block.to("meta")

    @contextmanager
    def block(self, index):
        assert self.open == 0
        self.open += 1
        prefix = f"{self.blocks.block_name(index)}."
        block = build("qwen3").model.layers[index]
        block.load_state_dict({n.removeprefix(prefix): self._values[n] for n in self._values if prefix in n})
        yield block
        self.open -= 1

    def stored(self, name):
        self.loaded.append(name)
        return self._values[name]


def test_graph_is_built_without_loading_the_blocks_together():
    """Blocks are opened one at a time, no weight is asked for before it is written, and the result is the same."""
    model = build("qwen3")
    expected = {weight.name: weight.load() for weight in exported("qwen3").graph.weights}
    parts = OneBlockAtATime(model)
    graph = build_graph(parts)
    assert parts.loaded == []
    assert graph.proto == exported("qwen3").graph.proto
    for weight in graph.weights:
        np.testing.assert_array_equal(weight.load(), expected[weight.name])
    assert max(check_blocks(parts, graph).errors) < 2e-6


def test_block_check_names_the_block_that_differs():
    """A weight that is not the model's is found in the block where it is, also when it is NaN."""
    export = exported("llama")
    name = "model.layers.1.mlp.down_proj.weight"
    for wrong in (lambda a: a + np.float32(0.01), lambda a: a * np.float32("nan")):
        weights = [
            replace(w, load=lambda w=w, wrong=wrong: wrong(w.load())) if w.name == name else w
            for w in export.graph.weights
        ]
        with pytest.raises(ExportError, match=r"model\.layers\.1 differs") as found:
            check_blocks(export.parts, replace(export.graph, weights=weights))
        assert found.value.error_id == "E-EXPORT-BLOCK-MISMATCH"


@pytest.mark.parametrize(
    ("variant", "overrides", "opset", "error_id"),
    [
        ("llama", {}, 17, "E-EXPORT-OPSET"),
        ("llama", {}, 24, "E-EXPORT-OPSET"),
        ("falcon", {}, 23, "E-EXPORT-OPSET"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            18,
            "E-EXPORT-ROPE",
        ),
    ],
)
def test_graph_refuses_what_it_cannot_export(variant, overrides, opset, error_id):
    """Opsets and configurations that do not work are refused with an id and a remedy."""
    with pytest.raises(ExportError) as refused:
        build_graph(LoadedParts(build(variant, **overrides)), opset=opset)
    assert refused.value.error_id == error_id
    assert refused.value.remedy


def test_graph_refuses_a_model_in_bfloat16():
    """ONNX Runtime has no CPU kernels for bfloat16; the remedy says that weights may still be stored so."""
    with pytest.raises(ExportError) as refused:
        build_graph(LoadedParts(build("llama").bfloat16()))
    assert refused.value.error_id == "E-EXPORT-BFLOAT16"


def test_graph_is_built_without_a_word(caplog, capfd):
    """The exporter's own warnings and progress lines reach neither the log nor the terminal."""
    build_graph(LoadedParts(build("opt")))
    printed = capfd.readouterr()
    told = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert (told, printed.out, printed.err) == ([], "", "")
