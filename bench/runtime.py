"""The sparse operator against ONNX Runtime's own dense matrix products, one matrix shape at a time.

Each contender is a graph of as many matrices of one shape as its weights need to be far larger than the caches (or
`--megabytes` says), all different, so that ONNX Runtime cannot share them. Sessions run one after the other in each
round (A B C A B C ...), without spinning threads; a row is the median over the rounds, per matrix, and a ratio the
median of those within the rounds. Rivals: `dense-float32` (MatMul), `dense-int8` (DynamicQuantizeLinear,
MatMulInteger and the scales, as ONNX Runtime's dynamic quantisation writes it) and `dense-int4` (MatMulNBits, blocks of
32, accuracy level 4). "bandwidth" is the bytes of the weights over the time, as a share of what reading memory with as
many threads reaches just before.

    python bench/runtime.py --columns 4096,11008 --sparsities 0.5,0.7 --rows 1,16,128 --markdown runtime.md

Needs the package in `runtime/` installed.
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper

import blockpress_runtime
from blockpress_runtime.packing import pack

Array = NDArray[Any]

OURS = {
    "float32": 0,
    "bfloat16": 0,
    "int8": 0,
    "int4": 64,
}  # value type: columns that share a scale, 0 for rows
RIVALS = ("dense-float32", "dense-int8", "dense-int4")
BLOCK = 32  # columns that share a scale in the dense 4-bit rival, its usual choice


class GraphFile:
    """One ONNX graph with its weights in a file beside it: `matrices` products of one input."""

    def __init__(self, path: Path, columns: int, rows: int) -> None:
        self.path, self.columns, self.rows = path, columns, rows
        self.nodes: list[onnx.NodeProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.weight_bytes = 0
        self._file = path.with_suffix(".bin").open("wb")

    def weight(self, name: str, values: Array, dtype: int | None = None) -> str:
        """Appends one initializer; its name."""
        self._file.write(b"\0" * (-self._file.tell() % 4096))
        tensor = TensorProto(name=name, dims=values.shape)
        tensor.data_type = helper.np_dtype_to_tensor_dtype(values.dtype) if dtype is None else dtype
        content = np.ascontiguousarray(values).tobytes()
        if len(content) < 1024:
            tensor.raw_data = content
        else:
            tensor.data_location = TensorProto.EXTERNAL
            entries = (("location", self._file.name), ("offset", self._file.tell()), ("length", len(content)))
            for key, value in entries:
                tensor.external_data.add(key=key, value=Path(value).name if key == "location" else str(value))
            self._file.write(content)
        self.initializers.append(tensor)
        self.weight_bytes += len(content)
        return name

    def node(
        self, op: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any
    ) -> None:
        """Appends one node."""
        self.nodes.append(helper.make_node(op, inputs, outputs, domain=domain, **attributes))

    def output(self, name: str) -> str:
        """Declares an output (M, rows); its name."""
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["M", self.rows]))
        return name

    def save(self) -> None:
        """Writes the graph."""
        self._file.close()
        x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["M", self.columns])
        graph = helper.make_graph(self.nodes, "products", [x], self.outputs, self.initializers)
        domains = [helper.make_opsetid(d, v) for d, v in (("", 21), ("com.microsoft", 1), ("blockpress", 1))]
        onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=10), str(self.path))


def sparse_weights(generator: np.random.Generator, shape: tuple[int, int], sparsity: float) -> Array:
    """W (rows, columns) float32, standard normal, the entries of smallest size zero."""
    W = generator.standard_normal(shape, dtype=np.float32)
    W[np.abs(W) < np.quantile(np.abs(W[:256]), sparsity)] = 0
    return W


def add_sparse(graph: GraphFile, index: int, W: Array, dtype: str, activation_bits: int) -> None:
    """One product through the operator."""
    group = OURS[dtype]
    scales = None
    if dtype in ("int8", "int4"):
        largest = 127 if dtype == "int8" else 7
        groups = W.reshape(W.shape[0], -1, group or W.shape[1])
        scales = np.abs(groups).max(axis=2) / largest
        W = np.rint(groups / np.maximum(scales, 1e-20)[:, :, None]).astype(np.int8).reshape(W.shape)
    elif dtype == "bfloat16":
        W = (W.view(np.uint32) >> 16).astype(np.uint16)
    packed = pack(W, dtype, scales, group if scales is not None else 0)  # type: ignore[arg-type]
    inputs = ["x"] + [
        graph.weight(f"{name}{index}", values, TensorProto.BFLOAT16 if values.dtype == np.uint16 else None)
        for name, values in (
            ("mask", packed.mask),
            ("values", packed.values),
            ("offsets", packed.offsets),
            ("scales", packed.scales),
            ("bias", np.zeros(1, np.float32)),
        )
    ]
    graph.node(
        "SparseMatMul",
        inputs,
        [graph.output(f"y{index}")],
        domain="blockpress",
        format_version=1,
        columns=packed.columns,
        group_size=packed.group_size,
        activation_bits=activation_bits if scales is not None else 32,
    )


def add_dense(graph: GraphFile, index: int, W: Array, name: str) -> None:
    """One product as ONNX Runtime does it."""
    y = graph.output(f"y{index}")
    if name == "dense-float32":
        graph.node("MatMul", ["x", graph.weight(f"W{index}", W.T)], [y])
    elif name == "dense-int8":
        if index == 0:
            graph.node("DynamicQuantizeLinear", ["x"], ["xq", "xs", "xz"])
        scales = np.abs(W).max(axis=1) / 127
        q = np.rint(W / scales[:, None]).astype(np.int8)
        graph.node("MatMulInteger", ["xq", graph.weight(f"W{index}", q.T), "xz"], [f"a{index}"])
        graph.node("Cast", [f"a{index}"], [f"b{index}"], to=TensorProto.FLOAT)
        graph.node("Mul", ["xs", graph.weight(f"s{index}", scales)], [f"m{index}"])
        graph.node("Mul", [f"b{index}", f"m{index}"], [y])
    else:
        blocks = W.reshape(W.shape[0], -1, BLOCK)
        scales = np.abs(blocks).max(axis=2) / 7
        q = (np.rint(blocks / scales[:, :, None]) + 8).astype(np.uint8)
        packed = q[:, :, ::2] | q[:, :, 1::2] << 4
        inputs = ["x", graph.weight(f"W{index}", packed), graph.weight(f"s{index}", scales.reshape(-1))]
        sizes = {"K": graph.columns, "N": graph.rows, "bits": 4, "block_size": BLOCK}
        graph.node("MatMulNBits", inputs, [y], domain="com.microsoft", accuracy_level=4, **sizes)


@dataclass
class Contender:
    """A session over several matrices, and the seconds that each run of all of them took."""

    name: str
    session: Any
    matrices: int
    bytes_per_matrix: float
    seconds: list[float]

    def run(self, x: Array) -> None:
        """One timed run."""
        begun = time.perf_counter()
        self.session.run(None, {"x": x})
        self.seconds.append((time.perf_counter() - begun) / self.matrices)


def contender(
    folder: Path,
    name: str,
    shape: tuple[int, int],
    megabytes: int,
    threads: int,
    add: Callable[..., None],
    W: Array,
) -> Contender:
    """The session of one contender; its first matrix is W, the others W with its rows in another order."""
    probe = GraphFile(folder / "probe.onnx", shape[1], shape[0])
    add(probe, 0, W)
    probe.save()
    matrices = max(2, -(-megabytes * 10**6 // probe.weight_bytes))
    graph = GraphFile(folder / f"{name}.onnx", shape[1], shape[0])
    for index in range(matrices):
        add(graph, index, np.roll(W, 37 * index, axis=0))
    graph.save()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    blockpress_runtime.register(options)
    session = onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"])
    return Contender(name, session, matrices, graph.weight_bytes / matrices, [])


def read_bandwidth(threads: int, megabytes: int = 1024) -> float:
    """Bytes per second that as many threads read from memory: the best of five passes over a large buffer."""
    parts = np.array_split(np.ones(megabytes * 10**6 // 8, np.int64), threads)
    best = 0.0
    for _ in range(5):
        workers = [threading.Thread(target=np.max, args=(part,)) for part in parts]
        begun = time.perf_counter()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        best = max(best, megabytes * 10**6 / (time.perf_counter() - begun))
    return best


def ratio(rival: list[float], ours: list[float]) -> float:
    """How many times faster than the rival: the median over the rounds of the ratios within them."""
    return statistics.median(theirs / seconds for theirs, seconds in zip(rival, ours, strict=True))


def table(contenders: list[Contender], rows: int, bandwidth: float) -> list[str]:
    """Markdown rows: the time per matrix, ratios to the rivals, share of the bandwidth."""
    by_name = {c.name: c.seconds for c in contenders}
    lines = []
    for c in contenders:
        ratios = " | ".join(f"{ratio(by_name[rival], c.seconds):.2f}" for rival in RIVALS)
        median = statistics.median(c.seconds)
        share = c.bytes_per_matrix / median / bandwidth
        quarters = statistics.quantiles(c.seconds, n=4)
        spread = (quarters[2] - quarters[0]) / median
        lines.append(
            f"| {c.name} | {rows} | {median * 1e3:.3f} | {spread:.0%} | {ratios} | "
            f"{c.bytes_per_matrix / 1e6:.1f} | {share:.0%} |"
        )
    return lines


@click.command()
@click.option(
    "--columns", default="4096,11008", show_default=True, help="K of the matrices, several with commas."
)
@click.option("--outputs", default=4096, show_default=True, help="N of the matrices.")
@click.option("--sparsities", default="0.5,0.7", show_default=True)
@click.option("--rows", default="1,16,128", show_default=True, help="Rows of x, several with commas.")
@click.option("--types", default="float32,bfloat16,int8,int4", show_default=True, help="Value types of ours.")
@click.option("--megabytes", default=160, show_default=True, help="Least weight bytes of a contender.")
@click.option("--rounds", default=25, show_default=True)
@click.option("--threads", default=os.cpu_count() or 1, show_default=True)
@click.option(
    "--markdown", type=click.Path(dir_okay=False, path_type=Path), help="Write the tables here too."
)
def main(
    columns: str,
    outputs: int,
    sparsities: str,
    rows: str,
    types: str,
    megabytes: int,
    rounds: int,
    threads: int,
    markdown: Path | None,
) -> None:
    """Time the operator and its rivals."""
    kernels = os.environ.get("BLOCKPRESS_RUNTIME_ISA", "best")
    lines = [f"{platform.processor() or platform.machine()}, {threads} threads, kernels: {kernels}", ""]
    for K in (int(part) for part in columns.split(",")):
        for sparsity in (float(part) for part in sparsities.split(",")):
            lines += compare(K, outputs, sparsity, rows, types, megabytes, rounds, threads)
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(
    K: int, outputs: int, sparsity: float, rows: str, types: str, megabytes: int, rounds: int, threads: int
) -> list[str]:
    """The tables of one matrix shape and sparsity, printed as they are ready."""
    generator = np.random.default_rng(0)
    W = sparse_weights(generator, (outputs, K), sparsity)
    dense = generator.standard_normal((outputs, K), dtype=np.float32)
    lines: list[str] = []

    def say(line: str) -> None:
        lines.append(line)
        click.echo(line)

    with tempfile.TemporaryDirectory() as name:
        folder, shape = Path(name), (outputs, K)
        contenders = [
            contender(
                folder,
                rival,
                shape,
                megabytes,
                threads,
                lambda g, i, M, r=rival: add_dense(g, i, M, r),
                dense,
            )
            for rival in RIVALS
        ] + [
            contender(
                folder,
                f"sparse-{t}",
                shape,
                megabytes,
                threads,
                lambda g, i, M, t=t: add_sparse(g, i, M, t, 8),
                W,
            )
            for t in types.split(",")
        ]
        for count in (int(part) for part in rows.split(",")):
            bandwidth = read_bandwidth(threads)
            x = generator.standard_normal((count, K), dtype=np.float32)
            for c in contenders:
                c.run(x)
                c.seconds.clear()
            for _ in range(rounds if count < 16 else max(3, rounds // 3)):
                for c in contenders:
                    c.run(x)
            say(f"K = {K}, N = {outputs}, {sparsity:.0%} zeros, {bandwidth / 1e9:.1f} GB/s read\n")
            say(
                "| matrix | rows of x | ms | spread | x dense-float32 | x dense-int8 | x dense-int4 | MB | bandwidth |"
            )
            say("|---|---|---|---|---|---|---|---|---|")
            for line in table(contenders, count, bandwidth):
                say(line)
            say("")
    return lines


if __name__ == "__main__":
    main()
