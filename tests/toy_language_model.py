"""A language model of a few hundred weights, written twice by hand: as an ONNX graph and in numpy.

Two decoder blocks with causal attention of two heads over a KV cache, learned positions, a ReLU network and
residual sums. The two versions share nothing but their weights, so that validation can be tested without any
exporter.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from exporters.manifest import Manifest, hash_files, write_manifest
from exporters.masks import write_masks
from exporters.wire import write_model
from validators.reference import position_ids
from validators.request import ValidationRequest

VOCAB, HIDDEN, HEADS, HEAD_DIM, INNER, BLOCKS, POSITIONS = 24, 8, 2, 4, 16, 2, 64
Weights = dict[str, NDArray[np.float32]]

# ONNX's text format has no dots in names; two underscores stand for each.
_PROLOGUE = """
    hidden = Gather(embed, input_ids)
    place = Gather(positions, position_ids)
    blockin_0 = Add(hidden, place)
    past_shape = Shape(past_key_values__0__key)
    past_length = Gather(past_shape, two)
    ids_shape = Shape(input_ids)
    batch = Gather(ids_shape, zero)
    new_length = Gather(ids_shape, one)
    length = Add(past_length, new_length)
    query_place = Range(past_length, length, one)
    key_place = Range(zero, length, one)
    query_column = Unsqueeze(query_place, last)
    causal = LessOrEqual(key_place, query_column)
    mask_bool = Cast<to=9>(attention_mask)
    mask_rows = Unsqueeze(mask_bool, middle)
    visible = And(causal, mask_rows)
    bias = Where(visible, nothing, never)
"""
_BLOCK = """
    q_{i} = MatMul(blockin_{i}, block__{i}__q)
    k_{i} = MatMul(blockin_{i}, block__{i}__k)
    v_{i} = MatMul(blockin_{i}, block__{i}__v)
    q_split_{i} = Reshape(q_{i}, heads)
    k_split_{i} = Reshape(k_{i}, heads)
    v_split_{i} = Reshape(v_{i}, heads)
    q_heads_{i} = Transpose<perm=[0, 2, 1, 3]>(q_split_{i})
    k_heads_{i} = Transpose<perm=[0, 2, 1, 3]>(k_split_{i})
    v_heads_{i} = Transpose<perm=[0, 2, 1, 3]>(v_split_{i})
    k_all_{i} = Concat<axis=2>(past_key_values__{i}__key, k_heads_{i})
    v_all_{i} = Concat<axis=2>(past_key_values__{i}__value, v_heads_{i})
    present__{i}__key = {key_out}(k_all_{i}{key_operands})
    present__{i}__value = Identity(v_all_{i})
    k_columns_{i} = Transpose<perm=[0, 1, 3, 2]>(k_all_{i})
    scores_{i} = MatMul(q_heads_{i}, k_columns_{i})
    biased_{i} = Add(scores_{i}, bias)
    share_{i} = Softmax<axis=-1>(biased_{i})
    mixed_{i} = MatMul(share_{i}, v_all_{i})
    mixed_rows_{i} = Transpose<perm=[0, 2, 1, 3]>(mixed_{i})
    mixed_flat_{i} = Reshape(mixed_rows_{i}, flat)
    attended_{i} = Add(blockin_{i}, mixed_flat_{i})
    inner_{i} = MatMul(attended_{i}, block__{i}__up)
    active_{i} = Relu(inner_{i})
    outer_{i} = MatMul(active_{i}, block__{i}__down)
    blockin_{next} = Add(attended_{i}, outer_{i})
"""


def random_weights(seed: int = 0, sparsity: float = 0.5) -> Weights:
    """Weights as stored in the graph, (in, out); two of each four inputs of a block matrix are zero."""
    rng = np.random.default_rng(seed)
    weights: Weights = {
        "embed": rng.normal(size=(VOCAB, HIDDEN)).astype(np.float32) / 2,
        "positions": rng.normal(size=(POSITIONS, HIDDEN)).astype(np.float32) / 2,
        "head": rng.normal(size=(HIDDEN, VOCAB)).astype(np.float32) / 4,
    }
    for index in range(BLOCKS):
        for name, (rows, columns) in _block_shapes().items():
            matrix = rng.normal(size=(rows, columns)).astype(np.float32) / 2
            groups = np.abs(matrix).reshape(rows // 4, 4, columns)
            kept = np.argsort(np.argsort(groups, axis=1), axis=1) >= 4 * sparsity
            weights[f"block.{index}.{name}"] = matrix * kept.reshape(rows, columns)
    return weights


def _block_shapes() -> dict[str, tuple[int, int]]:
    square = (HIDDEN, HIDDEN)
    return {"q": square, "k": square, "v": square, "up": (HIDDEN, INNER), "down": (INNER, HIDDEN)}


def pruned_names() -> list[str]:
    """Names of the block matrices."""
    return [f"block.{index}.{name}" for index in range(BLOCKS) for name in _block_shapes()]


class ToyReference:
    """The model in numpy; a ``validators.reference.Reference``."""

    def __init__(self, weights: Mapping[str, NDArray[np.float32]]) -> None:
        self.weights = weights

    def block_outputs(self, ids, attention_mask=None):  # type: ignore[no-untyped-def]
        """Hidden states after each block."""
        mask = np.ones_like(ids) if attention_mask is None else attention_mask
        hidden = self.weights["embed"][ids] + self.weights["positions"][position_ids(mask)]
        visible = np.tril(np.ones((ids.shape[1],) * 2, bool)) & (mask[:, None, :] != 0)  # (B, T, T)
        outputs = []
        for index in range(BLOCKS):
            w = {name: self.weights[f"block.{index}.{name}"] for name in _block_shapes()}
            split = (*ids.shape, HEADS, HEAD_DIM)
            q, k, v = ((hidden @ w[name]).reshape(split) for name in "qkv")
            scores = np.einsum("bqhd,bkhd->bhqk", q, k) + np.where(visible, 0, -1e9)[:, None]
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            hidden = hidden + np.einsum("bhqk,bkhd->bqhd", share, v).reshape(hidden.shape)
            hidden = hidden + np.maximum(hidden @ w["up"], 0) @ w["down"]
            outputs.append(hidden.astype(np.float32))
        return outputs

    def logits(self, ids, attention_mask=None):  # type: ignore[no-untyped-def]
        """Logits (B, T, V)."""
        return (self.block_outputs(ids, attention_mask)[-1] @ self.weights["head"]).astype(np.float32)


def load_reference(path: str) -> ToyReference:
    """The reference with the weights in ``path``: a factory for requests."""
    with np.load(path) as stored:
        return ToyReference(dict(stored))


def crash(**_: object) -> ToyReference:
    """End the process as a fault in native code does."""
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("not reached")


def fill_memory(**_: object) -> ToyReference:
    """Take memory until somebody objects."""
    taken = []
    while True:
        taken.append(np.ones(2**21))  # 16 MiB, touched
        time.sleep(0.01)


def kill(**_: object) -> ToyReference:
    """End the process as the system does when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("not reached")


def ask_too_much(**_: object) -> ToyReference:
    """Ask for more memory than any machine has."""
    np.empty(2**60, np.uint8)
    raise AssertionError("not reached")


def hang_with_children(**_: object) -> ToyReference:
    """Start a process and never come back."""
    subprocess.run([sys.executable, "-c", "import time; time.sleep(3600)"], check=True)
    raise AssertionError("not reached")


def sleep(**_: object) -> ToyReference:
    """Take a very long time."""
    time.sleep(3600)
    raise AssertionError("not reached")


def stumble(**_: object) -> ToyReference:
    """Fail as a bug does."""
    raise ZeroDivisionError("a bug")


@dataclass(frozen=True)
class GraphOptions:
    """How the graph is to differ from the plain one."""

    symbolic_heads: bool = True
    swap_key_heads: bool = False  # a broken cache: the keys of both heads change places on the way out
    ignore_padding: bool = False  # a broken mask: padding is attended to
    dtype: str = "float"  # "float" or "float16": what the graph computes in


def graph(options: GraphOptions | None = None) -> onnx.ModelProto:
    """The ONNX graph without its weights."""
    options = options or GraphOptions()
    heads = ("heads", "head_dim") if options.symbolic_heads else (str(HEADS), str(HEAD_DIM))
    kv = f"{options.dtype}[batch, {heads[0]}, {{}}, {heads[1]}]"
    pairs = [f"__{i}__{kind}" for i in range(BLOCKS) for kind in ("key", "value")]
    pasts = ", ".join(f"{kv.format('past')} past_key_values{pair}" for pair in pairs)
    presents = ", ".join(f"{kv.format('total')} present{pair}" for pair in pairs)
    swap = {"key_out": "Gather<axis=1>", "key_operands": ", swapped"}
    keep = {"key_out": "Identity", "key_operands": ""}
    key = swap if options.swap_key_heads else keep
    blocks = "".join(_BLOCK.format(i=index, next=index + 1, **key) for index in range(BLOCKS))
    prologue = _PROLOGUE
    if options.ignore_padding:
        prologue = prologue.replace("And(causal, mask_rows)", "And(causal, causal)")
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 18]>
        toy (int64[batch, sequence] input_ids, int64[batch, total] attention_mask,
             int64[batch, sequence] position_ids, {pasts})
        => ({options.dtype}[batch, sequence, {VOCAB}] logits, {presents})
        <int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, int64[1] last = {{-1}},
         int64[2] middle = {{1, 2}}, int64[2] swapped = {{1, 0}},
         int64[4] heads = {{0, 0, {HEADS}, {HEAD_DIM}}}, int64[3] flat = {{0, 0, {HIDDEN}}}>
        {{ {prologue} {blocks} logits = MatMul(blockin_{BLOCKS}, head) }}"""
    )
    dtype = np.float16 if options.dtype == "float16" else np.float32
    for name, value in (("nothing", 0), ("never", -10000)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value, dtype), name))
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("__", ".") for name in names]
    for port in (*proto.graph.input, *proto.graph.output):
        port.name = port.name.replace("__", ".")
    return proto


@dataclass(frozen=True)
class _StoredWeight:
    name: str
    shape: tuple[int, ...]
    dtype: int
    transposed: bool
    load: Callable[[], NDArray[np.generic]]


@dataclass(frozen=True)
class ToyExport:
    """An export in a folder and the request that validates it fully."""

    folder: Path
    request: ValidationRequest

    @property
    def model_path(self) -> Path:
        """The model file."""
        return self.folder / "toy.onnx"


def write_export(
    folder: Path,
    *,
    weights: Weights | None = None,
    reference: Weights | None = None,
    options: GraphOptions | None = None,
    encoding: str = "auto",
    pattern: str | None = "2:4",
) -> ToyExport:
    """Write an export of ``weights``; reference and masks are those of ``reference`` (default: the same)."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = weights or random_weights()
    reference = reference or weights
    options = options or GraphOptions()
    stored_dtype = np.float16 if options.dtype == "float16" else np.float32
    stored = [
        _StoredWeight(
            name,
            values.shape,
            onnx.helper.np_dtype_to_tensor_dtype(np.dtype(stored_dtype)),
            name in pruned_names(),
            partial(np.asarray, values.astype(stored_dtype)),
        )
        for name, values in weights.items()
    ]
    rows = write_model(
        graph(options),
        stored,
        folder / "toy.onnx",
        "toy.onnx.data",
        encoding=encoding,
        pruned=set(pruned_names()),
    )
    files = hash_files(folder, ["toy.onnx", "toy.onnx.data"])
    outputs = tuple(f"blockin_{index + 1}" for index in range(BLOCKS))
    manifest = Manifest(files, rows, block_outputs=outputs, pattern=pattern, sparsity=0.5)
    write_manifest(manifest, folder / "toy.manifest.json")
    write_masks(folder / "masks.safetensors", {name: reference[name].T != 0 for name in pruned_names()})
    np.savez(
        folder / "reference.npz",
        **{k: v.astype(stored_dtype).astype(np.float32) for k, v in reference.items()},
    )
    windows = np.random.default_rng(1).integers(0, VOCAB, size=(4, 48))
    np.save(folder / "windows.npy", windows)
    return ToyExport(folder, _request(folder))


def _request(folder: Path) -> ValidationRequest:
    return ValidationRequest(
        model_path=str(folder / "toy.onnx"),
        manifest_path=str(folder / "toy.manifest.json"),
        masks_path=str(folder / "masks.safetensors"),
        reference_factory="toy_language_model:load_reference",
        reference_arguments={"path": str(folder / "reference.npz")},
        windows_path=str(folder / "windows.npy"),
        provider="cpu",
        time_limit_s=300,
    )


@dataclass(frozen=True)
class Bigram:
    """Logits that depend on the last token alone."""

    table: NDArray[np.float32]

    def logits(self, ids, attention_mask=None):  # type: ignore[no-untyped-def]
        """Logits (B, T, V)."""
        return self.table[ids]

    def block_outputs(self, ids, attention_mask=None):  # type: ignore[no-untyped-def]
        """There are no blocks."""
        return []


def load_bigram(path: str) -> Bigram:
    """The table in ``path``: a factory for requests."""
    return Bigram(np.load(path))
