"""Packed and integer weights in the graph of a model: the same logits, and weights that are read back."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from architectures import build
from exported_models import Exported, padded_tokens, real_tokens
from onnx import TensorProto, helper
from packed_samples import products_model, sample

from compressor.linears import IgnoreRules, prunable_matrices
from compressor.quantization.scales import group_size_of, round_to_nearest
from exporters.causal_lm import LoadedParts, build_graph
from exporters.densify import densify
from exporters.errors import ExportError
from exporters.graph_weights import GraphWeight
from exporters.inspect import inspect_model
from exporters.manifest import TensorRow
from exporters.packed_graph import PackedGraph, pack_graph
from exporters.quantized import QuantizedWeight
from exporters.read import read_model
from exporters.wire import write_model


@dataclass
class Packed:
    """A tiny model whose first block is half zeros, packed and written."""

    model: torch.nn.Module
    graph: PackedGraph
    rows: dict[str, TensorRow]
    path: Path

    def logits(self) -> np.ndarray:
        """Of ONNX Runtime, at tokens that are no padding."""
        run = Exported.__new__(Exported)
        run.model = self.model
        run.session = onnxruntime.InferenceSession(str(self.path), providers=["CPUExecutionProvider"])
        run.inputs = {port.name: port for port in run.session.get_inputs()}
        run.outputs = {port.name: port for port in run.session.get_outputs()}
        tokens = padded_tokens()
        return real_tokens(run.run(tokens, run.empty_past(3))[0], tokens)

    def reference(self) -> np.ndarray:
        """Of PyTorch, at the same tokens."""
        tokens = padded_tokens()
        known = inspect.signature(self.model.forward).parameters
        given = {name: tensor for name, tensor in tokens.items() if name in known}
        with torch.no_grad():
            logits = self.model(**given, use_cache=False).logits
        return real_tokens(logits.float().numpy(), tokens)


def packed(folder: Path, name: str, bits: int | None = None, dtype: torch.dtype | None = None) -> Packed:
    """The variant with half of its first block's weights zero, quantised to ``bits``, packed."""
    model = build(name)
    parts = LoadedParts(model, dtype)
    quantized: dict[str, QuantizedWeight] = {}
    pruned, to_round = set(), []
    with torch.no_grad():
        for index, block in enumerate(parts.blocks.modules):
            for matrix in prunable_matrices(block, parts.blocks.block_name(index), IgnoreRules()):
                full = f"{parts.blocks.block_name(index)}.{matrix.parameter}"
                W = matrix.of(block)
                if index == 0:
                    W[torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
                    pruned.add(full)
                if bits is not None and matrix.expert in (None, 0):
                    stored = block.get_parameter(matrix.parameter)
                    rows = W if matrix.expert is None else stored.view(-1, stored.shape[-1])
                    to_round.append((full, rows))
        if bits is not None:
            quantized |= {full: _rounded(rows, bits) for full, rows in to_round}
        if bits is not None:
            ends = (model.get_input_embeddings(), model.get_output_embeddings())
            names = {id(p): name for name, p in model.named_parameters()}
            for weight in {id(end.weight): end.weight for end in ends}.values():
                quantized[names[id(weight)]] = _rounded(weight, 8)
    graph = build_graph(parts)
    made = pack_graph(graph.proto, graph.weights, pruned=pruned, quantized=quantized, activation_bits=32)
    path = folder / "model.onnx"
    written = write_model(made.proto, made.weights, path, "model.onnx.data", encoding="packed", pruned=pruned)
    onnx.checker.check_model(str(path))
    return Packed(model, made, {row.name: row for row in made.rows(written, "model.onnx.data")}, path)


def _rounded(W: torch.Tensor, bits: int) -> QuantizedWeight:
    """W rounded in place, and its scales."""
    group_size = group_size_of(bits) if bits == 4 else 0
    rounded = round_to_nearest(W, bits, group_size)
    W.copy_(rounded.values)
    return QuantizedWeight(bits, group_size, rounded.scales.numpy())


def check_read_back(made: Packed) -> None:
    """Every row of the manifest has its tensor, with the parameter's numbers, mask and bytes; inspect shows them."""
    tensors = {tensor.name: tensor for tensor in read_model(made.path).tensors}
    parameters = dict(made.model.named_parameters())
    for row in made.rows.values():
        tensor = tensors[row.name]
        assert (tensor.shape, tensor.encoding) == (row.shape, row.encoding)
        W = parameters[row.name].numpy()
        if row.encoding == "packed":
            assert np.array_equal(tensor.load(), W.T if row.transposed else W)
            assert tensor.stored_bytes == row.stored_bytes
        assert int(tensor.nonzero().sum()) == row.nnz == int(np.count_nonzero(W))
    inspected = inspect_model(made.path)
    shown = {row.name: row for row in inspected.weights}
    assert inspected.tensors_by_encoding["packed"] == len(made.graph.packed)
    assert all(
        shown[name].encoding == "packed" and shown[name].input_axis == -1 for name in made.graph.packed
    )


@pytest.mark.parametrize(("name", "bits"), [("llama3_rope", 8), ("gpt2", 4), ("opt", 8)])
def test_packed_graph_computes_the_models_logits(tmp_path: Path, name: str, bits: int) -> None:
    """Tied heads, Conv1D's orientation and Gemm's, biases, full and sparse matrices: PyTorch's logits."""
    made = packed(tmp_path, name, bits)
    np.testing.assert_allclose(made.logits(), made.reference(), atol=3e-5)
    assert made.graph.left == ()
    packed_names = {name for name, row in made.rows.items() if row.encoding == "packed"}
    of_first_block = {name for name in packed_names if ".0." in name}
    assert len(of_first_block) > 3
    assert (packed_names == of_first_block) == (bits == 8)  # a full int8 matrix is smaller dense
    check_read_back(made)


def test_packed_graph_of_float16_computes_in_float16_around_the_operator(tmp_path: Path) -> None:
    """The operator takes and gives float32; casts stand before and behind it, also for a bias."""
    model = build("gpt2").half()
    parts = LoadedParts(model)
    name = parts.blocks.block_name(0)
    with torch.no_grad():
        matrices = prunable_matrices(parts.blocks.modules[0], name, IgnoreRules())
        for matrix in matrices:
            W = matrix.of(parts.blocks.modules[0])
            W[torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.5] = 0
    graph = build_graph(parts)
    pruned = {f"{name}.{matrix.parameter}" for matrix in matrices}
    made = pack_graph(graph.proto, graph.weights, pruned=pruned, quantized={}, activation_bits=32)
    path = tmp_path / "model.onnx"
    write_model(made.proto, made.weights, path, "model.onnx.data", encoding="packed")
    result = Packed(model, made, {}, path)
    assert len(made.packed) == len(pruned)
    np.testing.assert_allclose(result.logits(), result.reference(), atol=0.05)


def test_packed_graph_of_bfloat16_stores_bfloat16_and_computes_in_float32(tmp_path: Path) -> None:
    """The Cast of a stored weight goes with it; values are stored in two bytes."""
    made = packed(tmp_path, "llama", dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    np.testing.assert_allclose(made.logits(), made.reference(), atol=3e-5)
    assert {row.dtype for row in made.rows.values() if row.encoding == "packed"} == {"bfloat16"}


@pytest.mark.parametrize(("name", "bits"), [("mixtral", None), ("mixtral", 8), ("qwen3_moe", 4)])
def test_packed_graph_packs_fused_experts(tmp_path: Path, name: str, bits: int | None) -> None:
    """Experts in one parameter of three axes are one packed weight, without the nodes that chose their matrices."""
    made = packed(tmp_path, name, bits)
    assert made.graph.left == ()
    assert {"gate_up_proj", "down_proj"} <= {name.rpartition(".")[2] for name in made.graph.packed}
    assert operators_of(made.graph).count("SparseExpertMatMul") >= 2
    if bits is not None:
        assert not {"GatherND"} & {
            node.op_type for node in made.graph.proto.graph.node if "layers" in node.name
        }
    np.testing.assert_allclose(made.logits(), made.reference(), atol=3e-5)
    check_read_back(made)
    densify(read_model(made.path), tmp_path / "dense.onnx")
    dense = Packed(made.model, made.graph, {}, tmp_path / "dense.onnx")
    np.testing.assert_allclose(dense.logits(), made.reference(), atol=3e-5)


def test_experts_whose_rows_are_no_whole_strips_stay_dense(tmp_path: Path) -> None:
    """Each expert would have to begin with a strip: it is said that they were left."""
    model = build("mixtral", intermediate_size=36)
    parts = LoadedParts(model)
    matrices = prunable_matrices(parts.blocks.modules[0], "", IgnoreRules())
    with torch.no_grad():
        for matrix in matrices:
            matrix.of(parts.blocks.modules[0])[:, ::2] = 0
    graph = build_graph(parts)
    pruned = {f"{parts.blocks.block_name(0)}.{matrix.parameter}" for matrix in matrices}
    made = pack_graph(graph.proto, graph.weights, pruned=pruned, quantized={}, activation_bits=32)
    assert [name.rpartition(".")[2] for name in made.left] == ["gate_up_proj"]


def one_product(W: np.ndarray) -> tuple[onnx.ModelProto, GraphWeight]:
    """A graph of one product with W (K, N), and W."""
    ports = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [None, side])
        for n, side in zip("xy", W.shape, strict=True)
    ]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", ports[:1], ports[1:])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return proto, GraphWeight("w", "w", W.shape, TensorProto.FLOAT, True, lambda: W)


def operators_of(made: PackedGraph) -> list[str]:
    return [node.op_type for node in made.proto.graph.node if node.domain == "blockpress"]


def test_products_of_the_same_input_share_an_operator(tmp_path: Path) -> None:
    """Query, key and value; gate and up; the other two alone. The block without zeros and the head have one each."""
    made = packed(tmp_path, "llama3_rope", 8)
    sparse = ["SparseMatMul3", "SparseMatMul", "SparseMatMul2", "SparseMatMul"]
    assert operators_of(made.graph) == [*sparse, *["Int8MatMul"] * 8]
    functions = [function.name for function in made.graph.proto.functions]
    assert functions == ["SparseMatMul", "SparseMatMul2", "SparseMatMul3", "Int8MatMul"]


def test_operators_have_up_to_three_weights_and_no_bias_that_comes_late(tmp_path: Path) -> None:
    """Of six products of one input the first two are made together; a bias of the graph's own begins the next three."""
    rng = np.random.default_rng(0)
    nodes = [helper.make_node("Gemm", ["x", f"w{i}"], [f"y{i}"]) for i in range(2)]
    nodes.append(helper.make_node("Abs", ["b"], ["late"]))
    nodes.append(helper.make_node("Gemm", ["x", "w2", "late"], ["y2"]))
    nodes += [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(3, 6)]
    ports = {"x": ["rows", 64], "b": [24], **{f"y{i}": ["rows", 24] for i in range(6)}}
    infos = {
        name: helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name, axes in ports.items()
    }
    graph = helper.make_graph(nodes, "g", [infos.pop("x"), infos.pop("b")], [*infos.values()])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    matrices = {f"w{i}": rng.normal(size=(64, 24)).astype(np.float32) for i in range(6)}
    for W in matrices.values():
        W[rng.random(W.shape) < 0.6] = 0
    weights = [
        GraphWeight(name, name, W.shape, TensorProto.FLOAT, True, partial(np.asarray, W))
        for name, W in matrices.items()
    ]
    made = pack_graph(proto, weights, pruned=set(matrices), quantized={}, activation_bits=32)
    assert operators_of(made) == ["SparseMatMul2", "SparseMatMul3", "SparseMatMul"]
    write_model(made.proto, made.weights, tmp_path / "m.onnx", "m.data", encoding="packed")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x, b = rng.normal(size=(3, 64)).astype(np.float32), rng.normal(size=24).astype(np.float32)
    for i, y in enumerate(session.run(None, {"x": x, "b": b})):
        np.testing.assert_allclose(y, x @ matrices[f"w{i}"] + (np.abs(b) if i == 2 else 0), atol=1e-4)


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_packed_weight_takes_the_bytes_of_its_nonzeros(tmp_path: Path, bits: int | None) -> None:
    """Values, one bit a weight and scales: the file has no more than 2 % beyond them."""
    rng = np.random.default_rng(0)
    W = (rng.normal(size=(1024, 256)) * (rng.random((1024, 256)) < 0.5)).astype(np.float32)
    quantized = {}
    scale_bytes = 0
    if bits is not None:
        rounded = round_to_nearest(torch.from_numpy(W.T.copy()), bits, group_size_of(bits))
        W = rounded.values.numpy().T
        quantized = {"w": QuantizedWeight(bits, group_size_of(bits), rounded.scales.numpy())}
        scale_bytes = 4 * rounded.scales.numel()
    proto, weight = one_product(W)
    made = pack_graph(proto, [weight], pruned={"w"}, quantized=quantized, activation_bits=32)
    written = write_model(made.proto, made.weights, tmp_path / "m.onnx", "m.data", encoding="packed")
    (row,) = made.rows(written, "m.data")
    least = np.count_nonzero(W) * (bits or 32) / 8 + W.size / 8 + scale_bytes
    assert least <= row.stored_bytes <= 1.02 * least
    data = (tmp_path / "m.data").stat().st_size
    assert data <= 1.02 * least + 4 * 4096  # each part may begin on a page


def test_packing_refuses_weights_that_are_no_multiples_of_their_scales(tmp_path: Path) -> None:
    """Scales that belong to other weights are found; nothing is rounded silently."""
    proto, weight = one_product(np.random.default_rng(0).normal(size=(64, 16)).astype(np.float32))
    scales = QuantizedWeight(8, 0, np.full((16, 1), 0.05, np.float32))
    with pytest.raises(ExportError) as refused:
        pack_graph(proto, [weight], pruned={"w"}, quantized={"w": scales}, activation_bits=8)
    assert refused.value.error_id == "E-EXPORT-SCALES"


@pytest.mark.parametrize("lacking", ["input", "output"])
def test_operator_that_lacks_an_input_or_an_output_is_refused(tmp_path: Path, lacking: str) -> None:
    """Five inputs and an output for each weight, or the file is not read."""
    model = products_model([sample(20, 64, "int8"), sample(5, 64, "int8")], 8)
    read_model(_saved(model, tmp_path))
    getattr(model.graph.node[0], lacking).pop()
    with pytest.raises(ExportError, match="SparseMatMul2 with") as refused:
        read_model(_saved(model, tmp_path))
    assert refused.value.error_id == "E-ONNX-PACKED"


def _saved(model: onnx.ModelProto, folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"
