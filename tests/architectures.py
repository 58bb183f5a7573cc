"""Tiny random models of all 18 supported variants, built from their configuration classes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers
from remembered_traces import remember_traces

remember_traces()

# Every axis has a size of its own where the architecture allows it, so that a mixed-up axis cannot go unseen;
# all widths divide by 8, so that 2:4 and 4:8 apply; the window of the sliding layers is shorter than the test
# sequences.
VOCAB = 104
SLIDING_WINDOW = 6
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

Config = Any


def _settings(**changes: Any) -> dict[str, Any]:
    common = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **_IDS,
    }
    return {**common, **changes}


def _llama(**changes: Any) -> Config:
    return transformers.LlamaConfig(**_settings(**changes))


def _llama3_rope(**changes: Any) -> Config:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return _llama(**{"rope_parameters": rope, "tie_word_embeddings": True, **changes})


def _mistral(**changes: Any) -> Config:
    return transformers.MistralConfig(**_settings(**{"sliding_window": SLIDING_WINDOW, **changes}))


def _qwen2(**changes: Any) -> Config:
    return transformers.Qwen2Config(**_settings(**changes))


def _qwen3(**changes: Any) -> Config:
    return transformers.Qwen3Config(**_settings(**{"head_dim": 16, **changes}))


def _gemma(**changes: Any) -> Config:
    return transformers.GemmaConfig(**_settings(**{"head_dim": 16, "num_key_value_heads": 1, **changes}))


def _gemma2(**changes: Any) -> Config:
    own = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": SLIDING_WINDOW}
    return transformers.Gemma2Config(**_settings(**{**own, **changes}))


def _gemma3_text(**changes: Any) -> Config:
    own = {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": SLIDING_WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return transformers.Gemma3TextConfig(**_settings(**{**own, **changes}))


def _phi3(**changes: Any) -> Config:
    return transformers.Phi3Config(**_settings(**changes))


def _opt(**changes: Any) -> Config:
    own = _settings(ffn_dim=56, word_embed_proj_dim=32)
    own.pop("intermediate_size")
    own.pop("num_key_value_heads")
    return transformers.OPTConfig(**{**own, **changes})


def _gpt2(**changes: Any) -> Config:
    own = {"vocab_size": VOCAB, "n_embd": 32, "n_inner": 56, "n_layer": 2, "n_head": 4, **_IDS}
    own.update(n_positions=128, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    if "num_hidden_layers" in changes:
        changes["n_layer"] = changes.pop("num_hidden_layers")
    return transformers.GPT2Config(**{**own, **changes})


def _gpt_neox(**changes: Any) -> Config:
    own = _settings()
    own.pop("num_key_value_heads")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return transformers.GPTNeoXConfig(**{**own, "rope_parameters": rope, **changes})


def _bloom(**changes: Any) -> Config:
    own = {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}
    if "num_hidden_layers" in changes:
        changes["n_layer"] = changes.pop("num_hidden_layers")
    return transformers.BloomConfig(**{**own, **changes})


def _falcon(**changes: Any) -> Config:
    own = _settings(multi_query=True, ffn_hidden_size=56, alibi=False)
    own.pop("intermediate_size")
    own.pop("num_key_value_heads")
    return transformers.FalconConfig(**{**own, **changes})


def _falcon_new(**changes: Any) -> Config:
    return _falcon(**{"new_decoder_architecture": True, "num_kv_heads": 2, **changes})


def _smollm3(**changes: Any) -> Config:
    # The second block works without rotary positions, as every fourth does in the published model.
    return transformers.SmolLM3Config(**_settings(**{"no_rope_layers": [1, 0], **changes}))


def _mixtral(**changes: Any) -> Config:
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 40}
    return transformers.MixtralConfig(**_settings(**{**own, **changes}))


def _qwen3_moe(**changes: Any) -> Config:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "head_dim": 16}
    return transformers.Qwen3MoeConfig(**_settings(**{**own, "norm_topk_prob": True, **changes}))


VARIANTS: dict[str, Callable[..., Config]] = {
    "llama": _llama,
    "llama3_rope": _llama3_rope,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3_text,
    "phi3": _phi3,
    "opt": _opt,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
    "falcon": _falcon,
    "falcon_new": _falcon_new,
    "smollm3": _smollm3,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}

# What must not be left to the default: scaled-dot-product attention gives wrong numbers for these two, and
# the default experts loop over data.
ATTENTION = {"gemma2": "eager", "bloom": "eager"}
EXPERTS = {"mixtral": "batched_mm", "qwen3_moe": "batched_mm"}


def config_of(name: str, **overrides: Any) -> Config:
    """Return the tiny configuration of one variant, changed by `overrides`."""
    return VARIANTS[name](**overrides)


def build(name: str, *, seed: int = 0, **overrides: Any) -> transformers.PreTrainedModel:
    """Return a random float32 model of one variant in eval mode, the same for the same seed.

    The weights are large enough that every block changes the hidden state by about its own size; with the
    library's initial scale a wrong block would pass any tolerance.
    """
    config = config_of(name, **overrides)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=ATTENTION.get(name, "sdpa")
    )
    if name in EXPERTS:
        model.set_experts_implementation(EXPERTS[name])
    _fill(model, torch.Generator().manual_seed(seed))
    return model.eval().requires_grad_(False)


@torch.no_grad()
def _fill(model: torch.nn.Module, generator: torch.Generator) -> None:
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim >= 2:
            parameter.copy_(noise * 1.5 / math.sqrt(parameter.shape[-1]))
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.1)
        else:  # norm gains keep their initial value (one, or zero where the norm adds one) on average
            parameter.copy_(parameter + noise * 0.1)
