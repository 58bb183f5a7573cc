"""Text from an exported model: the tokens, how they are chosen and shown, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from runtime_samples import needs_library
from toy_causal_lm import write_counting_model

from blockpress_runtime import BlockpressRuntimeError
from blockpress_runtime.generate import generate, main

pytestmark = needs_library


@pytest.mark.parametrize("cached", [True, False], ids=["cache", "no cache"])
def test_generation_goes_on_where_the_prompt_ends(tmp_path: Path, cached: bool) -> None:
    """Each step reads the last token at its place: with a cache one token at a time, without one all of them."""
    model = write_counting_model(tmp_path, cached=cached)
    # Positions 0 to 6 count by one, those after by two.
    assert "".join(generate(model, "abc", max_new_tokens=8)) == "defghjln"
    assert "".join(generate(tmp_path, "a" * 7 + "b", max_new_tokens=3)) == "dfh"


def test_pieces_come_one_by_one(tmp_path: Path) -> None:
    """The text is there token by token, and whole characters only."""
    write_counting_model(tmp_path)
    assert list(generate(tmp_path, "abc", max_new_tokens=3)) == ["d", "e", "f", ""]
    # 0xC2 is the first byte of a character; the model goes on with 0xC3, which is no second one.
    pieces = list(generate(tmp_path, chr(0xC1 - 1), max_new_tokens=4))
    assert all("\ufffd" not in piece for piece in pieces[:-1])


def test_long_prompts_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts of a prompt give what the whole gives: positions and cache go on."""
    write_counting_model(tmp_path)
    whole = "".join(generate(tmp_path, "abcdefghij", max_new_tokens=5))
    monkeypatch.setattr("blockpress_runtime.language_model._TOKENS_AT_ONCE", 3)
    assert "".join(generate(tmp_path, "abcdefghij", max_new_tokens=5)) == whole == "lnprt"


def test_text_ends_at_the_end_token_and_at_the_longest_sequence(tmp_path: Path) -> None:
    """The generation config's end token comes before the config's; no sequence is longer than the positions."""
    write_counting_model(tmp_path)
    assert len("".join(generate(tmp_path, "a" * 40, max_new_tokens=500))) == 64 - 40
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [ord("f")]}))
    assert "".join(generate(tmp_path, "abc", max_new_tokens=9)) == "de"


def test_drawing_repeats_with_a_seed_and_keeps_to_the_likeliest(tmp_path: Path) -> None:
    """The same seed gives the same text, another one another; of the three likeliest none is left out."""
    write_counting_model(tmp_path)

    def drawn(seed: int, top_k: int = 0) -> str:
        return "".join(generate(tmp_path, "!!!", max_new_tokens=20, temperature=9.0, top_k=top_k, seed=seed))

    assert drawn(1) == drawn(1) != drawn(2)
    codes = np.array([ord(sign) for sign in "!" + drawn(3, top_k=3)])
    counted = np.where(np.arange(2, 22) > 6, 2, 1)  # what the model itself would count on
    assert set((np.diff(codes) - counted).tolist()) == {-1, 0, 1}


def test_command_prints_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output holds the text and nothing else; the time goes to standard error."""
    model = write_counting_model(tmp_path, name="sparse.onnx")
    (tmp_path / "sparse.hf").mkdir()
    (tmp_path / "tokenizer.json").rename(tmp_path / "sparse.hf" / "tokenizer.json")
    arguments = [str(model), "--prompt", "abc", "--max-new-tokens", "4", "--threads", "1", "--time"]
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "defg\n"
    assert captured.err.startswith("4 tokens in ")


def test_command_tells_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 1, one line, and what to do."""
    cases = {
        str(tmp_path): "there is no file",
        str(tmp_path / "model.onnx"): "there is no file",
    }
    for model, message in cases.items():
        assert main([model, "--prompt", "a"]) == 1
        assert message in capsys.readouterr().err
    write_counting_model(tmp_path)
    assert main([str(tmp_path), "--prompt", "a" * 65]) == 1
    assert "has 65 tokens, the model reads at most 64" in capsys.readouterr().err
    assert main([str(tmp_path), "--prompt", ""]) == 1
    assert "no tokens" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").write_text("{")
    assert main([str(tmp_path), "--prompt", "a"]) == 1
    assert "cannot be read" in capsys.readouterr().err
    (tmp_path / "tokenizer.json").unlink()
    assert main([str(tmp_path), "--prompt", "a"]) == 1
    assert "no tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--temperature", "-1"], ["--top-k", "-1"], ["--temperature", "nan"], []])
def test_command_refuses_wrong_usage(tmp_path: Path, option: list[str]) -> None:
    """Exit code 2, by argparse."""
    prompt = ["--prompt", "a"] if option else []
    with pytest.raises(SystemExit) as exit_code:
        main([str(tmp_path), *prompt, *option])
    assert exit_code.value.code == 2


def test_missing_tokenizers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which package to install."""
    write_counting_model(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BlockpressRuntimeError, match="pip install tokenizers"):
        list(generate(tmp_path, "a"))


def test_folder_of_several_models_is_refused(tmp_path: Path) -> None:
    """Unless one is called model.onnx, the user has to say which."""
    write_counting_model(tmp_path, name="a.onnx")
    write_counting_model(tmp_path, name="b.onnx")
    with pytest.raises(BlockpressRuntimeError, match=r"several models \(a\.onnx, b\.onnx\)"):
        list(generate(tmp_path, "a"))
