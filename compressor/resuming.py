"""Where a run goes on: the state of an earlier one beside the output, if it is of the very same run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from compressor.delivery import CompressionResult
from compressor.errors import OutputRefused, ReportedError, UsageError
from compressor.models.source import BlockSource
from compressor.opening import OpenModel
from compressor.pass_state import PassState
from compressor.planning import Job
from compressor.progress import Notice, Progress
from compressor.ranks import ALONE, Ranks
from compressor.report.schema import read_report
from compressor.reporting import installed_versions, manifest_facts
from compressor.run.output import OutputPlan
from compressor.run.state import Commit, StateFolder
from compressor.shared_state import SharedStateFolder
from exporters.manifest import check_files, read_manifest

__all__ = [
    "DECISIVE",
    "Resume",
    "check_resume",
    "decided_finish",
    "facts_of",
    "finished_run",
    "forget_state",
    "open_state",
    "run_digest",
]

Resume = Literal["auto", "required", "never"]

DECISIVE = "what decides the result (model, texts, settings, kind of device, versions)"  # name of the facts

# Of the versions that a report names, those that can change a byte of the result.
_DECISIVE = ("blockpress", "torch", "transformers", "tokenizers", "safetensors")
_SHOWN = 3  # differences that a refusal names


def check_resume(resume: str) -> Resume:
    """The choice, if it is one.

    Raises:
        UsageError: E-RESUME-CHOICE.
    """
    for choice in get_args(Resume):
        if resume == choice:
            return choice  # type: ignore[no-any-return]
    raise UsageError("E-RESUME-CHOICE", f"resume is auto, required or never; got {resume!r}", "give auto")


def decided_finish(plan: OutputPlan) -> str | None:
    """The finish that the run whose state lies there has taken; free memory may be another now."""
    for commit in StateFolder(plan.state).commits():
        found = None if commit is None else commit.facts.get("finish.method")
        if found in ("none", "kl"):
            return str(found)
    return None


def finished_run(plan: OutputPlan, facts: Mapping[str, Any], *, validated: bool) -> CompressionResult | None:
    """The output that lies there, if it is what a run with these facts ends with and not a byte has changed since.

    Args:
        plan: The output, which is held.
        facts: What decides the run's result.
        validated: Whether it must have been validated.
    """
    try:
        report = read_report(plan.report_json)
        manifest = read_manifest(plan.manifest)
    except ReportedError:
        return None
    verdict = report.validation.passed
    same = report.run_sha256 == run_digest(facts) and report.manifest == manifest_facts(manifest)
    if not same or (validated and verdict is None) or check_files(manifest, plan.folder):
        return None
    return CompressionResult(plan.onnx, report.tree(), plan.report_json, plan.report_html, verdict)


def run_digest(facts: Mapping[str, Any]) -> str:
    """sha256 (hex) of what decides a run's result."""
    return hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()


def open_state(
    plan: OutputPlan,
    facts: Mapping[str, Any],
    source: BlockSource,
    resume: Resume,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> PassState:
    """The state to keep, at the newest commit that is whole and of the same run.

    Args:
        plan: The output, which is held.
        facts: What decides the run's result.
        source: The dense blocks.
        resume: ``never`` forgets an earlier state, ``required`` refuses to begin anew.
        progress: Receives notices.
        ranks: Who calls this with the same facts; rank 0 holds the output.

    Raises:
        OutputRefused: E-RESUME-MISMATCH: the state is of a run with other settings, inputs or versions;
            E-RESUME-NONE: there is none to go on from, and one is required.
    """
    folder = StateFolder(plan.state) if ranks.world == 1 else SharedStateFolder(plan.state, ranks)
    if resume == "never":
        folder.remove()
    commit = _newest(folder, progress)
    if commit is None:
        if resume == "required":
            raise OutputRefused(
                "E-RESUME-NONE",
                f"{plan.target.name} has no state of an earlier run to go on from",
                "leave --resume out to begin anew",
            )
        return PassState(folder, facts, source)
    different = list(_differences(commit.facts, facts))
    if different:
        more = f" and {len(different) - _SHOWN} more" if different[_SHOWN:] else ""
        raise OutputRefused(
            "E-RESUME-MISMATCH",
            f"{plan.target.name} has the state of another run: {'; '.join(different[:_SHOWN])}{more}",
            "run with what that run had, begin anew with --resume never, or give another --out",
        )
    state = PassState(folder, facts, source, commit)
    reached = f"block {len(state.results)} of {source.num_blocks}"
    progress(Notice(f"an earlier run was stopped behind {reached}: going on from there"))
    return state


def forget_state(plan: OutputPlan) -> None:
    """Remove the state of a run whose output is there."""
    for root in plan.state_roots:
        StateFolder(root).remove()


def facts_of(job: Job, opened: OpenModel) -> dict[str, Any]:
    """What decides the bytes of a run's result, by name."""
    versions = installed_versions()
    # Gates judge the result and do not make it; of the texts the windows count, wherever they lie.
    texts = {"source"}
    recipe = job.recipe.model_dump(
        mode="json", exclude={"gates": True, "calibration": texts, "evaluation": texts}
    )
    return {
        "model": opened.checkpoint.identity,
        "calibration windows": job.calibration.windows.sha256,
        "evaluation windows": job.evaluation.digest,
        "device": opened.device.type,
        **{name: versions.get(name) for name in _DECISIVE},
        **dict(_leaves("", recipe)),
    }


def _newest(folder: StateFolder, progress: Progress) -> Commit | None:
    for commit in folder.commits():
        if commit is not None:
            return commit
        progress(Notice("the newest state of the earlier run is damaged: the one before it is used"))
    return None


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Every setting by its dotted name."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), inner)
    else:
        yield path, value


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Facts that are not the same, as ``name old -> new``."""
    for name in dict.fromkeys([*now, *before]):
        old, new = before.get(name), now.get(name)
        if old != new:
            yield f"{name} {_short(old)} -> {_short(new)}"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."
