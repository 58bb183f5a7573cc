"""A whole examination in this process: what is measured, skipped, required and reported."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from toy_language_model import VOCAB, ToyExport, write_export

from exporters.errors import ReportedError
from validators.checks import CHECK_NAMES, OPTIONAL_CHECKS, Gates
from validators.events import ValidationProgress
from validators.examine import examine


@pytest.fixture
def export(tmp_path: Path) -> ToyExport:
    """A good export."""
    return write_export(tmp_path / "toy")


def test_examination_reports_every_check_in_order(export: ToyExport) -> None:
    """All names but optional ones are there, in order, with provider, type, costs and all perplexities."""
    seen: list[ValidationProgress] = []
    report = examine(export.request, seen.append)
    always = tuple(name for name in CHECK_NAMES if name not in OPTIONAL_CHECKS)
    assert tuple(check.name for check in report.checks) == always
    assert report.passed
    assert (report.provider, report.compute_dtype) == ("CPUExecutionProvider", "float32")
    assert set(report.perplexity) == {"dense", "pruned", "recovered", "quantized", "onnx"}
    assert {"load_s", "load_rss_bytes", "structure_s", "perplexity_s"} <= set(report.timings)
    stages = list(dict.fromkeys(progress.stage for progress in seen if progress.stage != "structure"))
    assert stages == ["manifest", "load", "parity", "perplexity", "reference"]


def test_known_perplexities_are_taken_over(export: ToyExport) -> None:
    """What was measured before is not measured again, and is what drift and increase are judged by."""
    honest = examine(export.request).perplexity["onnx"]
    assert honest is not None
    known = {"dense": honest / 1.5, "pruned": 99.0, "recovered": honest * 1.01, "quantized": None}
    request = dataclasses.replace(export.request, known_perplexity=known, gates=Gates(max_ppl_increase=0.6))
    report = examine(request)
    assert report.perplexity == {**known, "onnx": honest}
    assert report.check("perplexity-drift").status == "failed"  # 1 % where 0.1 % is allowed
    assert report.check("perplexity-increase").status == "passed"


def test_dense_model_is_measured_when_given(export: ToyExport) -> None:
    """The dense model's perplexity comes from its factory where it is not known."""
    request = dataclasses.replace(
        export.request,
        dense_factory=export.request.reference_factory,
        dense_arguments=export.request.reference_arguments,
        gates=Gates(max_ppl_increase=0.001),
    )
    report = examine(request)
    assert report.perplexity["dense"] == pytest.approx(report.perplexity["recovered"], rel=1e-12)
    assert report.check("perplexity-increase").status == "passed"


def test_gate_that_cannot_be_measured_fails(export: ToyExport) -> None:
    """A limit on the increase over a dense model that nobody gave does not pass."""
    report = examine(dataclasses.replace(export.request, gates=Gates(max_ppl_increase=0.1)))
    check = report.check("perplexity-increase")
    assert check.status == "failed"
    assert "--dense" in check.why


def test_structure_only_loads_but_does_not_run(export: ToyExport) -> None:
    """The file is still loaded by ONNX Runtime; what would run it is skipped with the reason."""
    request = dataclasses.replace(export.request, structure_only=True, reference_factory="no.such:thing")
    report = examine(request)
    assert report.passed
    assert report.provider == "CPUExecutionProvider"
    running = [check for check in report.checks if check.name.startswith(("parity", "perplexity"))]
    assert {check.status for check in running} == {"skipped"}
    assert all("structure" in check.why for check in running)


def test_structure_only_refuses_what_onnx_runtime_refuses(export: ToyExport) -> None:
    """onnx.checker does not look into nodes of other domains; ONNX Runtime does."""
    proto = onnx.load(export.model_path, load_external_data=False)
    proto.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    proto.graph.node[0].domain, proto.graph.node[0].op_type = "nowhere", "Nothing"
    export.model_path.write_bytes(proto.SerializeToString())
    request = dataclasses.replace(export.request, manifest_path=None, masks_path=None, structure_only=True)
    with pytest.raises(ReportedError) as caught:
        examine(request)
    assert caught.value.error_id == "E-ORT-LOAD"


def test_required_check_that_is_skipped_fails(export: ToyExport) -> None:
    """Without a reference parity is skipped, and fails where it is required."""
    without = dataclasses.replace(export.request, reference_factory=None)
    assert examine(without).check("parity-prefill").status == "skipped"
    report = examine(dataclasses.replace(without, require=("parity-prefill",)))
    assert report.check("parity-prefill").status == "failed"
    assert not report.passed


def test_parity_needs_no_evaluation_windows(export: ToyExport) -> None:
    """Text for parity alone is enough for parity; perplexity is then skipped."""
    request = dataclasses.replace(
        export.request, parity_ids_path=export.request.windows_path, windows_path=None
    )
    report = examine(request)
    assert report.check("parity-decode").status == "passed"
    assert report.check("perplexity-drift").status == "skipped"
    assert report.perplexity["onnx"] is None


def test_divergence_is_not_located_without_names(export: ToyExport, tmp_path: Path) -> None:
    """Without a manifest nothing names the block outputs; the report says why the place is not known."""
    other = write_export(tmp_path / "other", reference=write_other_weights())
    request = dataclasses.replace(other.request, manifest_path=None, masks_path=None)
    report = examine(request)
    assert report.check("parity-prefill").status == "failed"
    assert report.first_divergence is not None
    assert report.first_divergence.startswith("not located")


def write_other_weights() -> dict[str, np.ndarray]:
    """Weights of another seed."""
    from toy_language_model import random_weights

    return random_weights(seed=5)


def test_file_of_another_tool_is_examined(tmp_path: Path) -> None:
    """Ids in, logits out, nothing else: what can be compared is compared, the rest is skipped."""
    table = np.random.default_rng(0).normal(size=(VOCAB, VOCAB)).astype(np.float32)
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 18]> m (int64[b, s] input_ids) '
        f"=> (float[b, s, {VOCAB}] logits) {{ logits = Gather(table, input_ids) }}"
    )
    model.graph.initializer.append(onnx.numpy_helper.from_array(table, "table"))
    onnx.save(model, tmp_path / "bigram.onnx")
    np.save(tmp_path / "table.npy", table)
    toy = write_export(tmp_path / "toy").request
    request = dataclasses.replace(
        toy,
        model_path=str(tmp_path / "bigram.onnx"),
        manifest_path=None,
        masks_path=None,
        reference_factory="toy_language_model:load_bigram",
        reference_arguments={"path": str(tmp_path / "table.npy")},
    )
    report = examine(request)
    assert report.passed
    assert {check.name for check in report.checks if check.status == "passed"} == {
        "structure",
        "finite",
        "parity-prefill",
        "perplexity-drift",
    }
    assert all(check.why for check in report.checks if check.status == "skipped")


@pytest.mark.parametrize(
    "content",
    [b"no array", np.zeros((2, 3), np.float32), np.zeros(4, np.int64), np.zeros((0, 4), np.int64)],
    ids=["bytes", "floats", "one axis", "none"],
)
def test_windows_file_of_another_form_is_refused(export: ToyExport, content: bytes | np.ndarray) -> None:
    """Anything but int64 windows is named as what it is."""
    path = Path(str(export.request.windows_path))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(ReportedError, match=r"windows\.npy") as caught:
        examine(export.request)
    assert (caught.value.error_id, caught.value.exit_code) == ("E-VALIDATE-WINDOWS", 2)
