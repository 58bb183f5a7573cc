"""Every supported architecture, tiny and random, goes through the whole run and passes the validation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import architectures
import pytest
import tiny_models
from workshop import Workshop

from compressor import CompressionResult, compress

# Head widths that do not follow from hidden / heads.
_OWN_HEAD_DIM = ("qwen3", "gemma", "gemma2", "gemma3_text", "qwen3_moe")


def press(folder: Path, name: str, workshop: Workshop, out: str, **settings: Any) -> CompressionResult:
    """The result of a run on one variant, with a limit for every check that has none of its own."""
    limits = {"gates__min_sparsity": 0.49, "gates__max_ppl_increase": 3.0}
    model = tiny_models.save_variant(folder / name, name)
    return compress(model, folder / out, tiny_models.short_recipe(workshop.texts, **{**limits, **settings}))


def not_passed(result: CompressionResult) -> list[tuple[str, str, str]]:
    """Name, status and reason of every check that did not pass."""
    checks = result.report["validation"]["checks"]
    return [(row["name"], row["status"], row["why"]) for row in checks if row["status"] != "passed"]


@pytest.mark.parametrize("name", architectures.VARIANTS)
def test_variants_wanda_and_ebft_pass_every_check(tmp_path: Path, workshop: Workshop, name: str) -> None:
    """Half of each row is zero, the export equals PyTorch, and only the N:M check, not asked for, is skipped."""
    result = press(tmp_path, name, workshop, "sparse.onnx")
    assert [row[:2] for row in not_passed(result)] == [("pattern", "skipped")]
    assert result.passed is True
    assert result.report["sparsity"]["measured"] == 0.5
    assert len(result.report["blocks"]) == 2


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe"])
def test_variants_sparsegpt_n_m_into_a_folder_passes_every_check(
    tmp_path: Path, workshop: Workshop, name: str
) -> None:
    """2:4 by SparseGPT holds in fused linears, transposed ones and experts; a folder output validates as well."""
    settings = {"pruning__method": "sparsegpt", "pruning__pattern": "2:4"}
    result = press(tmp_path, name, workshop, "folder", **settings)
    assert not_passed(result) == []
    assert result.out == tmp_path / "folder" / "model.onnx"


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_variants_half_precision_exports_pass_every_check(
    tmp_path: Path, workshop: Workshop, name: str, dtype: str
) -> None:
    """Weights stored in 16 bits validate against PyTorch in float32 on the same stored weights."""
    result = press(tmp_path, name, workshop, "sparse.onnx", export__dtype=dtype)
    assert [row[:2] for row in not_passed(result)] == [("pattern", "skipped")]
    assert result.report["model"]["export_dtype"] == dtype


def test_variants_cover_heads_of_a_width_of_their_own() -> None:
    """Some of the variants have heads whose width does not follow from hidden size and number of heads."""
    assert len(architectures.VARIANTS) == 18
    for name in _OWN_HEAD_DIM:
        config = architectures.config_of(name)
        assert config.head_dim != config.hidden_size // config.num_attention_heads
