"""Loading in ONNX Runtime, providers, and the causal language model's inputs and outputs."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from toy_language_model import BLOCKS, VOCAB, GraphOptions, ToyReference, random_weights, write_export

from exporters.errors import ReportedError
from validators import session as session_module
from validators.causal_lm import CausalLM
from validators.errors import ValidationError, ValidationResourceError, ValidationUsageError
from validators.reference import position_ids
from validators.session import Session, choose_provider, installation_notices, to_float32


def small_model(path: Path, text: str) -> Path:
    """A model in ONNX's text format, written to ``path``."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> m {text}')
    path.write_bytes(proto.SerializeToString())
    return path


def ids_of(batch: int, length: int) -> np.ndarray:
    """Random token ids."""
    return np.random.default_rng(3).integers(0, VOCAB, size=(batch, length))


def test_session_tells_provider_and_load_cost(tmp_path: Path) -> None:
    """A loaded file says what runs it and what loading took."""
    session = Session(write_export(tmp_path).model_path, "cpu")
    assert session.provider == "CPUExecutionProvider"
    assert session.load_s > 0
    assert session.load_rss_bytes >= 0
    assert {"input_ids", "attention_mask", "position_ids"} <= set(session.inputs)


def test_session_refuses_what_onnx_runtime_cannot_load(tmp_path: Path) -> None:
    """A file that is no model, or whose data is gone, is refused by name, with our id."""
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model at all")
    model = write_export(tmp_path / "toy").model_path
    (model.parent / "toy.onnx.data").unlink()
    for path in (broken, model):
        with pytest.raises(ValidationError, match=path.name) as caught:
            Session(path, "cpu")
        assert (caught.value.error_id, caught.value.exit_code) == ("E-ORT-LOAD", 3)


def test_session_refuses_names_that_are_not_text(tmp_path: Path) -> None:
    """ONNX Runtime loads an axis name of any bytes; Python cannot read it."""
    model = write_export(tmp_path).model_path
    model.write_bytes(model.read_bytes().replace(b"sequence", b"sequ\xefnce"))
    with pytest.raises(ValidationError, match=r"toy\.onnx") as caught:
        Session(model, "cpu")
    assert caught.value.error_id == "E-ORT-LOAD"


def test_provider_names_may_be_short() -> None:
    """ "cpu", "CPU" and the full name mean the same; auto finds one that works."""
    assert {choose_provider(name) for name in ("cpu", "CPU", "CPUExecutionProvider")} == {
        "CPUExecutionProvider"
    }
    assert choose_provider("auto") in ("CPUExecutionProvider", "CUDAExecutionProvider")


def test_unknown_provider_is_a_usage_error() -> None:
    """A provider that ONNX Runtime has never heard of is the user's slip; what there is gets listed."""
    with pytest.raises(ValidationUsageError, match="GPUExecutioner") as caught:
        choose_provider("GPUExecutioner")
    assert (caught.value.error_id, caught.value.exit_code) == ("E-PROVIDER-UNKNOWN", 2)
    assert "CPUExecutionProvider" in caught.value.remedy


def test_provider_that_is_not_here_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that exists, but not on this machine, is never replaced by another in silence."""
    monkeypatch.setattr(session_module, "_has_cuda_driver", lambda: False)
    for name in ("cuda", "coreml"):
        with pytest.raises(ValidationResourceError) as caught:
            choose_provider(name)
        assert (caught.value.error_id, caught.value.exit_code) == ("E-PROVIDER-UNAVAILABLE", 5)
    assert choose_provider("auto") == "CPUExecutionProvider"


def test_missing_onnx_runtime_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without either wheel the error says which extras bring one."""
    real_import = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real_import(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValidationResourceError) as caught:
        choose_provider("auto")
    assert caught.value.error_id == "E-ORT-MISSING"
    assert "[gpu]" in caught.value.remedy
    assert "[cpu]" in caught.value.remedy


def test_two_onnx_runtime_wheels_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two distributions in one environment are told apart from one."""
    both = {"onnxruntime", "onnxruntime-gpu"}
    monkeypatch.setattr(session_module, "_is_installed", lambda name: name in both)
    assert "E-ORT-BOTH" in installation_notices()[0]
    monkeypatch.setattr(session_module, "_is_installed", lambda name: name == "onnxruntime")
    assert installation_notices() == ()


def test_extra_outputs_show_values_inside_the_graph(tmp_path: Path) -> None:
    """Block outputs appear as graph outputs, external data and sparse initializers included."""
    export = write_export(tmp_path, encoding="sparse")
    model = CausalLM(Session(export.model_path, "cpu", extra_outputs=["blockin_1"]))
    ids = ids_of(2, 7)
    expected = ToyReference(random_weights()).block_outputs(ids)[0]
    # float32 sums of eight and sixteen products in another order
    np.testing.assert_allclose(model.run(ids, None, ["blockin_1"])["blockin_1"], expected, atol=1e-5)


@pytest.mark.parametrize("symbolic_heads", [True, False])
@pytest.mark.parametrize("prefix", [None, 1, 5, 8])
def test_model_gives_the_same_logits_step_by_step(
    tmp_path: Path, symbolic_heads: bool, prefix: int | None
) -> None:
    """All at once, or a prefix and then token by token: the logits are the reference's, with padding too."""
    export = write_export(tmp_path, options=GraphOptions(symbolic_heads=symbolic_heads))
    model = CausalLM(Session(export.model_path, "cpu"))
    assert len(model.cache) == 2 * BLOCKS
    ids, mask = ids_of(2, 9), np.ones((2, 9), np.int64)
    mask[1, :1] = 0
    found = model.run(ids, mask, ["logits"], prefix)["logits"]
    expected = ToyReference(random_weights()).logits(ids, mask)
    # float32 sums of eight and sixteen products in another order, at logits around 20
    np.testing.assert_allclose(found[mask != 0], expected[mask != 0], atol=1e-4)


def test_model_without_cache_mask_and_positions_runs(tmp_path: Path) -> None:
    """A graph of another tool may take nothing but ids, also as int32."""
    path = small_model(
        tmp_path / "plain.onnx",
        "(int32[b, s] input_ids) => (float[b, s, 3] logits) <float[3, 3] table = {1,2,3,4,5,6,7,8,9}> "
        "{ logits = Gather(table, input_ids) }",
    )
    model = CausalLM(Session(path, "cpu"))
    assert (model.cache, model.has_attention_mask) == ((), False)
    assert model.logits(np.array([[2, 0]])).tolist() == [[[7, 8, 9], [1, 2, 3]]]
    assert model.compute_dtype("float32") == "float32"
    assert model.compute_dtype("float16") == "float16"
    with pytest.raises(ValueError, match="KV cache"):
        model.run(np.array([[2, 0]]), None, ["logits"], prefix=1)


@pytest.mark.parametrize(
    "text",
    [
        "(int64[b, s] input_ids, float[b] pixels) => (float[b] logits) { logits = Identity(pixels) }",
        "(int64[b, s] tokens) => (float[b, s] logits) { logits = Cast<to=1>(tokens) }",
        "(int64[b, s] input_ids) => (float[b, s] scores) { scores = Cast<to=1>(input_ids) }",
        "(int64[b, s] input_ids) => (int64[b, s] logits) { logits = Identity(input_ids) }",
        "(int64[b, s] input_ids, float[b, 1, s, 2] past_x) => (float[b, s] logits) "
        "{ logits = Cast<to=1>(input_ids) }",
    ],
)
def test_model_refuses_other_signatures(tmp_path: Path, text: str) -> None:
    """What is no causal language model is refused with the name of the input or output that gives it away."""
    session = Session(small_model(tmp_path / "other.onnx", text), "cpu")
    with pytest.raises(ReportedError) as caught:
        CausalLM(session)
    assert (caught.value.error_id, caught.value.exit_code) == ("E-VALIDATE-SIGNATURE", 3)


def test_model_refuses_logits_of_the_last_token_only(tmp_path: Path) -> None:
    """Parity and perplexity need logits for every token."""
    path = small_model(
        tmp_path / "last.onnx",
        "(int64[b, s] input_ids) => (float[b, t, 3] logits) <float[3, 3] table = {1,2,3,4,5,6,7,8,9}, "
        "int64[1] last = {-1}> { every = Gather(table, input_ids) logits = Gather<axis=1>(every, last) }",
    )
    with pytest.raises(ValidationError, match="logits") as caught:
        CausalLM(Session(path, "cpu")).logits(np.array([[2, 0]]))
    assert caught.value.error_id == "E-VALIDATE-OUTPUT-SHAPE"


def test_model_that_fails_while_running_is_refused(tmp_path: Path) -> None:
    """An id beyond the embedding is an error of the file and not a crash."""
    path = small_model(
        tmp_path / "small.onnx",
        "(int64[b, s] input_ids) => (float[b, s, 3] logits) <float[2, 3] table = {1,2,3,4,5,6}> "
        "{ logits = Gather(table, input_ids) }",
    )
    with pytest.raises(ValidationError, match=r"small\.onnx") as caught:
        CausalLM(Session(path, "cpu")).logits(np.array([[5]]))
    assert caught.value.error_id == "E-ORT-RUN"


def test_bfloat16_values_go_in_and_come_out(tmp_path: Path) -> None:
    """numpy has no bfloat16; what is exact in its 8 bits survives both ways."""
    path = small_model(
        tmp_path / "brain.onnx", "(bfloat16[n, m] x) => (bfloat16[n, m] y) { y = Identity(x) }"
    )
    session = Session(path, "cpu")
    exact = np.array([[1.5, -2.0], [0.15625, 3e38]], np.float32)
    exact[1, 1] = np.float32(2.0**100)
    value = session.run({"x": session.value(exact, session.inputs["x"])}, ["y"])["y"]
    assert to_float32(value).tolist() == exact.tolist()


def test_position_ids_count_from_the_first_real_token() -> None:
    """As generation makes them: 0 at padding, then 0, 1, 2, …"""
    assert position_ids(np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])).tolist() == [
        [0, 0, 0, 1, 2],
        [0, 1, 2, 3, 4],
    ]
