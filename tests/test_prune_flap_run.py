"""Whole runs that take heads and neurons out: the ONNX file, the report, the folder beside it, and what repairs it.

Three runs are shared: layers of their own widths with shared keys, uniform widths, and an architecture that gives
up neurons alone.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from compressor import CompressionResult, Recipe, compress
from compressor.errors import UsageError
from compressor.models.checkpoint import open_checkpoint
from compressor.models.loading import load_causal_lm
from compressor.models.quiet import quiet_transformers
from compressor.models.structure import KEY
from compressor.recipe_file import read_recipe
from compressor.validation import validate_export
from exporters.read import read_model

IDS = torch.randint(4, tiny_models.TOKENS, (2, 12), generator=torch.Generator().manual_seed(3))
KL = {"finish__method": "kl", "finish__epochs": 2, "finish__lr": 1e-3, "finish__batch_size": 4}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Run:
    """A validated run and what went in.

    Attributes:
        model: The dense model's folder.
        recipe: What was asked for.
        result: What came.
        neuron: Prunable weights that go with one neuron of one layer.
    """

    model: Path
    recipe: Recipe
    result: CompressionResult
    neuron: int

    @property
    def hf(self) -> Path:
        """The folder of the smaller PyTorch model."""
        return self.result.out.with_name("small.hf")


def press(root: Path, name: str, neuron: int, *, model: dict[str, Any] | None = None, **settings: Any) -> Run:
    """A run on a tiny model of one variant, half of whose prunable weights go unless told otherwise."""
    folder = tiny_models.save_variant(root / "in", name, **(model or {}))
    asked = {"pruning__method": "flap", "pruning__sparsity": 0.5, **settings}
    recipe = tiny_models.short_recipe(tiny_models.write_texts(root), **asked)
    return Run(folder, recipe, compress(folder, root / "small.onnx", recipe), neuron)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Llama with four query heads to a key, repaired block by block and then as a whole."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    return press(tmp_path_factory.mktemp("own"), "llama", 3 * 32, model=heads, **KL)


@pytest.fixture(scope="module")
def uniform(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A Qwen2 whose layers stay alike, repaired by masked LoRA."""
    settings = {"pruning__flap__uniform": True, "recovery__method": "masked-lora"}
    return press(tmp_path_factory.mktemp("uniform"), "qwen2", 3 * 32, **settings)


@pytest.fixture(scope="module")
def neurons(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A GPT-2, which gives up neurons alone, with its norms repaired and stored in bfloat16."""
    settings = {"pruning__sparsity": 0.3, "recovery__method": "norms", "export__dtype": "bfloat16"}
    return press(tmp_path_factory.mktemp("neurons"), "gpt2", 2 * 32, **settings)


@pytest.fixture(params=["own", "uniform", "neurons"])
def run(request: pytest.FixtureRequest) -> Run:
    """Each of the three."""
    shared: Run = request.getfixturevalue(request.param)
    return shared


def shapes_of(folder: Path) -> Shapes:
    """The shape of each stored weight."""
    found: Shapes = {}
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118  # no mapping, though it has keys
                found[name] = tuple(stored.get_slice(name).get_shape())
    return found


def matrices_of(folder: Path) -> Shapes:
    """The shape of each prunable matrix."""
    return {
        name: shape
        for name, shape in shapes_of(folder).items()
        if len(shape) == 2 and (".layers." in name or ".h." in name)
    }


def weights_in(shapes: Shapes) -> int:
    """How many weights there are."""
    return sum(math.prod(shape) for shape in shapes.values())


def our_logits(folder: Path) -> Tensor:
    """Logits (B, T, V) of a folder by our loader."""
    with torch.no_grad(), quiet_transformers():
        logits: Tensor = load_causal_lm(open_checkpoint(folder), torch.float32)(IDS).logits
    return logits


def heads_left(run: Run) -> list[int]:
    """Query heads of each layer, by the rows of its query matrix."""
    config = json.loads((run.model / "config.json").read_text())
    width = config["hidden_size"] // config["num_attention_heads"]
    layers = range(config["num_hidden_layers"])
    shapes = matrices_of(run.hf)
    return [shapes[f"model.layers.{layer}.self_attn.q_proj.weight"][0] // width for layer in layers]


def test_prune_flap_run_passes_with_parity(run: Run) -> None:
    """ONNX Runtime computes what the smaller PyTorch model does: at once, over the cache, padded, on the text."""
    assert run.result.passed is True
    status = {check["name"]: check["status"] for check in run.result.report["validation"]["checks"]}
    made = ("structure", "masks", "parity-prefill", "parity-decode", "parity-padded", "perplexity-drift")
    assert {name: status[name] for name in made} == dict.fromkeys(made, "passed")


def test_prune_flap_run_report_counts_what_went(run: Run) -> None:
    """The measured share is that of the stored shapes, and misses the target by less than one neuron."""
    before, left = weights_in(matrices_of(run.model)), weights_in(matrices_of(run.hf))
    facts = run.result.report["sparsity"]
    target = run.recipe.pruning.sparsity
    assert target is not None
    assert (facts["target"], facts["structured"]) == (target, True)
    assert facts["measured"] == pytest.approx((before - left) / before, abs=1e-12)
    layers = 2 if run.recipe.pruning.flap.uniform else 1  # alike: one neuron in each layer
    assert 0 <= int(target * before) - (before - left) < run.neuron * layers


def test_prune_flap_run_onnx_holds_the_smaller_dense_matrices(run: Run) -> None:
    """Each matrix is dense, in its stored shape or that transposed; the data file is smaller than the dense weights."""
    exported = {tensor.name: tensor for tensor in read_model(run.result.out).tensors}
    dense, left = matrices_of(run.model), matrices_of(run.hf)
    smaller = [name for name in left if left[name] != dense[name]]
    assert smaller
    for name, shape in left.items():
        assert sorted(exported[name].shape) == sorted(shape)
        assert exported[name].encoding == "dense"
    size = run.result.report["size"]
    assert set(size["by_encoding"]) == {"dense"}
    assert run.result.out.with_name("small.onnx.data").stat().st_size < size["dense_bytes"]


def test_prune_flap_run_takes_as_many_query_heads_of_each_group(own: Run) -> None:
    """With shared keys query heads go, the same number of each key's, and no key."""
    left = heads_left(own)
    assert all(count % 2 == 0 for count in left)
    assert min(left) < 8
    shapes = matrices_of(own.hf)
    for layer, count in enumerate(left):
        prefix = f"model.layers.{layer}.self_attn"
        assert shapes[f"{prefix}.k_proj.weight"] == shapes[f"{prefix}.v_proj.weight"] == (8, 32)
        assert shapes[f"{prefix}.o_proj.weight"] == (32, 4 * count)


def test_prune_flap_run_leaves_fused_attention_whole(neurons: Run) -> None:
    """Of an architecture with one matrix for query, key and value nothing but neurons goes."""
    dense, left = matrices_of(neurons.model), matrices_of(neurons.hf)
    changed = {name.rpartition(".h.")[2].split(".", 1)[1] for name in left if left[name] != dense[name]}
    assert changed == {"mlp.c_fc.weight", "mlp.c_proj.weight"}


def test_prune_flap_run_validates_again_with_a_reference(own: Run, tmp_path: Path) -> None:
    """A folder of layers with widths of their own is read as the reference, wherever it lies."""
    shutil.copytree(own.hf, tmp_path / "elsewhere")
    again = validate_export(
        own.result.out, reference=tmp_path / "elsewhere", evaluation=own.recipe.evaluation
    )
    assert again.reference == tmp_path / "elsewhere"
    assert again.report.passed
    assert {check.status for check in again.report.checks if check.name.startswith("parity")} == {"passed"}
    assert again.report.perplexity["onnx"] == own.result.report["perplexity"]["onnx"]


@pytest.mark.parametrize("name", ["own", "neurons"])
def test_prune_flap_run_folder_is_refused_by_stock_transformers(
    name: str, request: pytest.FixtureRequest
) -> None:
    """Widths of their own and new biases are no config's: the type that is told tells who can load it."""
    run: Run = request.getfixturevalue(name)
    with pytest.raises(ValueError, match=r"model type `blockpress_(llama|gpt2)`"):
        AutoModelForCausalLM.from_pretrained(run.hf)
    assert our_logits(run.hf).isfinite().all()


def test_prune_flap_run_uniform_folder_loads_in_stock_transformers(uniform: Run) -> None:
    """Without a key of ours, no weight missing, left over or of another shape, and the same logits."""
    config = json.loads((uniform.hf / "config.json").read_text())
    assert KEY not in config
    assert config["intermediate_size"] < 56
    with torch.no_grad(), quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(
            uniform.hf, dtype=torch.float32, output_loading_info=True
        )
        logits = model.eval()(IDS).logits
    assert not any(info.values())
    assert torch.equal(logits, our_logits(uniform.hf))
    assert not torch.equal(logits, our_logits(uniform.model))


def test_prune_flap_run_is_repaired_block_by_block_and_as_a_whole(own: Run) -> None:
    """EBFT makes each block better, and the finish lowers its own loss after it."""
    report = own.result.report
    assert all(block["loss_after"] < block["loss_before"] for block in report["blocks"])
    (row,) = report["finetuning"]
    assert (row["stage"], row["method"]) == ("finish", "kl")
    assert row["best_step"] > 0
    assert row["loss_after"] < row["loss_before"]


@pytest.mark.parametrize(("name", "method"), [("uniform", "masked-lora"), ("neurons", "norms")])
def test_prune_flap_run_is_repaired_end_to_end(
    name: str, method: str, request: pytest.FixtureRequest
) -> None:
    """Methods that keep masks work where there is none: a step is chosen, and the perplexity falls."""
    report = request.getfixturevalue(name).result.report
    (row,) = report["finetuning"]
    assert (row["stage"], row["method"]) == ("recovery", method)
    assert row["best_step"] > 0
    assert row["loss_after"] < row["loss_before"]
    assert report["perplexity"]["recovered"] < report["perplexity"]["pruned"]


@pytest.mark.parametrize(
    ("settings", "error_id"),
    [
        ({"pruning.pattern": "2:4"}, "E-FLAP-PATTERN"),
        ({"pruning.allocation": "owl"}, "E-FLAP-ALLOCATION"),
        ({"recovery.method": "dsnot"}, "E-FLAP-RECOVERY"),
        ({"recovery.method": "ebft-mask"}, "E-FLAP-RECOVERY"),
        ({"gates.min_sparsity": 0.2}, "E-FLAP-GATE"),
        ({"pruning.flap.uniform": True, "pruning.flap.structure": "AL-AM"}, "E-FLAP-UNIFORM"),
        ({"pruning.method": "wanda", "pruning.flap.uniform": True}, "E-UNIFORM-PRUNER"),
    ],
)
def test_prune_flap_run_is_refused_with_what_does_not_go_together(
    tmp_path: Path, settings: dict[str, Any], error_id: str
) -> None:
    """What is about zeros, or says two things, is refused by its own id before a model is opened."""
    recipe = read_recipe(None, {"pruning.method": "flap", **settings})
    with pytest.raises(UsageError) as refused:
        compress(tmp_path / "no model", tmp_path / "small.onnx", recipe)
    assert (refused.value.error_id, refused.value.exit_code) == (error_id, 2)
    assert list(tmp_path.iterdir()) == []
