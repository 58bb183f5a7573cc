"""Reports as real runs would leave them, for the tests of the report."""

from __future__ import annotations

import hashlib
import math
from typing import Any

from compressor.recipe import Recipe
from compressor.report.schema import (
    BlockRow,
    CalibrationFacts,
    CheckRow,
    EncodingBytes,
    FileRow,
    FinetuningRow,
    LearningRateFacts,
    LoadFacts,
    ManifestFacts,
    ModelFacts,
    PeakMemory,
    PerplexityFacts,
    PerplexityProtocol,
    Report,
    SizeFacts,
    SparsityFacts,
    TaskRow,
    TaskScore,
    ValidationFacts,
    WeightRow,
)

LLAMA_WEIGHTS = {
    "self_attn.q_proj.weight": (2048, 2048),
    "self_attn.k_proj.weight": (512, 2048),
    "self_attn.v_proj.weight": (512, 2048),
    "self_attn.o_proj.weight": (2048, 2048),
    "mlp.gate_proj.weight": (8192, 2048),
    "mlp.up_proj.weight": (8192, 2048),
    "mlp.down_proj.weight": (2048, 8192),
}


def sha256(text: str) -> str:
    """A hash to show."""
    return hashlib.sha256(text.encode()).hexdigest()


def weight_rows(blocks: int, sparsity: float = 0.6) -> tuple[WeightRow, ...]:
    """The pruned weights of a Llama, each at the target."""
    return tuple(
        WeightRow(
            block=block,
            name=name,
            shape=shape,
            sparsity=sparsity,
            encoding="sparse",
            stored_bytes=int(shape[0] * shape[1] * 4 * (1 - sparsity) * 1.72),
            dense_bytes=shape[0] * shape[1] * 4,
        )
        for block in range(blocks)
        for name, shape in LLAMA_WEIGHTS.items()
    )


def expert_rows(blocks: int, experts: int) -> tuple[WeightRow, ...]:
    """The pruned weights of a mixture of experts: two fused parameters a block, one row for each expert."""
    return tuple(
        WeightRow(
            block=block,
            name=f"mlp.experts.{name}[{expert}]",
            shape=(768, 2048),
            sparsity=0.5 + 0.1 * math.sin(block + expert % 5),
            encoding="sparse",
            stored_bytes=1_800_000,
            dense_bytes=3_145_728,
        )
        for block in range(blocks)
        for name in ("gate_up_proj", "down_proj")
        for expert in range(experts)
    )


def block_rows(blocks: int) -> tuple[BlockRow, ...]:
    """Losses that grow with depth, as they do, and shrink by a factor of three to six in the repair."""
    before = [
        2e-4 * 1.9 ** (9 * index / max(1, blocks - 1)) * (1 + 0.3 * math.sin(index))
        for index in range(blocks)
    ]
    return tuple(
        BlockRow(
            index=index,
            loss_before=loss,
            loss_after=loss / (4.2 + 1.5 * math.cos(index)),
            seconds=11.3,
            best_step=290 + index % 30,
            steps=320,
            trained_parameters=24_300_000,
        )
        for index, loss in enumerate(before)
    )


def check_rows() -> tuple[CheckRow, ...]:
    """What the validator says of a good export."""
    return (
        CheckRow(name="manifest", status="passed", measured=0, limit=0, unit="files altered"),
        CheckRow(name="structure", status="passed"),
        CheckRow(name="finite", status="passed", measured=0, limit=0, unit="tensors"),
        CheckRow(name="masks", status="passed", measured=0, limit=0, unit="tensors differ"),
        CheckRow(
            name="pattern", status="skipped", why="the run was unstructured, there is no N:M pattern to hold"
        ),
        CheckRow(name="sparsity", status="passed", measured=0.6, limit=0.6, unit="of pruned weights"),
        CheckRow(
            name="parity-prefill",
            status="passed",
            measured=8.1e-4,
            limit=2e-3,
            unit="max |Δlogit|",
            why="512 tokens, logits up to 21.3, top-1 agreement 100.00% of 498 decided, mean KL 3.1e-07 nats",
            details={
                "max_abs": 8.1e-4,
                "relative": 4.2e-5,
                "mean_kl": 3.1e-7,
                "top1_agreement": 1.0,
                "tokens": 512.0,
            },
        ),
        CheckRow(name="parity-decode", status="passed", measured=8.4e-4, limit=2e-3, unit="max |Δlogit|"),
        CheckRow(name="parity-padded", status="passed", measured=7.7e-4, limit=2e-3, unit="max |Δlogit|"),
        CheckRow(name="perplexity-drift", status="passed", measured=2.1e-5, limit=1e-3, unit="relative"),
        CheckRow(name="perplexity-increase", status="passed", measured=0.316, limit=0.35, unit="relative"),
    )


def fields(num_blocks: int = 16) -> dict[str, Any]:
    """The fields of a run that went well."""
    weights = weight_rows(num_blocks)
    sparse = sum(row.stored_bytes or 0 for row in weights)
    pruned_dense = sum(row.dense_bytes or 0 for row in weights)
    return {
        "command": "run",
        "output": "sparse.onnx",
        "model": ModelFacts(
            name="meta-llama/Llama-3.2-1B",
            architecture="llama",
            parameters=1_235_814_400,
            export_dtype="float32",
            revision="4e20de362430cd3b72f300e6b0f18e50e7166e08",
            checkpoint_dtype="bfloat16",
        ),
        "sparsity": SparsityFacts(target=0.6, measured=0.6),
        "perplexity": PerplexityFacts(
            dense=9.7612,
            pruned=31.2043,
            recovered=12.8417,
            onnx=12.8420,
            protocol=PerplexityProtocol(
                source="wikitext-2-raw/wiki.test.raw",
                sha256=sha256("evaluation"),
                window=2048,
                stride=2048,
                windows=141,
                tokens=288_627,
                bos="once, at the very start",
                join="one text, one tokenizer call",
                dtype="float32",
                dropped_tokens=873,
            ),
        ),
        "calibration": CalibrationFacts(
            source="allenai/c4",
            sha256=sha256("calibration"),
            protocol={"windows": 256, "window": 1024, "heldout": 16, "sampler": "joined", "seed": 0},
        ),
        "validation": ValidationFacts(passed=True, provider="CPUExecutionProvider", checks=check_rows()),
        "tasks": (
            TaskRow(
                task="piqa",
                metric="acc",
                documents=1838,
                higher_is_better=True,
                onnx=TaskScore(value=0.7512, stderr=0.0101),
                recovered=TaskScore(value=0.75, stderr=0.0102),
            ),
        ),
        "load": LoadFacts(
            seconds=1.25, resident_bytes=2**31, note="112 of 146 weights are sparse initializers."
        ),
        "quantization": {
            "bits": 4,
            "group_size": 64,
            "activation_bits": 8,
            "blocks": [{"index": 0, "error": 0.01, "nearest_error": 0.02, "searched": True}],
        },
        "size": SizeFacts(
            source_bytes=2_471_645_608,
            dense_bytes=pruned_dense + 1_050_673_152,
            onnx_bytes=sparse + 1_050_673_152 + 3_400_000,
            by_encoding={
                "sparse": EncodingBytes(tensors=len(weights), bytes=sparse, dense_bytes=pruned_dense),
                "dense": EncodingBytes(tensors=34, bytes=1_050_673_152, dense_bytes=1_050_673_152),
            },
        ),
        "weights": weights,
        "blocks": block_rows(num_blocks),
        "recovery": "ebft",
        "learning_rate": LearningRateFacts(chosen=3e-4, tried=(1e-4, 3e-4, 1e-3, 3e-3)),
        "finetuning": (
            FinetuningRow(
                stage="finish",
                method="kl",
                loss="kl",
                loss_before=0.4021,
                loss_after=0.3187,
                calibration_first=0.3644,
                calibration_last=0.2511,
                best_step=160,
                steps=160,
                lr=1e-4,
                tried=(3e-5, 1e-4, 3e-4),
                trained_parameters=389_100_000,
                seconds=512.0,
            ),
        ),
        "recipe": Recipe().model_dump(mode="json"),
        "device": "cuda:0 (NVIDIA H100 80GB HBM3)",
        "versions": {
            "blockpress": "0.1.0",
            "python": "3.11.9",
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "onnx": "1.23.2",
            "onnxruntime": "1.31.1",
            "platform": "Linux x86_64",
        },
        "timings": {
            "open": 4.2,
            "calibration": 9.8,
            "learning rate": 41.0,
            "blocks": 181.4,
            "export": 96.1,
            "validate": 104.9,
            "validate: parity": 31.0,
        },
        "peak_memory_bytes": PeakMemory(host=4_402_341_478, device=6_764_573_491),
        "run_sha256": sha256("run"),
        "manifest": ManifestFacts(
            digest=sha256("manifest"),
            files=(
                FileRow(name="sparse.onnx", sha256=sha256("onnx"), size_bytes=1_703_442_118),
                FileRow(name="sparse.onnx.data", sha256=sha256("data"), size_bytes=2_130_044_928),
                FileRow(
                    name="sparse.hf/model-00001-of-00017.safetensors",
                    sha256=sha256("hf"),
                    size_bytes=121_651_200,
                ),
            ),
        ),
        "notices": (),
    }


def sample_report(num_blocks: int = 16, **changes: Any) -> Report:
    """A run that went well, with ``changes`` on top."""
    return Report(**{**fields(num_blocks), **changes})
