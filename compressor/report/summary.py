"""What the report says in words: the verdict, the key figures, the sentences under the drawings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from compressor.report import units
from compressor.report.schema import Report
from compressor.report.tables import setting

CHECK_MEANINGS = {
    "manifest": "every model file has the size and sha256 that the manifest states",
    "structure": "the ONNX checker accepts the file",
    "finite": "no weight is NaN or infinite",
    "masks": "each exported weight is zero exactly where its mask is",
    "pattern": "each N:M group keeps at most N weights",
    "sparsity": "share of zeros in the pruned weights",
    "parity-prefill": "logits equal PyTorch's on real text",
    "parity-decode": "the same, token by token over the KV cache",
    "parity-padded": "the same, for a left-padded batch",
    "perplexity-drift": "perplexity in ONNX Runtime equals PyTorch's",
    "perplexity-increase": "perplexity against the dense model",
    "lm-eval-perplexity": "perplexity on the same tokens by lm-eval-harness's own ONNX Runtime backend",
}


@dataclass(frozen=True)
class Verdict:
    """The word at the top, the class that colours it, and the sentence under it."""

    word: str
    kind: str
    sentence: str


@dataclass(frozen=True)
class KeyFigure:
    """One number of the head: what it is, the number, and what it compares with."""

    label: str
    value: str
    detail: str


def title(report: Report) -> str:
    """The model's name and what was done to it, in a few words."""
    name = report.model.name.rstrip("/").rpartition("/")[2] or report.model.name
    sparsity = report.sparsity
    if sparsity.pattern and ":" in sparsity.pattern:
        return f"{name}, {sparsity.pattern} sparse"
    share = sparsity.measured if sparsity.measured is not None else sparsity.target
    if share and sparsity.structured:
        return f"{name}, without {units.percent(share, 0)} of its blocks"
    return f"{name}, {units.percent(share, 0)} sparse" if share else name


def verdict(report: Report) -> Verdict:
    """What the checks say together."""
    validation = report.validation
    names = {
        status: [check.name for check in validation.checks if check.status == status]
        for status in ("passed", "failed", "skipped")
    }
    where = f" on {validation.provider}" if validation.provider else ""
    skipped = f" Skipped: {', '.join(names['skipped'])}." if names["skipped"] else ""
    if validation.passed is None:
        return Verdict(
            "NOT VALIDATED",
            "open",
            "No check was made: nothing shows that the ONNX file computes what the PyTorch model computes.",
        )
    if validation.passed:
        return Verdict("PASSED", "good", f"{_checks(len(names['passed']))} passed{where}.{skipped}")
    made = len(names["passed"]) + len(names["failed"])
    if not names["failed"]:
        return Verdict("FAILED", "bad", f"The validation came to no end{where}.{skipped}")
    return Verdict("FAILED", "bad", f"{len(names['failed'])} of {_checks(made)} failed{where}.{skipped}")


def _checks(how_many: int) -> str:
    return f"{how_many} check{'' if how_many == 1 else 's'}"


def key_figures(report: Report) -> list[KeyFigure]:
    """The numbers of the head that this report has."""
    figures = (_sparsity(report), _perplexity(report), _repair(report), _size(report), _time(report))
    return [figure for figure in figures if figure is not None]


def _sparsity(report: Report) -> KeyFigure | None:
    facts = report.sparsity
    if facts.measured is None:
        return None
    kind = facts.pattern if facts.pattern and ":" in facts.pattern else "unstructured"
    kind = "heads and neurons" if facts.structured else kind
    if facts.target is None:
        return KeyFigure("Sparsity", units.percent(facts.measured), "zeros found in the model")
    return KeyFigure(
        "Sparsity", units.percent(facts.measured), f"target {units.percent(facts.target)}, {kind}"
    )


def _perplexity(report: Report) -> KeyFigure | None:
    facts = report.perplexity
    versions = (facts.onnx, facts.quantized, facts.recovered, facts.pruned)
    shipped = next((value for value in versions if value is not None), None)
    if shipped is None:
        return None
    label = "Perplexity" if facts.onnx is not None else "Perplexity in PyTorch"
    against = units.change(shipped, facts.dense)
    detail = f"dense {units.perplexity(facts.dense)}" + (f" ({against})" if against else "")
    return KeyFigure(label, units.perplexity(shipped), detail)


def _repair(report: Report) -> KeyFigure | None:
    dense, pruned, recovered = report.perplexity.dense, report.perplexity.pruned, report.perplexity.recovered
    methods = [report.recovery.upper()] if report.recovery not in (None, "none") else []
    methods += [f"{row.method.upper()} finish" for row in report.finetuning if row.stage == "finish"]
    if not methods or dense is None or pruned is None or recovered is None:
        return None
    if not dense < pruned < math.inf:  # pruning opened no gap that can be measured
        return None
    closed = units.percent((pruned - recovered) / (pruned - dense))
    return KeyFigure("Gap closed", closed, f"from pruned only to dense, by {' and '.join(methods)}")


def _size(report: Report) -> KeyFigure | None:
    size = report.size
    if size.onnx_bytes is None:
        return None
    if not size.dense_bytes:
        return KeyFigure("Size", units.byte_size(size.onnx_bytes), "on disk")
    share = units.percent(size.onnx_bytes / size.dense_bytes, 0)
    detail = f"{share} of dense, {units.byte_size(size.dense_bytes)}"
    return KeyFigure("Size", units.byte_size(size.onnx_bytes), detail)


def _time(report: Report) -> KeyFigure | None:
    if not report.timings:
        return None
    stages = [
        seconds for name, seconds in report.timings.items() if ": " not in name
    ]  # others are parts of one
    elapsed_s = sum(stages or report.timings.values())
    return KeyFigure("Time", units.duration(elapsed_s), report.device or "all stages together")


def protocol(report: Report) -> str | None:
    """How perplexity was measured, as one sentence."""
    facts = report.perplexity.protocol
    if facts is None:
        return None
    overlap = "without overlap" if facts.stride == facts.window else f"stride {facts.stride}"
    parts = [
        f"{units.number(facts.windows)} windows of {units.number(facts.window)} tokens, {overlap}, "
        f"{units.number(facts.tokens)} tokens predicted",
        f"text {facts.source}",
        f"BOS: {setting(facts.bos)}" if facts.bos is not None else "",
        f"join: {facts.join}" if facts.join else "",
        f"computed in {facts.dtype}" if facts.dtype else "",
        f"{units.number(facts.dropped_tokens)} tail tokens dropped" if facts.dropped_tokens else "",
    ]
    return "; ".join(part for part in parts if part) + "."


def loss_summary(report: Report) -> str | None:
    """How far the repair brought the blocks' losses down, in one sentence."""
    pairs = [(block.loss_before, block.loss_after) for block in report.blocks]
    shares = sorted(after / before for before, after in pairs if before and after is not None)
    if not shares or not all(map(math.isfinite, shares)):
        return None
    kept = sum(block.best_step == 0 for block in report.blocks)
    left = f"In the median block {units.percent(shares[len(shares) // 2])} of the loss is left."
    return (
        f"{left} {kept} of {len(pairs)} blocks stayed as pruned: no step made them better." if kept else left
    )


def learning_rate(report: Report) -> str | None:
    """Which learning rate was used and how it came about, in one sentence."""
    facts = report.learning_rate
    if facts is None:
        return None
    if not facts.tried:
        return f"Learning rate {units.number(facts.chosen)}, as given."
    tried = ", ".join(units.number(lr) for lr in facts.tried)
    return f"Learning rate {units.number(facts.chosen)}, chosen on held-out windows from {tried}."


def finetuning(report: Report) -> str | None:
    """How the end-to-end stages found their learning rates, and whether one came to grief, in a few sentences."""
    sentences = []
    for row in report.finetuning:
        if row.tried:
            tried = ", ".join(units.number(lr) for lr in row.tried)
            chosen = units.number(row.lr)
            sentences.append(
                f"The learning rate {chosen} of the {row.stage} was chosen on held-out windows from {tried}."
            )
        if row.diverged:
            sentences.append(
                f"The {row.stage} diverged and ended early; the best weights before that were kept."
            )
        if not row.best_step:
            sentences.append(
                f"No step of the {row.stage} made the model better, so it left the model as it was."
            )
    return " ".join(sentences) or None


def model(report: Report) -> list[tuple[str, str]]:
    """The model's facts that are known."""
    facts, size = report.model, report.size
    parameters = None if facts.parameters is None else f"{units.count(facts.parameters)} (tied weights once)"
    rows = [
        ("name", facts.name),
        ("revision", facts.revision),
        ("architecture", facts.architecture),
        ("parameters", parameters),
        ("checkpoint", _stored(facts.checkpoint_dtype, size.source_bytes)),
        ("exported", _stored(facts.export_dtype, size.onnx_bytes)),
    ]
    return [(key, value) for key, value in rows if value]


def _stored(dtype: str | None, size_bytes: int | None) -> str:
    size = None if size_bytes is None else units.byte_size(size_bytes)
    return ", ".join(part for part in (dtype, size) if part)


def sparsity_summary(report: Report) -> str | None:
    """How far the weights' sparsities lie apart, in one sentence."""
    weights = report.weights
    if not weights:
        return None
    lowest = min(weights, key=lambda row: row.sparsity)
    highest = max(weights, key=lambda row: row.sparsity)
    low, high = units.percent(lowest.sparsity), units.percent(highest.sparsity)
    if low == high:
        what = "gone" if report.sparsity.structured else "zeros"
        return f"All {units.number(len(weights))} pruned weights: {low} {what}."
    return (
        f"{units.number(len(weights))} pruned weights, from {low} (block {lowest.block}, {lowest.name}) "
        f"to {high} (block {highest.block}, {highest.name})."
    )


def block_targets(report: Report) -> str | None:
    """The sparsity that each block was to have, in one sentence, where it is not the same for all."""
    targets = [block.target_sparsity for block in report.blocks]
    if not any(target is not None for target in targets):
        return None
    shares = [units.percent(report.sparsity.target if target is None else target, 1) for target in targets]
    return f"Targets of the blocks, first to last: {', '.join(shares)}."


def load(report: Report) -> str | None:
    """What loading the file in ONNX Runtime cost, in one line."""
    facts = report.load
    parts = []
    if facts.seconds is not None and facts.resident_bytes is not None:
        taken, resident = units.duration(facts.seconds), units.byte_size(facts.resident_bytes)
        parts.append(f"Loaded by ONNX Runtime in {taken}, {resident} resident.")
    if facts.note:
        parts.append(facts.note)
    return " ".join(parts) or None
