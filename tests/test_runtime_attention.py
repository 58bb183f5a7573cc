"""Attention in the operator library: the numbers of float64 and of the function in the model, and what it refuses."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from attention_samples import AttentionCase, Floats
from runtime_samples import needs_library, open_session

pytestmark = needs_library

TOLERANCE = 1e-6  # of what the sizes of the terms allow (AttentionCase.exact)

CASES = {
    "one token": AttentionCase(),
    "one token, a key head for each query": AttentionCase(heads=3, kv_heads=3, rotary_width=16),
    "one token, many chunks of the cache": AttentionCase(past=1500, heads=4, rotary_width=16),
    "some tokens": AttentionCase(tokens=5, past=200, rotary_width=8),
    "a prompt": AttentionCase(tokens=150, past=0, width=33, value_width=7, rotary_width=32),
    "a prompt behind others": AttentionCase(tokens=90, past=80, heads=5, kv_heads=1),
    "no new token": AttentionCase(tokens=0),
}


def run(case: AttentionCase, given: dict[str, Floats], threads: int = 1) -> dict[str, Floats]:
    session = open_session(case.model(), threads)
    names = [port.name for port in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", ["", "scalar"])
def test_numbers_are_those_of_float64(name: str, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the best kernels of this machine and with the plain ones; each output has its shape."""
    monkeypatch.setenv("BLOCKPRESS_RUNTIME_ISA", isa)
    case = CASES[name]
    given = case.inputs()
    found = run(case, given)
    for output, (exact, terms) in case.exact(given).items():
        assert found[output].shape == exact.shape
        assert (np.abs(found[output] - exact) <= TOLERANCE * terms).all()


@pytest.mark.parametrize("name", [name for name in CASES if name != "no new token"])
def test_numbers_are_those_of_the_function_in_the_model(name: str) -> None:
    """Which ONNX Runtime runs where the library is not registered."""
    case = CASES[name]
    given = case.inputs()
    plain = onnxruntime.InferenceSession(case.model().SerializeToString(), providers=["CPUExecutionProvider"])
    for (output, found), expected in zip(run(case, given).items(), plain.run(None, given), strict=True):
        _, terms = case.exact(given)[output]
        assert (np.abs(found - expected) <= 2 * TOLERANCE * terms).all()


@pytest.mark.parametrize("name", CASES)
def test_threads_do_not_change_a_bit(name: str) -> None:
    given = CASES[name].inputs()
    one, two = (run(CASES[name], given, threads) for threads in (1, 2))
    for output, value in one.items():
        np.testing.assert_array_equal(value, two[output])


def test_an_empty_cache_may_have_any_heads_and_width() -> None:
    """As optimum makes the first one."""
    case = AttentionCase(tokens=3, past=0)
    given = case.inputs()
    other = given | {name: np.zeros((2, 1, 0, 5), np.float32) for name in ("past_key", "past_value")}
    for output, value in run(case, given).items():
        np.testing.assert_array_equal(value, run(case, other)[output])


def test_rows_that_see_no_key_are_the_mean_of_all_values() -> None:
    """The lowest number everywhere hides nothing more than nothing anywhere, as in the softmax of PyTorch."""
    case = AttentionCase(tokens=2, past=100)
    given = case.inputs()
    given["mask"][:] = np.finfo(np.float32).min
    found = run(case, given)
    means = np.repeat(found["present_value"].mean(axis=2, dtype=np.float64), 3, axis=1).reshape(2, 1, -1)
    np.testing.assert_allclose(found["y"], np.repeat(means, 2, axis=1), rtol=0, atol=1e-6)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    case = AttentionCase(tokens=2)
    given = case.inputs()
    given["q"][1, 1, : case.width] = np.nan
    wrong = np.isnan(run(case, given)["y"])
    assert wrong[1, 1, : case.value_width].all()
    assert wrong.sum() == case.value_width


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": np.zeros((2, 1, 7), np.float32)},
            "the last axis of q must be a multiple of 6 heads, but is 7",
        ),
        ({"q": np.zeros((2, 1), np.float32)}, "q must have 3 or 4 axes, but has 2"),
        (
            {"q": np.zeros((2, 1, 6, 8), np.float32)},
            "the heads of k must be as wide as those of q, 8, but are 16",
        ),
        ({"k": np.zeros((2, 2, 2, 16), np.float32)}, "axis 1 of k must be 1, but is 2"),
        ({"v": np.zeros((1, 1, 2, 24), np.float32)}, "axis 0 of v must be 2, but is 1"),
        ({"past_key": np.zeros((2, 3, 70, 16), np.float32)}, "axis 1 of past_key must be 2, but is 3"),
        ({"past_value": np.zeros((2, 2, 69, 24), np.float32)}, "axis 2 of past_value must be 70, but is 69"),
        ({"mask": np.zeros((2, 1, 1, 70), np.float32)}, "past_key has 70 places, mask says that 69 tokens"),
        ({"mask": np.zeros((2, 4, 1, 71), np.float32)}, "axis 1 of mask must be 6 or 1, but is 4"),
        (
            {"cos": np.zeros((1, 1, 1, 18), np.float32)},
            "the last axis of cos must be even and at most 16, but is 18",
        ),
        ({"sin": np.zeros((1, 1, 1, 4), np.float32)}, "axis 3 of sin must be 8, but is 4"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(change: dict[str, Floats], message: str) -> None:
    case = AttentionCase(rotary_width=8)
    with pytest.raises(Exception, match=f"RotaryAttention: {message}"):
        run(case, case.inputs() | change)


def test_heads_that_do_not_fit_are_refused() -> None:
    case = AttentionCase()
    session = open_session(case.model(kv_heads=4), 1)
    with pytest.raises(Exception, match="num_heads must be a multiple of kv_heads"):
        session.run(None, case.inputs())
