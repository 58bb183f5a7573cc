"""A folder with an exported model that counts, for tests of what runs such folders.

After token t comes t + 1, and behind the seventh place t + 2. The tokens are bytes, so that what comes may be half of a
character.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCABULARY = 256
JUMP = 6  # the place behind which each step is one longer


def byte_tokenizer() -> Tokenizer:
    """Tokens are bytes, in the order of their values."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    coded = {_byte_of(sign): sign for sign in alphabet}
    tokenizer = Tokenizer(models.BPE({coded[byte]: byte for byte in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def write_counting_model(folder: Path, *, cached: bool = True, name: str = "model.onnx") -> Path:
    """The model with its tokenizer and configs: end token 0, at most 64 tokens."""
    graph = _counting_graph(cached)
    imports = [helper.make_opsetid("", 18)]
    path = folder / name
    path.write_bytes(helper.make_model(graph, opset_imports=imports, ir_version=8).SerializeToString())
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": 7, "max_position_embeddings": 64}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0]}))
    return path


def _counting_graph(cached: bool) -> onnx.GraphProto:
    """logits = -(v - next)^2, next = token + 1 (+ 1 behind place JUMP)."""

    def constant(name: str, value: object) -> onnx.TensorProto:
        return numpy_helper.from_array(np.asarray(value, np.float32), name)

    node = helper.make_node
    nodes = [
        node("Cast", ["input_ids"], ["tokens"], to=TensorProto.FLOAT),
        node("Cast", ["position_ids"], ["positions"], to=TensorProto.FLOAT),
        node("Greater", ["positions", "jump"], ["late"]),
        node("Cast", ["late"], ["extra"], to=TensorProto.FLOAT),
        node("Sum", ["tokens", "extra", "one"], ["next"]),
        node("Unsqueeze", ["next", "last"], ["next_column"]),
        node("Sub", ["all_tokens", "next_column"], ["distance"]),
        node("Mul", ["distance", "distance"], ["square"]),
        node("Neg", ["square"], ["logits"]),
    ]
    inputs = [
        helper.make_tensor_value_info(n, TensorProto.INT64, ["b", t])
        for n, t in (("input_ids", "t"), ("attention_mask", "s"), ("position_ids", "t"))
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["b", "t", VOCABULARY])]
    if cached:
        for part in ("key", "value"):
            shape = ["b", "heads", "past", "size"]
            inputs.append(
                helper.make_tensor_value_info(f"past_key_values.0.{part}", TensorProto.FLOAT, shape)
            )
            outputs.append(
                helper.make_tensor_value_info(f"present.0.{part}", TensorProto.FLOAT, ["b", "h", "p", "s"])
            )
            nodes += [
                node("Expand", ["tokens_4d", "heads_and_size"], [f"states_{part}"]),
                node(
                    "Concat", [f"past_key_values.0.{part}", f"states_{part}"], [f"present.0.{part}"], axis=2
                ),
            ]
        nodes.insert(0, node("Unsqueeze", ["tokens_early", "head_axes"], ["tokens_4d"]))
        nodes.insert(0, node("Cast", ["input_ids"], ["tokens_early"], to=TensorProto.FLOAT))
    held = [
        constant("jump", JUMP),
        constant("one", 1),
        constant("all_tokens", np.arange(VOCABULARY)),
        numpy_helper.from_array(np.array([-1]), "last"),
        numpy_helper.from_array(np.array([1, 3]), "head_axes"),
        numpy_helper.from_array(np.array([1, 2, 1, 4]), "heads_and_size"),
    ]
    return helper.make_graph(nodes, "counting", inputs, outputs, held)


def _byte_of(sign: str) -> int:
    """The byte that a sign of the byte-level alphabet stands for: itself, or one of those without a printable sign."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if ord(sign) < 256:
        return ord(sign)
    return [byte for byte in range(256) if byte not in printable][ord(sign) - 256]
