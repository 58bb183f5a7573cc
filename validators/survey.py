"""What the weights of a file are like, tensor by tensor: finite, zero where masked, in N:M groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from exporters.fragments import dtype_name
from exporters.manifest import Manifest, TensorRow
from exporters.masks import BoolArray, MaskFile, nonzero_mask, pack_mask
from exporters.stored import StoredTensor
from validators.checks import Check, at_least, at_most, skipped
from validators.integrity import manifest_mismatch

_FLOATS = frozenset({TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE})
_NAMED = 3  # tensors that a message names before it counts the rest


class Survey:
    """Figures over the weights of one file.

    Pruned weights are those that the manifest marks, without a manifest those that have a mask; without
    either, sparsity is measured over all matrices and N:M cannot be judged.
    """

    def __init__(self, manifest: Manifest | None, masks: MaskFile | None, pattern: str | None) -> None:
        """Begin a survey.

        Args:
            manifest: Its rows tell which tensors are weights, which were pruned, and how they lie.
            masks: Masks by parameter name, in the parameter's shape.
            pattern: "N:M" to hold; None takes the manifest's.
        """
        self._rows: dict[str, TensorRow] = {row.name: row for row in manifest.tensors} if manifest else {}
        self._masks = masks
        stated = pattern or (manifest.pattern if manifest else None)
        self._pattern = tuple(int(part) for part in stated.split(":")) if stated else None
        self._bytes_by_dtype: Counter[str] = Counter()
        self._not_finite: list[str] = []
        self._mask_errors: dict[str, int] = {}
        self._masks_compared = 0
        self._group_errors: dict[str, int] = {}
        self._groups = 0
        self._no_axis: list[str] = []
        self._zeros = self._pruned_elements = 0

    def add(self, tensor: StoredTensor) -> None:
        """Read one tensor and count what it holds.

        Raises:
            ValidationError: E-MANIFEST-MISMATCH: it has another number of non-zero elements than its row says.
            ExportError: Its values cannot be read.
        """
        if tensor.dtype not in _FLOATS and tensor.name not in self._rows and tensor.encoding != "packed":
            return
        values = tensor.load()
        row = self._rows.get(tensor.name)
        if values.dtype.kind not in "iub":  # packed integers come times their scales
            self._bytes_by_dtype[dtype_name(tensor.dtype)] += values.nbytes
            if not _all_finite(values, is_weight=row is not None):
                self._not_finite.append(tensor.name)
        if row is None and len(tensor.shape) < 2:
            return
        nonzero = nonzero_mask(values)
        if row is not None and row.nnz != int(np.count_nonzero(nonzero)):
            counts = f"{int(np.count_nonzero(nonzero))} values are not zero, the manifest says {row.nnz}"
            raise manifest_mismatch(f"{tensor.name}: {counts}")
        self._compare_mask(tensor.name, nonzero, row)
        if self._counts_as_pruned(tensor.name, row):
            self._zeros += nonzero.size - int(np.count_nonzero(nonzero))
            self._pruned_elements += nonzero.size
            self._count_groups(tensor, nonzero, row)

    def stored_dtype(self) -> str | None:
        """The type that most bytes of floating constants have."""
        return self._bytes_by_dtype.most_common(1)[0][0] if self._bytes_by_dtype else None

    def finite_check(self) -> Check:
        """No weight is NaN or infinite."""
        return _count_check("finite", len(self._not_finite), "tensors", "not finite", self._not_finite)

    def masks_check(self, names: Collection[str]) -> Check:
        """Zeros are exactly where the masks have them. ``names``: all tensors of the file."""
        if self._masks is None and not any(row.pruned for row in self._rows.values()):
            return skipped("masks", "no masks were given, and no manifest says where zeros should be")
        wanted = {name for name, row in self._rows.items() if row.pruned}
        if self._masks is not None:
            if not self._rows and not any(name in names for name in self._masks):
                return skipped(
                    "masks", f"none of {len(self._masks)} masks has a tensor of its name in the model"
                )
            absent = [name for name in self._masks if name not in names]
            absent += sorted(name for name in wanted if name not in self._masks)
            if absent:
                return Check("masks", "failed", why=f"mask and tensor do not go together: {_listed(absent)}")
        count = sum(self._mask_errors.values())
        source = "the manifest's digests" if self._masks is None else "the masks file"
        what = f"unlike its mask ({source})"
        check = _count_check("masks", count, "weights", what, list(self._mask_errors))
        if check.status == "failed":
            return check
        return Check(
            "masks", "passed", 0, 0, "weights", f"{self._masks_compared} tensors equal {source} everywhere"
        )

    def pattern_check(self) -> Check:
        """At most N of each M consecutive inputs are not zero, in every pruned weight."""
        if self._pattern is None:
            return skipped("pattern", "no N:M pattern was asked for")
        if not self._knows_pruned():
            return skipped("pattern", "neither a manifest nor masks say which weights were pruned")
        if self._no_axis:
            why = f"the axis of the inputs is not known: {_listed(self._no_axis)}"
            return Check("pattern", "failed", why=why)
        n, m = self._pattern
        what = f"more than {n} of {m} inputs kept"
        check = _count_check(
            "pattern", sum(self._group_errors.values()), "groups", what, list(self._group_errors)
        )
        if check.status == "failed":
            return check
        return Check("pattern", "passed", 0, 0, "groups", f"{self._groups} groups hold {n}:{m}")

    def sparsity_check(self, min_sparsity: float | None) -> Check:
        """The share of zeros in the pruned weights is at least ``min_sparsity``."""
        which = "pruned weights" if self._knows_pruned() else "all matrices (nothing says which were pruned)"
        if not self._pruned_elements:
            return skipped("sparsity", "there are no pruned weights")
        sparsity = self._zeros / self._pruned_elements
        why = f"{self._zeros} zeros in {self._pruned_elements} elements of {which}"
        if min_sparsity is None:
            return skipped(
                "sparsity", f"no limit was set with --min-sparsity; {why}", measured=sparsity, unit="share"
            )
        return at_least("sparsity", sparsity, min_sparsity, "share", why)

    def _knows_pruned(self) -> bool:
        return bool(self._rows) or self._masks is not None

    def _counts_as_pruned(self, name: str, row: TensorRow | None) -> bool:
        if row is not None:
            return row.pruned
        if self._rows:
            return False
        return self._masks is None or name in self._masks

    def _compare_mask(self, name: str, nonzero: BoolArray, row: TensorRow | None) -> None:
        """Count the weights of one tensor that are zero where its mask keeps them, or the other way round."""
        if self._masks is not None and name in self._masks:
            self._masks_compared += 1
            self._note(self._mask_errors, name, _mask_differences(self._masks[name], nonzero, row))
        elif self._masks is None and row is not None and row.pruned:
            self._masks_compared += 1
            full = bool(nonzero.all())
            same = full if row.mask_sha256 is None else pack_mask(nonzero).sha256() == row.mask_sha256
            self._note(self._mask_errors, name, 0 if same else nonzero.size)

    def _count_groups(self, tensor: StoredTensor, nonzero: BoolArray, row: TensorRow | None) -> None:
        """Count the groups of one pruned tensor that keep more than N."""
        if self._pattern is None or not self._knows_pruned():
            return
        axis = row.input_axis if row is not None and row.input_axis is not None else tensor.input_axis
        if axis is None:
            self._no_axis.append(tensor.name)
            return
        n, m = self._pattern
        inputs_last = np.moveaxis(nonzero, axis, -1)
        if inputs_last.shape[-1] % m:
            self._note(self._group_errors, f"{tensor.name} ({inputs_last.shape[-1]} inputs)", 1)
            return
        kept = inputs_last.reshape(*inputs_last.shape[:-1], -1, m).sum(axis=-1, dtype=np.int64)
        self._groups += kept.size
        self._note(self._group_errors, tensor.name, int((kept > n).sum()))

    @staticmethod
    def _note(counts: dict[str, int], name: str, count: int) -> None:
        if count:
            counts[name] = count


def _mask_differences(mask: BoolArray, nonzero: BoolArray, row: TensorRow | None) -> int:
    """Elements where the mask and the non-zero pattern differ; all of them if the shapes do not fit.

    Without a manifest row nothing says whether the file stores the parameter transposed. Then either way
    counts: a square matrix whose zeros equal the transposed mask everywhere is stored transposed.
    """
    as_stored = [mask] if row is None or not row.transposed else []
    if mask.ndim >= 2 and (row is None or row.transposed):
        as_stored.append(np.swapaxes(mask, -1, -2))
    fitting = [candidate for candidate in as_stored if candidate.shape == nonzero.shape]
    return min((int((candidate != nonzero).sum()) for candidate in fitting), default=nonzero.size)


def _all_finite(values: NDArray[Any], *, is_weight: bool) -> bool:
    """Whether no value is NaN, and none is infinite where that cannot be meant.

    Graphs of other tools carry -inf in their attention masks: a constant that is no weight of the manifest
    may hold nothing but 0 and -inf, or be one infinite number.
    """
    if bool(np.isfinite(values).all()):
        return True
    if is_weight or bool(np.isnan(values).any()):
        return False
    if values.size == 1:
        return True
    return bool(((values == 0) | (values == -np.inf)).all())


def _count_check(name: str, count: int, unit: str, what: str, names: list[str]) -> Check:
    """A check that nothing was found wrong; ``names`` are the tensors where something was."""
    return at_most(name, count, 0, unit, f"{what}: {_listed(names)}" if names else "")


def _listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
