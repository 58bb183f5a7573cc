"""A Llama or Mixtral checkpoint of random weights in any size, written layer by layer: for measuring, not for text.

One shard per layer, so that no more than a layer is in memory at a time. No two matrices are equal: ONNX Runtime
keeps one copy of identical weights, which would make a model of copies look small and fast.

    python bench/random_model.py /tmp/random-300m --parameters 300M --hidden 1024 --vocabulary 32000
    python bench/random_model.py /tmp/random --layers 24 --hidden 1024 --vocabulary 32000
    python bench/random_model.py /tmp/random-experts --layers 6 --hidden 512 --experts 8
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, MixtralConfig

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER_FROM = ROOT / "examples" / "tiny-llm"
HEAD_DIM = 64
UNITS = {"K": 10**3, "M": 10**6, "B": 10**9}


def model_config(
    layers: int,
    hidden: int,
    dtype: str,
    vocabulary: int | None = None,
    kv_heads: int | None = None,
    experts: int = 0,
) -> LlamaConfig | MixtralConfig:
    """A Llama, or with experts a Mixtral, with an untied head.

    By default with the example's vocabulary and as many key heads as heads.
    """
    example = json.loads((TOKENIZER_FROM / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    settings: dict[str, Any] = {
        "vocab_size": vocabulary or example,
        "hidden_size": hidden,
        "intermediate_size": hidden * 11 // 4,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": kv_heads or hidden // HEAD_DIM,
        "max_position_embeddings": 512 if vocabulary is None else 4096,
        "dtype": dtype,
    }
    if experts:
        return MixtralConfig(num_local_experts=experts, architectures=["MixtralForCausalLM"], **settings)
    return LlamaConfig(architectures=["LlamaForCausalLM"], **settings)


def layer_shapes(config: LlamaConfig | MixtralConfig) -> dict[str, tuple[int, int]]:
    """The matrices of one layer by their names in a checkpoint, (out, in)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * (hidden // config.num_attention_heads)
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
    }
    mlp = {"gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner)}
    if isinstance(config, LlamaConfig):
        return shapes | {f"mlp.{name}": shape for name, shape in mlp.items()}
    count, of_mixtral = config.num_local_experts, {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    shapes["block_sparse_moe.gate"] = (count, hidden)
    for expert in range(count):
        for name, shape in mlp.items():
            shapes[f"block_sparse_moe.experts.{expert}.{of_mixtral[name]}"] = shape
    return shapes


def layers_for(parameters: int, hidden: int, vocabulary: int, kv_heads: int | None = None) -> int:
    """How many layers come nearest to this many parameters; at least one."""
    config = model_config(1, hidden, "float32", vocabulary, kv_heads)
    per_layer = sum(rows * columns for rows, columns in layer_shapes(config).values()) + 2 * hidden
    return max(1, round((parameters - 2 * vocabulary * hidden - hidden) / per_layer))


def write_model(folder: Path, config: LlamaConfig | MixtralConfig) -> int:
    """Write a random model shard by shard, with the example's tokenizer; the bytes of its weights."""
    dtype = getattr(torch, str(config.dtype).removeprefix("torch."))
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    size = 0

    def matrix(rows: int, columns: int) -> Tensor:
        return (torch.randn(rows, columns, generator=generator) / columns**0.5).to(dtype)

    def shard(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
        size += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    ones = torch.ones(config.hidden_size, dtype=dtype)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {f"{prefix}{name}.weight": matrix(*shape) for name, shape in layer_shapes(config).items()}
        tensors |= {
            f"{prefix}{name}.weight": ones for name in ("input_layernorm", "post_attention_layernorm")
        }
        shard(layer + 1, {name: tensor.clone() for name, tensor in tensors.items()})
    table = (config.vocab_size, config.hidden_size)
    rest = {"model.embed_tokens.weight": matrix(*table), "lm_head.weight": matrix(*table)}
    shard(0, {**rest, "model.norm.weight": ones.clone()})
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TOKENIZER_FROM / name, folder / name)
    return size


def number_of(value: str) -> int:
    """A count such as ``300M``, ``1.1B`` or ``50000``."""
    unit = UNITS.get(value[-1:].upper(), 1)
    try:
        return int(float(value[:-1] if unit > 1 else value) * unit)
    except ValueError:
        raise click.BadParameter(f"{value!r} is no count such as 300M") from None


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--parameters", type=number_of, help="Such as 300M; chooses the number of layers.")
@click.option("--layers", type=click.IntRange(min=1), help="In place of --parameters.")
@click.option("--hidden", type=click.IntRange(min=HEAD_DIM), default=1024, show_default=True)
@click.option("--kv-heads", type=click.IntRange(min=1), help="Key heads; as many as heads by default.")
@click.option("--experts", type=click.IntRange(min=2), help="Of a Mixtral; needs --layers.")
@click.option("--vocabulary", type=click.IntRange(min=2048), default=32000, show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), default="float32")
def main(
    folder: Path,
    parameters: int | None,
    layers: int | None,
    hidden: int,
    kv_heads: int | None,
    experts: int | None,
    vocabulary: int,
    dtype: str,
) -> None:
    if (parameters is None) == (layers is None):
        raise click.UsageError("give one of --parameters and --layers")
    if experts and layers is None:
        raise click.UsageError("--experts needs --layers")
    depth = layers or layers_for(parameters or 0, hidden, vocabulary, kv_heads)
    config = model_config(depth, hidden, dtype, vocabulary, kv_heads, experts or 0)
    folder.mkdir(parents=True, exist_ok=True)
    size = write_model(folder, config)
    weights = size // getattr(torch, dtype).itemsize
    click.echo(
        f"{folder}: {depth} layers, hidden {hidden}, {weights / 1e6:.1f} M weights, {size / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()
