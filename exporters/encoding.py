"""How each weight is stored: dense or as a sparse initializer, decided by exact byte counts.

Bytes of a tensor of ``size`` elements, ``width`` bytes each, ``nnz`` of them not zero:

* dense: ``size * width`` in the data file and a header in the graph;
* sparse initializer: ``nnz * width`` in the data file; in the graph a header and the linear indices as varints,
  one byte below 2^7, two below 2^14, three below 2^21, four below 2^28, five beyond;
* bitmask: ``ceil(size / 8) + nnz * width`` and a dense header. Reported for information; no stock tool reads it.

Stock ONNX Runtime expands a sparse initializer while it loads, so sparse saves disk and download, not memory or time.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.fragments import dense_initializer, sparse_initializer_head, tensor_bytes
from exporters.manifest import Encoding, TensorRow
from exporters.masks import nonzero_mask, pack_mask
from exporters.protobuf import packed_index_bytes

EncodingMode = Literal["auto", "dense", "sparse", "packed"]

MIN_SAVING = 0.10  # a sparse initializer loads several times slower: a few per cent are not worth it
INLINE_BUDGET_BYTES = 3 * 2**29  # 1.5 GiB: indices stand in the .onnx file, and protobuf allows it 2 GiB
MAX_EXPANDED_BYTES = 2**31 - 1  # ONNX Runtime 1.31 refuses a sparse initializer that expands to more
SPARSE_DTYPES = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8})
_NOMINAL_OFFSET = 10**9  # an offset costs its decimal digits: ten are counted before the layout is known


@dataclass(frozen=True)
class TensorCensus:
    """What the choice of an encoding needs to know about one weight.

    Attributes:
        name: Initializer name.
        shape: Shape as stored.
        dtype: ONNX element type.
        nnz: Elements that are not zero.
        index_bytes: Bytes of the varint indices of these elements.
        mask_sha256: Digest of the packed non-zero pattern; None when nothing is zero.
    """

    name: str
    shape: tuple[int, ...]
    dtype: int
    nnz: int
    index_bytes: int
    mask_sha256: str | None

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def may_be_sparse(self) -> bool:
        """Whether a sparse initializer of this weight is legal and loads: type, rank, size, some values."""
        return (
            self.dtype in SPARSE_DTYPES
            and len(self.shape) >= 2
            and 0 < self.nnz < self.size
            and tensor_bytes(self.shape, self.dtype) <= MAX_EXPANDED_BYTES
        )


def take_census(name: str, dtype: int, values: NDArray[np.generic]) -> TensorCensus:
    """The census of a weight given as an array in its stored shape. Negative zero counts as zero."""
    return census_of_mask(name, dtype, nonzero_mask(values))


def census_of_mask(name: str, dtype: int, nonzero: NDArray[np.bool_]) -> TensorCensus:
    """The census of a weight given as the places of its non-zero elements, in its stored shape."""
    flat = np.ascontiguousarray(nonzero).reshape(-1)
    nnz = int(np.count_nonzero(flat))
    digest = pack_mask(flat).sha256() if nnz < flat.size else None
    return TensorCensus(name, tuple(nonzero.shape), dtype, nnz, packed_index_bytes(flat), digest)


def encoding_bytes(census: TensorCensus, location: str, offset: int = _NOMINAL_OFFSET) -> dict[str, int]:
    """Exact bytes of the weight in the files by encoding, headers included, padding between tensors not.

    ``sparse`` is absent where it is not legal. ``offset`` is where the values lie in the data file
    ``location``; its decimal digits are part of the header.
    """
    header = len(dense_initializer(census.name, census.shape, census.dtype, location, offset))
    values = tensor_bytes((census.nnz,), census.dtype)
    sizes = {"dense": header + tensor_bytes(census.shape, census.dtype)}
    if census.may_be_sparse:
        head = sparse_initializer_head(
            census.name, census.shape, census.dtype, census.nnz, census.index_bytes, location, offset
        )
        sizes["sparse"] = len(head) + census.index_bytes + values
    sizes["bitmask"] = header + -(-census.size // 8) + values
    return sizes


def is_pruned(census: TensorCensus, pruned: Collection[str] | None) -> bool:
    """Whether the weight's zeros count as pruned: it is in ``pruned`` or, where that is None, a matrix."""
    if census.nnz == census.size:
        return False
    if pruned is None:
        return len(census.shape) >= 2 and census.dtype in SPARSE_DTYPES
    return census.name in pruned


def plan_encodings(
    censuses: Sequence[TensorCensus],
    mode: EncodingMode,
    *,
    location: str,
    pruned: Collection[str] | None = None,
    inline_budget: int = INLINE_BUDGET_BYTES,
) -> dict[str, Encoding]:
    """The encoding of each weight by name.

    ``auto`` takes the sparse initializer where it is legal and saves at least 10 % of the weight's dense
    bytes, so that no weight is ever larger than dense. ``sparse`` takes it wherever it is legal and pruning
    put zeros (see ``is_pruned``), also where that is larger. ``dense`` never takes it, and ``packed`` neither: what
    can be packed has been before (``packed_graph``). The indices of all
    chosen weights stay within ``inline_budget`` bytes of the .onnx file; when they do not, those that save
    most for their inline bytes go first and the others are dense.
    """
    plan: dict[str, Encoding] = {census.name: "dense" for census in censuses}
    candidates: list[tuple[float, int, TensorCensus]] = []
    for order, census in enumerate(censuses):
        if mode in ("dense", "packed") or not census.may_be_sparse:
            continue
        sizes = encoding_bytes(census, location)
        saved = sizes["dense"] - sizes["sparse"]
        if is_pruned(census, pruned) if mode == "sparse" else saved >= MIN_SAVING * sizes["dense"]:
            candidates.append((-saved / census.index_bytes, order, census))
    left = inline_budget
    for _, _, census in sorted(candidates, key=lambda candidate: candidate[:2]):
        if census.index_bytes <= left:
            left -= census.index_bytes
            plan[census.name] = "sparse"
    return plan


@dataclass(frozen=True)
class EncodingSummary:
    """What the encodings of one export amount to.

    Attributes:
        tensors: Number of weights by the encoding that was used.
        stored_bytes: Bytes of these weights by the encoding that was used.
        bytes_by_encoding: Bytes of all weights if all used one encoding; a weight that cannot be sparse counts dense.
        load_note: One sentence on what loading costs, for people.
    """

    tensors: Mapping[Encoding, int]
    stored_bytes: Mapping[Encoding, int]
    bytes_by_encoding: Mapping[str, int]
    load_note: str


def summarize(rows: Sequence[TensorRow]) -> EncodingSummary:
    """Totals over the weights of an export, and what loading it costs."""
    used = used_encodings(row.encoding for row in rows)
    tensors = {encoding: sum(row.encoding == encoding for row in rows) for encoding in used}
    stored = {kind: sum(row.stored_bytes for row in rows if row.encoding == kind) for kind in used}
    possible = {
        encoding: sum(row.bytes_by_encoding.get(encoding, row.bytes_by_encoding["dense"]) for row in rows)
        for encoding in (*used, "bitmask")
    }
    return EncodingSummary(tensors, stored, possible, _load_note(tensors, len(rows)))


def used_encodings(found: Iterable[Encoding]) -> tuple[Encoding, ...]:
    """The encodings that totals name: dense and sparse, and packed where there is one."""
    return ("dense", "sparse", "packed") if "packed" in found else ("dense", "sparse")


def _load_note(tensors: Mapping[Encoding, int], weights: int) -> str:
    sparse, packed = tensors["sparse"], tensors.get("packed", 0)
    if packed:
        return (
            f"{packed} of {weights} weights are packed and stay so in memory. With the blockpress-runtime library "
            "registered they are multiplied as they lie; without it a function in the file unpacks them in every "
            "call: correct, and slow."
        )
    if not sparse:
        return "All weights are dense: ONNX Runtime maps them from the data file at load."
    return (
        f"{sparse} of {weights} weights are sparse initializers. Stock ONNX Runtime expands them at load: "
        "smaller on disk, several times slower to load than dense, no faster and no less memory afterwards."
    )
