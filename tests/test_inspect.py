"""What inspection says about the weights of a model file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx_samples import product_model, pruned_matrix, weight_of, write_product

from exporters.inspect import Inspection, WeightRow, find_pattern, inspect_model


def grouped(outputs: int, inputs: int, n: int, m: int) -> NDArray[np.float32]:
    """An (out, in) matrix of which the largest n of each m inputs are kept."""
    scores = np.random.default_rng(0).random((outputs, inputs // m, m)).astype(np.float32)
    limit = np.sort(scores, axis=-1)[..., -n][..., None]
    return np.where(scores >= limit, scores, 0).reshape(outputs, inputs)


def row_of(inspection: Inspection, name: str) -> WeightRow:
    """The row of one weight."""
    return next(row for row in inspection.weights if row.name == name)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (3, 8), (5, 16), (20, 32)])
@pytest.mark.parametrize("axis", [-1, -2])
def test_pattern_is_found_along_the_right_axis(n: int, m: int, axis: int) -> None:
    """N:M along the inputs is found whichever way the matrix lies, and not along its outputs."""
    mask = grouped(64, 64, n, m) != 0
    mask = mask if axis == -1 else mask.T
    assert find_pattern(mask, (-1, -2)) == (f"{n}:{m}", axis)
    assert find_pattern(mask, (-3 - axis,)) == ("", None)


@pytest.mark.parametrize(("n", "m", "named"), [(1, 2, "2:4"), (4, 8, "4:8"), (2, 8, "2:8")])
def test_pattern_is_named_by_its_shortest_group(n: int, m: int, named: str) -> None:
    """The shortest of the groups 4, 8, 16, 32 that tells the zeros is the name; 1 of 2 is also 2 of 4."""
    assert find_pattern(grouped(64, 64, n, m) != 0, (-1,))[0] == named


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.95, 1.0])
def test_random_zeros_are_no_pattern(sparsity: float) -> None:
    """Unstructured zeros keep to no pattern, also where so few values are left that groups hold few."""
    assert find_pattern(pruned_matrix((128, 128), sparsity) != 0, (-1, -2)) == ("", None)


def test_pattern_survives_kept_weights_that_are_zero() -> None:
    """A few kept weights that happen to be zero leave the pattern what it is."""
    mask = grouped(64, 64, 2, 4) != 0
    mask.reshape(-1)[np.flatnonzero(mask)[:20]] = False
    assert find_pattern(mask, (-1,)) == ("2:4", -1)


def test_pattern_needs_groups_that_divide() -> None:
    """A matrix whose sides no group divides has no pattern."""
    assert find_pattern(np.eye(30, dtype=bool), (-1, -2)) == ("", None)


def test_rows_tell_zeros_patterns_and_bytes(tmp_path: Path) -> None:
    """Each weight has its counts and the bytes in every encoding; the one in use is what the export said."""
    two_of_four = grouped(64, 64, 2, 4).T.astype(np.float16)  # too few zeros to be stored sparse
    weights = [weight_of("sparse", pruned_matrix((64, 64), 0.75)), weight_of("n_m", two_of_four)]
    path, rows = write_product(tmp_path, weights)
    inspection = inspect_model(path)
    sparse, n_m = row_of(inspection, "sparse"), row_of(inspection, "n_m")
    assert (sparse.encoding, sparse.nnz, sparse.sparsity, sparse.pattern) == ("sparse", 1024, 0.75, "")
    assert (n_m.encoding, n_m.pattern, n_m.pattern_axis, n_m.input_axis) == ("dense", "2:4", -2, -2)
    assert [row.stored_bytes for row in inspection.weights] == [n_m.stored_bytes, sparse.stored_bytes]
    stored = {row.name: row.stored_bytes for row in rows}
    assert stored == {"sparse": sparse.stored_bytes, "n_m": n_m.stored_bytes}
    assert set(sparse.bytes_by_encoding) == {"dense", "sparse", "bitmask"}


def test_totals_add_up(tmp_path: Path) -> None:
    """Totals are the sums of the rows, and the files' sizes are theirs."""
    weights = [weight_of("a", pruned_matrix((64, 64), 0.75)), weight_of("b", pruned_matrix((64, 32), 0.0))]
    path, _ = write_product(tmp_path, weights)
    inspection = inspect_model(path)
    assert (inspection.elements, inspection.nnz) == (64 * 96, 1024 + 64 * 32)
    assert inspection.sparsity == 0.5
    assert inspection.tensors_by_encoding == {"dense": 1, "sparse": 1}
    assert inspection.stored_bytes == sum(row.stored_bytes for row in inspection.weights)
    assert inspection.bytes_by_encoding["dense"] > inspection.stored_bytes
    assert inspection.file_bytes == {file.name: file.stat().st_size for file in tmp_path.iterdir()}


def test_inspection_is_json(tmp_path: Path) -> None:
    """All of it goes through JSON, totals included."""
    path, _ = write_product(tmp_path, [weight_of("a", pruned_matrix((64, 64), 0.75))])
    content: dict[str, Any] = json.loads(json.dumps(inspect_model(path).to_json()))
    assert content["totals"]["sparsity"] == 0.75
    assert content["weights"][0]["name"] == "a"


def test_file_of_another_tool_is_inspected(tmp_path: Path) -> None:
    """Weights stored inline, constants inside nodes and vectors are counted, each in its place."""
    proto = product_model([weight_of("w", pruned_matrix((8, 8), 0.5))])
    proto.graph.initializer.append(numpy_helper.from_array(pruned_matrix((8, 8), 0.5), "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(8, np.float32), "bias"))
    constant = numpy_helper.from_array(pruned_matrix((4, 4), 0.25))
    proto.graph.node.append(helper.make_node("Constant", [], ["c"], value=constant))
    names = helper.make_tensor("labels", TensorProto.STRING, [1], [b"text"])
    proto.graph.initializer.append(names)
    onnx.save(proto, tmp_path / "m.onnx")
    inspection = inspect_model(tmp_path / "m.onnx")
    assert [(row.name, row.nnz) for row in inspection.weights] == [("w", 32), ("c", 12)]
    assert inspection.other_tensors == 1


def test_progress_ends_with_all_constants(tmp_path: Path) -> None:
    """The callback counts constants up to their number."""
    path, _ = write_product(tmp_path, [weight_of(f"w{i}", pruned_matrix((8, 8), 0.5, i)) for i in range(3)])
    seen: list[tuple[int, int]] = []
    inspect_model(path, lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)]
