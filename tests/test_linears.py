"""Which matrices of a block can be pruned, which the user leaves out, and what enters them."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch
from architectures import VARIANTS, build
from tiny_checkpoints import write_checkpoint
from torch import Tensor, nn

from compressor.errors import UsageError
from compressor.linears import IgnoreRules, PrunableMatrix, observe_inputs, prunable_matrices
from compressor.models.checkpoint import open_checkpoint
from compressor.models.source import LoadedSource, open_source

CPU = torch.device("cpu")
NOTHING = IgnoreRules()
# Sums of a few dozen float32 products in another order differ by about 1e-6.
TOLERANCE = 1e-5


def source_of(folder: Path, name: str = "llama") -> LoadedSource:
    """A tiny model of one variant."""
    return open_source(open_checkpoint(write_checkpoint(folder, name)), CPU)


def matrices_of(block: nn.Module, *patterns: str) -> list[PrunableMatrix]:
    """The matrices of the first block."""
    return prunable_matrices(block, "model.layers.0", IgnoreRules(patterns))


def observed(source: LoadedSource, block: nn.Module, hidden: Tensor) -> dict[str, Tensor]:
    """What entered each matrix while the block ran on ``hidden``."""
    seen: dict[str, list[Tensor]] = defaultdict(list)
    with torch.no_grad(), observe_inputs(block, matrices_of(block), lambda name, X: seen[name].append(X)):
        source.forward(0, block, hidden)
    return {name: torch.cat(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_linears_are_all_matrices_of_a_block(tmp_path: Path, name: str) -> None:
    """Every 2-D weight of a block is found once, except routers; experts count one by one."""
    block = source_of(tmp_path, name).block_structure(0)
    found = matrices_of(block)
    assert len({matrix.name for matrix in found}) == len(found)
    everything = {path: p.numel() for path, p in block.named_parameters() if p.ndim >= 2}
    routers = {path for path in everything if path.endswith("mlp.gate.weight")}
    assert len(routers) == (1 if name in ("mixtral", "qwen3_moe") else 0)
    assert {matrix.parameter for matrix in found} == everything.keys() - routers
    assert sum(matrix.of(block).numel() for matrix in found) == sum(everything.values()) - sum(
        everything[path] for path in routers
    )


def test_linears_view_the_stored_weight() -> None:
    """Writing to a matrix or a mask's view writes to the parameter, transposed ones and experts included."""
    for name, path in (("gpt2", "mlp.c_fc.weight"), ("mixtral", "mlp.experts.down_proj[2]")):
        block = build(name).get_decoder().get_submodule("h" if name == "gpt2" else "layers")[0]
        [matrix] = [matrix for matrix in matrices_of(block) if matrix.name == path]
        parameter = block.get_parameter(matrix.parameter)
        mask = torch.ones_like(parameter, dtype=torch.bool)
        matrix.of(block)[0, 1] = 9.0
        matrix.of_mask(mask)[0, 1] = False
        place = (1, 0) if name == "gpt2" else (2, 0, 1)
        assert parameter[place] == 9.0
        assert not mask[place]
        assert int((~mask).sum()) == 1


def test_linears_have_outputs_first() -> None:
    """GPT-2 stores (in, out); its matrices are (out, in) like all others."""
    block = build("gpt2").get_decoder().h[0]
    shapes = {matrix.name: tuple(matrix.of(block).shape) for matrix in matrices_of(block)}
    assert shapes["attn.c_attn.weight"] == (96, 32)
    assert shapes["mlp.c_fc.weight"] == (56, 32)


@pytest.mark.parametrize(
    ("pattern", "left_out"),
    [
        ("model.layers.0.mlp.up_proj", {"mlp.up_proj.weight"}),
        ("model.layers.0.mlp.up_proj.weight", {"mlp.up_proj.weight"}),
        ("*.up_proj", {"mlp.up_proj.weight"}),
        ("*.mlp", {"mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.down_proj.weight"}),
        ("re:.*(gate|up)_proj$", {"mlp.up_proj.weight", "mlp.gate_proj.weight"}),
        ("model.layers.1", set()),
        ("up_proj", set()),
    ],
)
def test_linears_leave_out_what_is_ignored(pattern: str, left_out: set[str]) -> None:
    """Globs and regular expressions are held against full names, with and without .weight, and modules."""
    block = build("llama").get_decoder().layers[0]
    names = {matrix.name for matrix in matrices_of(block)}
    assert names - {matrix.name for matrix in matrices_of(block, pattern)} == left_out


@pytest.mark.parametrize("ending", ["down_proj.1", "down_proj[1]"])
def test_linears_ignore_single_experts(ending: str) -> None:
    """One expert can be named with a dot or in brackets; the others stay."""
    block = build("mixtral").get_decoder().layers[0]
    names = {matrix.name for matrix in matrices_of(block)}
    assert names - {matrix.name for matrix in matrices_of(block, f"model.layers.0.mlp.experts.{ending}")} == {
        "mlp.experts.down_proj[1]"
    }


@pytest.mark.parametrize("pattern", ["lm_head", "*embed_tokens*", "model.norm", "*.1.*", "re:.*k_proj"])
def test_ignore_rules_accept_what_the_model_has(tmp_path: Path, pattern: str) -> None:
    """Patterns for parts that are never pruned, or for any block, match something."""
    IgnoreRules((pattern,)).check_all_matched(source_of(tmp_path))


def test_ignore_rules_refuse_what_matches_nothing(tmp_path: Path) -> None:
    """The first pattern without a match is named, with an example of a name."""
    with pytest.raises(UsageError, match="up_project") as refused:
        IgnoreRules(("*.up_proj", "*.up_project")).check_all_matched(source_of(tmp_path))
    assert refused.value.error_id == "E-IGNORE-NO-MATCH"
    assert "model.layers.0.self_attn.q_proj.weight" in refused.value.remedy


def test_ignore_rules_refuse_to_leave_nothing(tmp_path: Path) -> None:
    """Patterns that leave no matrix to prune are refused."""
    with pytest.raises(UsageError) as refused:
        IgnoreRules(("model.layers",)).check_all_matched(source_of(tmp_path))
    assert refused.value.error_id == "E-IGNORE-EVERYTHING"


def test_ignore_rules_refuse_a_broken_expression() -> None:
    """A regular expression that is none is a usage error."""
    with pytest.raises(UsageError) as refused:
        IgnoreRules(("re:*(",))
    assert refused.value.error_id == "E-IGNORE-REGEX"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
def test_observed_inputs_explain_the_outputs(tmp_path: Path, name: str) -> None:
    """X Wᵀ plus bias is what each linear gives, for all tokens of all windows."""
    source = source_of(tmp_path, name)
    block = source.load_block(0)
    outputs: dict[str, Tensor] = {}
    for matrix in matrices_of(block):
        module = block.get_submodule(matrix.parameter.rpartition(".")[0])
        module.register_forward_hook(lambda _m, _a, out, key=matrix.name: outputs.__setitem__(key, out))
    seen = observed(source, block, source.embed(torch.randint(3, 100, (2, 9))))
    for matrix in matrices_of(block):
        bias = getattr(block.get_submodule(matrix.parameter.rpartition(".")[0]), "bias", None)
        expected = outputs[matrix.name].flatten(0, 1) - (0 if bias is None else bias)
        torch.testing.assert_close(
            seen[matrix.name] @ matrix.of(block).T, expected, rtol=TOLERANCE, atol=TOLERANCE
        )


def slow_routing(block: nn.Module, entering: Tensor) -> dict[str, Tensor]:
    """What enters each expert's matrices, token by token and choice by choice."""
    experts, found = block.mlp.experts, defaultdict(list)
    _, _, chosen = block.mlp.gate(entering)
    for token, experts_of_token in zip(entering, chosen.tolist(), strict=True):
        for expert in sorted(experts_of_token):
            gate, up = (experts.gate_up_proj[expert] @ token).chunk(2)
            found[f"mlp.experts.gate_up_proj[{expert}]"].append(token)
            found[f"mlp.experts.down_proj[{expert}]"].append(nn.functional.silu(gate) * up)
    return {name: torch.stack(rows) for name, rows in found.items()}


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_observed_inputs_of_experts_are_their_tokens(tmp_path: Path, name: str) -> None:
    """An expert sees the tokens that the router sends to it and no others; compared with a slow router."""
    source = source_of(tmp_path, name)
    block = source.load_block(0)
    entering: list[Tensor] = []
    block.mlp.register_forward_pre_hook(lambda _m, args: entering.append(args[0].flatten(0, 1)))
    seen = observed(source, block, source.embed(torch.randint(3, 100, (2, 9))))
    expected = slow_routing(block, entering[0])
    assert {key for key in seen if "experts" in key} == expected.keys()
    for key, rows in expected.items():
        torch.testing.assert_close(seen[key], rows, rtol=TOLERANCE, atol=TOLERANCE)


def test_observed_inputs_leave_out_idle_experts(tmp_path: Path) -> None:
    """An expert without a token is not reported at all."""
    source = source_of(tmp_path, "mixtral")
    block = source.load_block(0)
    hidden = source.embed(torch.randint(3, 100, (1, 1)))
    seen = {name for name in observed(source, block, hidden) if "experts" in name}
    assert len(seen) == 2 * 2  # two experts for the only token, two matrices each


def test_observed_inputs_end_with_the_context(tmp_path: Path) -> None:
    """After the context is closed a block runs unobserved."""
    source = source_of(tmp_path)
    block = source.load_block(0)
    seen: list[str] = []
    with observe_inputs(block, matrices_of(block), lambda name, _: seen.append(name)):
        pass
    source.forward(0, block, source.embed(torch.randint(3, 100, (1, 4))))
    assert not seen
