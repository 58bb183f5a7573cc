"""Which models are supported, and how the others are refused."""

from __future__ import annotations

from typing import Any

import pytest
from architectures import VARIANTS, config_of

from compressor.errors import InputRefused
from compressor.models.registry import SUPPORTED, architecture_of


@pytest.mark.parametrize("name", VARIANTS)
def test_registry_knows_every_variant(name: str) -> None:
    """All 18 variants are supported, by the object and by its settings."""
    config = config_of(name)
    assert architecture_of(config) is architecture_of(config.to_dict()) is SUPPORTED[config.model_type]


def test_registry_chooses_implementations_that_are_right() -> None:
    """Soft-capped and alibi attention run eagerly; experts gather weights only where they are traced."""
    assert {name for name, found in SUPPORTED.items() if found.attention == "eager"} == {"gemma2", "bloom"}
    mixtral = SUPPORTED["mixtral"]
    assert mixtral.implementations(traceable=True)["experts_implementation"] == "batched_mm"
    assert mixtral.implementations(traceable=False)["experts_implementation"] == "eager"
    assert "experts_implementation" not in SUPPORTED["llama"].implementations(traceable=True)


@pytest.mark.parametrize(
    ("settings", "error_id"),
    [
        ({"model_type": "mamba"}, "E-MODEL-UNSUPPORTED"),
        ({}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": ["llama"]}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "gpt2", "add_cross_attention": True}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "falcon", "alibi": True}, "E-MODEL-UNSUPPORTED"),
        ({"model_type": "gemma3", "vision_config": {"depth": 2}, "text_config": {}}, "E-MODEL-MULTIMODAL"),
        ({"model_type": "llava", "vision_config": {}, "image_token_index": 7}, "E-MODEL-MULTIMODAL"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "E-MODEL-QUANTIZED"),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}, "E-MODEL-REMOTE-CODE"),
    ],
)
def test_registry_refuses_by_name(settings: dict[str, Any], error_id: str) -> None:
    """What is not a plain supported language model is refused, and the supported ones are named."""
    with pytest.raises(InputRefused) as refused:
        architecture_of(settings)
    assert refused.value.error_id == error_id
    assert str(settings.get("model_type")) in refused.value.message
    if error_id != "E-MODEL-QUANTIZED":
        assert "llama, mistral" in refused.value.remedy


def test_registry_refuses_dynamic_rope_in_either_form() -> None:
    """Transformers' own spelling of dynamic rope is refused like the older one; llama3 rope is not."""
    with pytest.raises(InputRefused, match="dynamic"):
        architecture_of(
            config_of("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
        )
    assert architecture_of(config_of("llama3_rope")).model_type == "llama"


def test_registry_takes_trusted_code_of_an_unknown_type() -> None:
    """A type of its own is taken where the user trusts its code, and is marked as such."""
    settings = {"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "m.M"}}
    assert architecture_of(settings, trust_remote_code=True).remote_code
