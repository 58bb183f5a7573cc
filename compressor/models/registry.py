"""What is special per architecture, in one place. Everything else is found by probing the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from compressor.errors import InputRefused

__all__ = ["SUPPORTED", "Architecture", "StoredExperts", "architecture_of", "class_names"]


@dataclass(frozen=True)
class StoredExperts:
    """How checkpoints of an architecture name the matrices of one expert.

    Attributes:
        module: Path of the experts in a block.
        gate: First half of the rows of ``gate_up_proj``.
        up: The other half.
        down: An expert of ``down_proj``.
    """

    module: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def of(self, parameter: str) -> tuple[str, ...]:
        """The matrices of an expert that ``parameter`` holds, one above the other."""
        return {"gate_up_proj": (self.gate, self.up), "down_proj": (self.down,)}[parameter]


@dataclass(frozen=True)
class Architecture:
    """A family of decoder-only language models.

    Attributes:
        model_type: ``model_type`` of its config.
        label: Its name for people.
        attention: Attention implementation of transformers that computes the right numbers and can be traced.
        experts: Experts implementation that can be traced, or ``None`` without a mixture of experts.
        stored_experts: How its checkpoints name the matrices of an expert.
        remote_code: The classes come with the checkpoint and run only because the user trusts them.
    """

    model_type: str
    label: str
    attention: str = "sdpa"
    experts: str | None = None
    stored_experts: StoredExperts | None = None
    remote_code: bool = False

    def implementations(self, *, traceable: bool) -> dict[str, str]:
        """The keyword arguments of ``from_pretrained`` that choose the implementations.

        Args:
            traceable: Experts that can be traced. They gather a copy of the weights for every token; without
                it they loop over the experts, each with its tokens.
        """
        chosen = {"attn_implementation": self.attention}
        if self.experts is not None:
            chosen["experts_implementation"] = self.experts if traceable else "eager"
        return chosen


_KNOWN = (
    Architecture("llama", "Llama"),
    Architecture("mistral", "Mistral"),
    Architecture("qwen2", "Qwen2"),
    Architecture("qwen3", "Qwen3"),
    Architecture("gemma", "Gemma"),
    # sdpa leaves out gemma2's soft-capping of the attention scores, and gives bloom wrong numbers without a
    # word.
    Architecture("gemma2", "Gemma 2", attention="eager"),
    Architecture("gemma3_text", "Gemma 3 (text)"),
    Architecture("phi3", "Phi-3"),
    Architecture("opt", "OPT"),
    Architecture("gpt2", "GPT-2"),
    Architecture("gpt_neox", "GPT-NeoX"),
    Architecture("bloom", "BLOOM", attention="eager"),
    Architecture("falcon", "Falcon"),
    Architecture("smollm3", "SmolLM3"),
    # The other implementations of the experts loop over data or sort it, and cannot be traced.
    Architecture(
        "mixtral",
        "Mixtral",
        experts="batched_mm",
        stored_experts=StoredExperts("block_sparse_moe.experts", gate="w1", up="w3", down="w2"),
    ),
    Architecture("qwen3_moe", "Qwen3-MoE", experts="batched_mm", stored_experts=StoredExperts()),
)
SUPPORTED: dict[str, Architecture] = {architecture.model_type: architecture for architecture in _KNOWN}

_OTHER_SENSES = (
    "vision_config",
    "audio_config",
    "speech_config",
    "image_token_id",
    "image_token_index",
    "vision_tower",
)


def architecture_of(config: Any, *, trust_remote_code: bool = False) -> Architecture:
    """The architecture of a config, an object of transformers or the mapping in ``config.json``.

    Args:
        config: The config.
        trust_remote_code: Take a type that is not in ``SUPPORTED`` where the checkpoint brings its code.

    Raises:
        InputRefused: E-MODEL-MULTIMODAL, E-MODEL-QUANTIZED, E-MODEL-REMOTE-CODE, E-MODEL-UNSUPPORTED: the
            model is not a plain decoder-only language model of a supported architecture, which are named.
    """
    settings: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    model_type = settings.get("model_type")
    supported = f"supported: {', '.join(SUPPORTED)}"
    if isinstance(model_type, str) and model_type not in SUPPORTED:
        senses = [key for key in _OTHER_SENSES if settings.get(key) is not None]
        if senses:
            raise InputRefused(
                "E-MODEL-MULTIMODAL",
                f"{model_type} takes more than text ({', '.join(senses)} in config.json)",
                f"use a text-only checkpoint, such as gemma3_text for gemma3; {supported}",
            )
    if settings.get("quantization_config") or settings.get("compression_config"):
        raise InputRefused(
            "E-MODEL-QUANTIZED",
            f"the {model_type} checkpoint is quantised (quantization_config in config.json)",
            "start from the checkpoint in float32, float16 or bfloat16",
        )
    known = SUPPORTED.get(model_type) if isinstance(model_type, str) else None
    if known is None and "AutoModelForCausalLM" in (settings.get("auto_map") or {}):
        if not trust_remote_code:
            raise InputRefused(
                "E-MODEL-REMOTE-CODE",
                f"the {model_type} checkpoint runs on code that comes with it (auto_map in config.json)",
                f"read that code, then give --trust-remote-code; without code of its own: {supported}",
            )
        known = Architecture(str(model_type), f"{model_type} (its own code)", remote_code=True)
    if known is None:
        raise InputRefused(
            "E-MODEL-UNSUPPORTED",
            f"config.json has model_type {model_type!r}, which is not supported",
            supported,
        )
    for reason in _unsupported_features(settings):
        raise InputRefused(
            "E-MODEL-UNSUPPORTED",
            f"this {model_type} checkpoint {reason}",
            f"use a variant without it; {supported}",
        )
    return known


def _unsupported_features(settings: Mapping[str, Any]) -> Iterator[str]:
    """What a config of a supported type asks for that cannot be exported or repaired."""
    if settings.get("is_encoder_decoder") or settings.get("add_cross_attention"):
        yield "attends to an encoder"
    if settings.get("model_type") == "falcon" and settings.get("alibi"):
        yield "uses alibi positions, which cannot be exported for falcon"
    if settings.get("use_bidirectional_attention"):
        yield "attends to later tokens (use_bidirectional_attention)"
    if "dynamic" in _rope_types(settings):
        yield "uses dynamic NTK rope, whose tables depend on the data and cannot be exported"
    heads = [name for name in class_names(settings) if "For" in name]
    if heads and not any(name.endswith("ForCausalLM") for name in heads):
        yield f"has no language model head ({', '.join(heads)})"


def class_names(settings: Mapping[str, Any]) -> list[str]:
    """The class names under ``architectures``."""
    return list(settings.get("architectures") or ())


def _rope_types(settings: Mapping[str, Any]) -> set[str]:
    """The rope types of a config: one, or one per layer type; the older key ``rope_scaling`` included."""
    found = set()
    for key in ("rope_parameters", "rope_scaling"):
        parameters = settings.get(key)
        if isinstance(parameters, Mapping):
            for entry in (parameters, *parameters.values()):
                if isinstance(entry, Mapping):
                    found |= {str(entry.get("rope_type")), str(entry.get("type"))}
    return found
