"""Validation of a real export: a tiny pruned Qwen3 through the block exporter, against PyTorch."""

from __future__ import annotations

import dataclasses

import architectures
import numpy as np
import pytest
import torch

from compressor.models.reference import TorchReference
from exporters.causal_lm import LoadedParts, build_graph
from exporters.manifest import Manifest, hash_files, write_manifest
from exporters.masks import write_masks
from exporters.wire import write_model
from validators.checks import Gates
from validators.examine import examine
from validators.request import ValidationRequest

ALTERED = "model.layers.1.mlp.up_proj.weight"


def pruned_model() -> torch.nn.Module:
    """A random model whose block matrices keep two of each four inputs; the same every time."""
    model = architectures.build("qwen3")
    for name, parameter in model.named_parameters():
        if ".layers." in name and parameter.ndim == 2:
            groups = parameter.abs().unflatten(-1, (-1, 4))  # (out, in / 4, 4)
            kept = groups.argsort(dim=-1).argsort(dim=-1) >= 2
            parameter.mul_(kept.flatten(-2))
    return model


def make_reference() -> TorchReference:
    """The model that was exported: a factory for requests."""
    return TorchReference(pruned_model(), torch.device("cpu"))


def make_altered_reference() -> TorchReference:
    """The same with other weights in the second block."""
    model = pruned_model()
    model.get_parameter(ALTERED).mul_(1.1)
    return TorchReference(model, torch.device("cpu"))


@pytest.fixture(scope="module")
def request_of_export(tmp_path_factory: pytest.TempPathFactory) -> ValidationRequest:
    """The request that validates the export fully."""
    folder = tmp_path_factory.mktemp("export")
    model = pruned_model()
    masks = {
        name: p.numpy() != 0 for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2
    }
    graph = build_graph(LoadedParts(model, torch.float32))
    rows = write_model(
        graph.proto, graph.weights, folder / "m.onnx", "m.onnx.data", encoding="sparse", pruned=set(masks)
    )
    files = hash_files(folder, ["m.onnx", "m.onnx.data"])
    manifest = Manifest(files, rows, block_outputs=tuple(graph.block_outputs), pattern="2:4", sparsity=0.5)
    write_manifest(manifest, folder / "m.manifest.json")
    write_masks(folder / "masks.safetensors", masks)
    np.save(folder / "windows.npy", np.random.default_rng(0).integers(3, architectures.VOCAB, size=(3, 40)))
    return ValidationRequest(
        model_path=str(folder / "m.onnx"),
        manifest_path=str(folder / "m.manifest.json"),
        masks_path=str(folder / "masks.safetensors"),
        reference_factory="test_validate_export:make_reference",
        windows_path=str(folder / "windows.npy"),
        gates=Gates(min_sparsity=0.5),
        provider="cpu",
    )


def test_export_passes_every_check(request_of_export: ValidationRequest) -> None:
    """Hashes, structure, masks, 2:4, sparsity, the three ways of running, and perplexity: all pass."""
    report = examine(request_of_export)
    assert {check.name for check in report.checks if check.status != "passed"} == {"perplexity-increase"}
    assert report.check("perplexity-increase").status == "skipped"
    assert report.passed


def test_export_of_other_weights_is_located(request_of_export: ValidationRequest) -> None:
    """A reference with another second block: parity and perplexity fail, and the second block is named."""
    request = dataclasses.replace(
        request_of_export, reference_factory="test_validate_export:make_altered_reference"
    )
    report = examine(request)
    assert {check.name for check in report.failed_checks} >= {
        "parity-prefill",
        "parity-decode",
        "parity-padded",
    }
    assert report.first_divergence is not None
    assert report.first_divergence.startswith("block 1: max |Δ|")
    assert "block 0 within" in report.first_divergence
