"""The example model in `examples/tiny-llm`, its card's figures, and the script that trained it."""

from __future__ import annotations

import importlib.util
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from click.testing import CliRunner
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from compressor.calibration.python_docs import Corpus, Split, python_docs

EXAMPLES = Path(__file__).parents[1] / "examples"
FOLDER = EXAMPLES / "tiny-llm"
WINDOW = 256


@dataclass(frozen=True)
class Measured:
    """Perplexities on the whole evaluation split of the running Python, under the card's protocol."""

    model: float
    unigram: float


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Return the shipped model."""
    return AutoModelForCausalLM.from_pretrained(FOLDER).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    """Return the shipped tokenizer."""
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def card() -> str:
    """Return the text of the shipped model card."""
    return (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    """Yield the training script as a module."""
    spec = importlib.util.spec_from_file_location("train_tiny_llm", EXAMPLES / "train_tiny_llm.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def stream_of(tokenizer: PreTrainedTokenizerBase, split: Split) -> list[int]:
    """Return a split's tokens, each document ended by EOS."""
    tokens: list[int] = []
    for document in python_docs(split).documents:
        tokens += [*tokenizer.backend_tokenizer.encode(document, add_special_tokens=False).ids, 1]
    return tokens


def model_perplexity(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Return exp(mean nats per token) over windows (N, 256), each window's first token context only."""
    nats = []
    with torch.no_grad():
        for batch in windows.split(8):
            logits = model(input_ids=batch).logits[:, :-1]
            nats.append(cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="none"))
    return math.exp(torch.cat(nats).double().mean().item())


@pytest.fixture(scope="module")
def measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Measured:
    """Return the perplexities of the model and of the add-one unigram baseline on the same tokens."""
    stream = torch.tensor(stream_of(tokenizer, "evaluation"))
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    counts = torch.ones(1536, dtype=torch.float64)
    for token in stream_of(tokenizer, "train"):
        counts[token] += 1
    unigram = math.exp(-torch.log(counts / counts.sum())[windows[:, 1:]].mean().item())
    return Measured(model_perplexity(model, windows), unigram)


def card_figure(card: str, row: str) -> float:
    """Return the figure in the card's table row that begins with `row`."""
    found = re.search(rf"^\| {re.escape(row)}.*\| \**([0-9.]+)\** \|$", card, flags=re.MULTILINE)
    assert found is not None, row
    return float(found.group(1))


def test_tiny_llm_folder_is_small_and_complete() -> None:
    """The folder has everything that a Hugging Face model needs and stays under 10 MB."""
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    expected = {"README.md", "LICENSE", "config.json", "generation_config.json", "model.safetensors"}
    assert set(files) == expected | {"tokenizer.json", "tokenizer_config.json"}
    assert sum(files.values()) < 10_000_000


def test_tiny_llm_has_the_stated_size(model: PreTrainedModel, card: str) -> None:
    """The model has 1 to 2 million parameters, as many as its card says, with tied embeddings."""
    assert 1_000_000 < model.num_parameters() < 2_000_000
    assert f"{model.num_parameters():,} parameters" in card
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight


def test_tiny_llm_widths_suit_n_m_patterns(model: PreTrainedModel) -> None:
    """Every linear of the blocks has inputs in multiples of 8, so that 2:4 and 4:8 apply to all."""
    linears = [m for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(linears) == 6 * 7
    assert all(linear.in_features % 8 == 0 for linear in linears)


def test_tiny_llm_tokenizer_puts_bos_first(tokenizer: PreTrainedTokenizerBase) -> None:
    """A text begins with BOS, ends without EOS, and loses BOS where special tokens are off."""
    ids = tokenizer("Return the name.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id == 0
    assert ids[-1] != tokenizer.eos_token_id
    assert tokenizer("Return the name.", add_special_tokens=False)["input_ids"] == ids[1:]


@pytest.mark.parametrize(
    "text", ["def f(x):\n    return x  # twice\n", "naïve Ω 漢字 🙂\t\x00", " leading ,space ."]
)
def test_tiny_llm_tokenizer_round_trips(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    """Byte-level tokens give back any text exactly, spaces before punctuation too."""
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tiny_llm_is_a_language_model(measured: Measured) -> None:
    """Its perplexity on text it never saw is below an eighth of the unigram baseline's."""
    assert measured.model < measured.unigram / 8


def test_tiny_llm_card_states_the_perplexities(measured: Measured, card: str) -> None:
    """The card's two figures are what this Python measures."""
    same_text = python_docs("evaluation").sha256 in card and python_docs("train").sha256 in card
    # The same text differs by rounding alone; those of Python 3.10, 3.12 and 3.13 were measured within 1.3 %.
    tolerance = 0.005 if same_text else 0.05
    assert measured.model == pytest.approx(card_figure(card, "this model, `evaluation`"), rel=tolerance)
    assert measured.unigram == pytest.approx(card_figure(card, "unigram baseline"), rel=tolerance)


def test_tiny_llm_is_hurt_by_pruning_half(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Zeroing the smaller half of each row raises the perplexity by a quarter at least."""
    stream = torch.tensor(stream_of(tokenizer, "evaluation")[: 16 * WINDOW]).view(-1, WINDOW)
    pruned = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    for linear in (m for m in pruned.model.layers.modules() if isinstance(m, torch.nn.Linear)):
        smaller = linear.weight.abs().argsort(dim=1)[:, : linear.in_features // 2]  # (out, in/2)
        linear.weight.data.scatter_(1, smaller, 0.0)
    assert model_perplexity(pruned, stream) > 1.25 * model_perplexity(model, stream)


def test_tiny_llm_script_cuts_windows_without_overlap(script: ModuleType) -> None:
    """Windows follow one another and the tail is dropped."""
    windows = script.windows_of(torch.arange(2 * WINDOW + 5))
    assert windows.shape == (2, WINDOW)
    assert windows[1, 0] == WINDOW


def test_tiny_llm_script_unigram_of_a_uniform_stream(script: ModuleType) -> None:
    """Where every token is equally frequent the unigram perplexity is the vocabulary's size."""
    everything = torch.arange(script.VOCABULARY)
    assert script.unigram_perplexity(everything, everything.view(-1, WINDOW)) == pytest.approx(1536)


def test_tiny_llm_script_schedule_warms_up_and_decays(script: ModuleType) -> None:
    """The learning rate rises to its peak by the end of the warm-up and falls to 2 % at the end."""
    factors = [script.learning_rate_factor(step, 1000) for step in range(1001)]
    assert max(factors) == factors[99] == 1.0
    assert factors[1000] == pytest.approx(0.02)


def test_tiny_llm_script_writes_a_loadable_folder(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run of two steps on a small text writes weights, tokenizer and card, and repeats bit for bit."""
    kept: dict[Split, int] = {"train": 20, "heldout": 3, "evaluation": 3}
    texts = {split: python_docs(split).documents[:count] for split, count in kept.items()}
    monkeypatch.setattr(script, "python_docs", lambda split: Corpus(texts[split], "a part", "0" * 64))
    threads = str(torch.get_num_threads())
    for name in ("first", "second"):
        options = ["--out", str(tmp_path / name), "--steps", "2", "--threads", threads]
        result = CliRunner().invoke(script.main, options, catch_exceptions=False)
        assert result.exit_code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert AutoTokenizer.from_pretrained(tmp_path / "first").vocab_size <= loaded.config.vocab_size
    assert card_figure((tmp_path / "first" / "README.md").read_text(encoding="utf-8"), "unigram baseline") > 1
