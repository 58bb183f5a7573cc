"""The check on lm-eval's perplexity: what it compares, and every way in which it cannot be made."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from toy_language_model import ToyExport, load_reference, write_export

from validators import harness
from validators.examine import examine

NAME = harness.CHECK_NAME


@pytest.fixture
def export(tmp_path: Path) -> ToyExport:
    """A good export, the check asked for."""
    made = write_export(tmp_path / "toy")
    return dataclasses.replace(made, request=dataclasses.replace(made.request, lm_eval=True))


def install_backend(patch: pytest.MonkeyPatch, export: ToyExport, factor: float) -> list[dict[str, Any]]:
    """Put a backend in lm-eval's place that scores with numpy, ``factor`` times as unlikely; its arguments."""
    model = load_reference(**export.request.reference_arguments)
    opened: list[dict[str, Any]] = []

    class ONNXRuntimeLM:
        def __init__(self, **arguments: Any) -> None:
            opened.append(arguments)
            self._load_tokenizer()

        def _load_tokenizer(self) -> None:
            raise FileNotFoundError("there is no tokenizer beside the file")

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool) -> list[tuple[float, bool]]:
            ((_, context, continuation),) = requests
            logits = model.logits(np.array([context + continuation]))[0].astype(np.float64)
            chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            rows = np.arange(len(context) - 1, len(context) + len(continuation) - 1)
            return [(float(np.log(chances[rows, continuation]).sum()) * factor, False)]

    stand_in = ModuleType("lm_eval.models.onnxruntime_ort")
    stand_in.ONNXRuntimeLM = ONNXRuntimeLM  # type: ignore[attr-defined]
    patch.setitem(sys.modules, stand_in.__name__, stand_in)
    patch.setattr(harness, "is_installed", lambda: True)
    patch.setattr(harness, "harness_version", lambda: "0.0")
    return opened


def test_harness_check_compares_the_same_tokens(export: ToyExport, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores of a model that is right, token by token, give our perplexity; provider and window are handed on."""
    opened = install_backend(monkeypatch, export, factor=1.0)
    report = examine(export.request)
    check = report.check(NAME)
    assert (check.status, check.limit) == ("passed", 1e-3)
    assert check.measured is not None
    assert check.measured < 1e-6  # both are float32 models of two blocks
    windows = np.load(str(export.request.windows_path))
    assert opened == [
        {
            "pretrained": str(export.model_path),
            "execution_provider": "CPUExecutionProvider",
            "provider_options": {},
            "max_length": windows.shape[1],
        }
    ]


def test_harness_check_fails_where_the_figures_differ(
    export: ToyExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A likelihood that is 1 % off is far more than 0.1 % of perplexity, and the verdict follows."""
    install_backend(monkeypatch, export, factor=1.01)
    report = examine(export.request)
    assert report.check(NAME).status == "failed"
    assert "by lm-eval 0.0" in report.check(NAME).why
    assert not report.passed


def test_harness_check_is_skipped_without_lm_eval(export: ToyExport, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason says how to install it, and the other checks decide."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    report = examine(export.request)
    check = report.check(NAME)
    assert (check.status, report.passed) == ("skipped", True)
    assert "pip install 'blockpress[eval]'" in check.why


def test_harness_check_required_fails_without_lm_eval(
    export: ToyExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requiring the check asks for it, and what cannot be made then fails."""
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    request = dataclasses.replace(export.request, lm_eval=False, require=(NAME,))
    report = examine(request)
    assert report.check(NAME).status == "failed"
    assert report.check(NAME).why.startswith("required, but it could not be made: lm-eval-harness is not")
    assert not report.passed


def test_harness_check_is_skipped_where_the_backend_fails(
    export: ToyExport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An lm-eval without the backend, or one that refuses the file, is named; it is no fault of the file."""
    install_backend(monkeypatch, export, factor=1.0)
    monkeypatch.setattr(harness, "_BACKEND", "validators.there_is_no_such_module")
    check = examine(export.request).check(NAME)
    assert check.status == "skipped"
    assert check.why.startswith("lm-eval 0.0 cannot measure this file: No module named")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"windows_path": None}, "no evaluation windows were given"),
        ({"structure_only": True}, "only the structure was asked for"),
    ],
)
def test_harness_check_needs_a_text_and_a_model_that_runs(
    export: ToyExport, changes: dict[str, Any], why: str
) -> None:
    """Nothing to measure on is a skip of its own."""
    check = examine(dataclasses.replace(export.request, **changes)).check(NAME)
    assert (check.status, check.why) == ("skipped", why)


def test_harness_check_is_absent_unless_asked_for(export: ToyExport) -> None:
    """A report without it has no line for it."""
    report = examine(dataclasses.replace(export.request, lm_eval=False))
    assert NAME not in [check.name for check in report.checks]
