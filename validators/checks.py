"""What a validation says: checks with measured value and limit, the gates that set limits, the verdict."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped"]

CHECK_NAMES = (
    "manifest",
    "structure",
    "finite",
    "masks",
    "pattern",
    "sparsity",
    "parity-prefill",
    "parity-decode",
    "parity-padded",
    "perplexity-drift",
    "perplexity-increase",
    "packed-fallback",
    "lm-eval-perplexity",
)
# Made where asked for, or where there are packed weights; not so much as skipped elsewhere.
OPTIONAL_CHECKS = frozenset({"lm-eval-perplexity", "packed-fallback"})
PERPLEXITY_KEYS = ("dense", "pruned", "recovered", "quantized", "onnx")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: One of ``CHECK_NAMES``.
        status: ``skipped`` means that the check could not be made; it is never a pass.
        measured: The figure that was compared with ``limit``; None where there is none or it is not finite.
        limit: The figure that it must not be beyond.
        unit: Unit of both.
        why: One line: the reason of a skip or failure, or what a passed check rests on.
        details: Further figures by name, for the report.
    """

    name: str
    status: Status
    measured: float | None = None
    limit: float | None = None
    unit: str = ""
    why: str = ""
    details: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The check as a JSON object; figures that are not finite become null (``why`` names them)."""
        return {
            "name": self.name,
            "status": self.status,
            "measured": _finite_or_none(self.measured),
            "limit": _finite_or_none(self.limit),
            "unit": self.unit,
            "why": self.why,
            "details": {name: _finite_or_none(value) for name, value in self.details.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Check:
        """The check that ``to_json`` wrote; a null among the details comes back as NaN."""
        details = {name: math.nan if value is None else value for name, value in content["details"].items()}
        return cls(**{**content, "details": details})


def skipped(name: str, why: str, *, measured: float | None = None, unit: str = "") -> Check:
    """A check that could not be made, with the reason."""
    return Check(name, "skipped", measured=measured, unit=unit, why=why)


def at_most(name: str, measured: float, limit: float, unit: str, why: str = "") -> Check:
    """A check that passes while ``measured <= limit``; NaN fails, because the comparison is not true."""
    if math.isnan(measured):
        why = f"the measured value is not a number{f'; {why}' if why else ''}"
    return Check(name, "passed" if measured <= limit else "failed", measured, limit, unit, why)


def at_least(name: str, measured: float, limit: float, unit: str, why: str = "") -> Check:
    """A check that passes while ``measured >= limit``; NaN fails, because the comparison is not true."""
    if math.isnan(measured):
        why = f"the measured value is not a number{f'; {why}' if why else ''}"
    return Check(name, "passed" if measured >= limit else "failed", measured, limit, unit, why)


@dataclass(frozen=True)
class Gates:
    """Limits that the user set; None leaves the default of ``TOLERANCES``, or no gate without one.

    Attributes:
        max_abs_error: Largest difference of a logit from the reference, absolute.
        min_top1_agreement: Share of decided tokens (see ``Tolerance``) whose most likely next token is the same.
        max_onnx_ppl_drift: Relative difference of the ONNX perplexity from PyTorch's, 0.001 = 0.1 %.
        max_ppl_increase: Relative increase of the ONNX perplexity over the dense model's, 0.15 = 15 %.
        min_sparsity: Share of zeros in the pruned weights.
    """

    max_abs_error: float | None = None
    min_top1_agreement: float | None = None
    max_onnx_ppl_drift: float | None = None
    max_ppl_increase: float | None = None
    min_sparsity: float | None = None


@dataclass(frozen=True)
class Tolerance:
    """What counts as the same, for one type that the graph computes in.

    Attributes:
        relative_error: Limit of the largest logit difference, as a share of the largest reference logit (at
            least 1), so that it is an absolute error of the size that rounding makes at that magnitude.
        top1_agreement: Least share of decided tokens with the same most likely next token. A token is decided
            when the reference's best logit leads the second by more than the absolute error limit: closer
            ones are ties that rounding may turn either way, and say nothing.
        mean_kl: Largest mean Kullback-Leibler divergence KL(reference || ONNX) per token, in nats.
        ppl_drift: Largest relative difference of the perplexities.
    """

    relative_error: float
    top1_agreement: float
    mean_kl: float
    ppl_drift: float


ROUNDED = "rounded activations"  # names the tolerance of a graph that rounds what enters its products

# The reference computes in float32 on the stored weights, so that only the graph's own arithmetic differs.
TOLERANCES: Mapping[str, Tolerance] = {
    # 24 significant bits. Tiny random models of 18 architectures differ by up to 1.4e-6 of their largest
    # logit, because sums run in another order; 1e-4 leaves a factor of seventy for depth and width, and is
    # far below what a wrong mask, position or weight does (1e-2 and more).
    "float32": Tolerance(relative_error=1e-4, top1_agreement=1.0, mean_kl=1e-5, ppl_drift=1e-3),
    # 11 significant bits: one rounding is 5e-4, and every operator's output is rounded. The same models of
    # two blocks differ by up to 1.9e-3 of their largest logit; roundings add up like the root of the depth.
    "float16": Tolerance(relative_error=1e-2, top1_agreement=0.99, mean_kl=1e-3, ppl_drift=3e-3),
    # 8 significant bits: the same with roundings eight times as coarse.
    "bfloat16": Tolerance(relative_error=8e-2, top1_agreement=0.95, mean_kl=2e-2, ppl_drift=1e-2),
    # float32 arithmetic between activations that are rounded to int8, in the reference too. Where sums that differ in
    # their last bit lie on either side of a half, a step of 1/127 of a row's largest value separates the two sides;
    # that is one rounding of float16's coarseness in a few of a row's inputs.
    ROUNDED: Tolerance(relative_error=5e-2, top1_agreement=0.98, mean_kl=5e-3, ppl_drift=3e-3),
}


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task, or of a group of tasks.

    Attributes:
        task: lm-eval's name of it.
        metric: Such as ``acc``; with the filter's name after a comma where the task filters answers.
        value: The figure.
        stderr: Its standard error; None where lm-eval gives none.
        documents: Documents that it was measured on.
        higher_is_better: None where lm-eval does not say.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    documents: int
    higher_is_better: bool | None

    def to_json(self) -> dict[str, Any]:
        """The result as a JSON object; figures that are not finite become null."""
        figures = {name: _finite_or_none(getattr(self, name)) for name in ("value", "stderr")}
        return {**dataclasses.asdict(self), **figures}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> TaskResult:
        """The result that ``to_json`` wrote; a value of null comes back as NaN."""
        value = math.nan if content["value"] is None else content["value"]
        return cls(**{**content, "value": value})


@dataclass(frozen=True)
class ValidationReport:
    """What a validation found; its verdict is derived from the checks, never stored.

    Attributes:
        checks: One per name of ``CHECK_NAMES``, in that order; of ``OPTIONAL_CHECKS`` those asked for.
        perplexity: By ``PERPLEXITY_KEYS``; None where it was not measured.
        provider: The execution provider that really ran; None where no session was opened.
        compute_dtype: The type that the graph computes in; it chose the tolerances.
        first_divergence: Where the graph first leaves the reference, in one line; None while parity holds.
        timings: Seconds (``*_s``) and bytes (``*_bytes``) by name: ``load_s`` and ``load_rss_bytes`` are what
            opening the file in ONNX Runtime took and how much resident memory it added.
        notices: What the user should know that is no check.
        tasks: Results of lm-eval tasks by ``PERPLEXITY_KEYS`` of the model that they were run on.
    """

    checks: tuple[Check, ...]
    perplexity: Mapping[str, float | None] = field(default_factory=lambda: dict.fromkeys(PERPLEXITY_KEYS))
    provider: str | None = None
    compute_dtype: str | None = None
    first_divergence: str | None = None
    timings: Mapping[str, float] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    tasks: Mapping[str, tuple[TaskResult, ...]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether at least one check passed and none failed."""
        statuses = {check.status for check in self.checks}
        return "passed" in statuses and "failed" not in statuses

    @property
    def failed_checks(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.status == "failed")

    def check(self, name: str) -> Check:
        """The check with this name.

        Raises:
            KeyError: There is none.
        """
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object, the verdict included; figures that are not finite become null."""
        return {
            "passed": self.passed,
            "provider": self.provider,
            "compute_dtype": self.compute_dtype,
            "checks": [check.to_json() for check in self.checks],
            "perplexity": {key: _finite_or_none(self.perplexity.get(key)) for key in PERPLEXITY_KEYS},
            "first_divergence": self.first_divergence,
            "timings": {name: _finite_or_none(value) for name, value in self.timings.items()},
            "notices": list(self.notices),
            "tasks": {key: [result.to_json() for result in results] for key, results in self.tasks.items()},
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> ValidationReport:
        """The report that ``to_json`` wrote."""
        return cls(
            checks=tuple(Check.from_json(check) for check in content["checks"]),
            perplexity=dict(content["perplexity"]),
            provider=content["provider"],
            compute_dtype=content["compute_dtype"],
            first_divergence=content["first_divergence"],
            timings=dict(content["timings"]),
            notices=tuple(content["notices"]),
            tasks={
                key: tuple(TaskResult.from_json(result) for result in results)
                for key, results in content["tasks"].items()
            },
        )


def complete(checks: Iterable[Check], require: Iterable[str]) -> tuple[Check, ...]:
    """The checks in the order of ``CHECK_NAMES``; a skipped one among ``require`` becomes failed."""
    required = set(require)
    ordered = sorted(checks, key=lambda check: CHECK_NAMES.index(check.name))
    return tuple(
        dataclasses.replace(check, status="failed", why=f"required, but it could not be made: {check.why}")
        if check.status == "skipped" and check.name in required
        else check
        for check in ordered
    )


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
