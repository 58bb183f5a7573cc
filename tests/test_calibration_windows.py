"""Calibration windows: what they are cut from, how they repeat, what is held out, what is refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import make_tokenizer
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing

from compressor.calibration.text import TextSource, stretch_of
from compressor.calibration.tokens import adds_bos, refuse_tokenizer_beyond
from compressor.calibration.windows import Windows, calibration_windows
from compressor.errors import InputRefused

LETTERS = "abcdefghijklmnopqrstuvwxyz"
BOS, EOS = 1, 2
ROWS = 104


def text_of(*documents: str, kind: str = "documents") -> TextSource:
    """A text as read_text gives it."""
    return TextSource("test.jsonl", documents, kind, "a test", "0" * 64)  # type: ignore[arg-type]


def documents(count: int, length: int = 40, seed: int = 5) -> TextSource:
    """Random documents of one token per letter."""
    rng = random.Random(seed)
    return text_of(*("".join(rng.choices(LETTERS, k=length)) for _ in range(count)))


def cut(text: TextSource, tokenizer: Any = None, **changes: Any) -> Windows:
    """Windows with small defaults."""
    options: dict[str, Any] = {
        "num_samples": 8,
        "seqlen": 16,
        "sampler": "joined",
        "heldout_share": 0.25,
        "seed": 0,
        "vocab_rows": ROWS,
    }
    return calibration_windows(text, tokenizer or make_tokenizer(), **{**options, **changes})


def with_bos() -> Any:
    """A tokenizer that puts a BOS token before every text."""
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS)]
    )
    return tokenizer


def test_joined_windows_are_a_stream_of_documents() -> None:
    """The windows in order spell whole documents with one end-of-text token between them."""
    text = documents(20)
    windows = cut(text)
    assert (windows.ids.shape, windows.heldout.shape) == ((6, 16), (2, 16))
    stream = torch.cat([windows.ids, windows.heldout]).flatten().tolist()
    tokenizer = make_tokenizer()
    pieces = tokenizer.decode(stream).split("</s>")
    assert all(piece in text.documents for piece in pieces[:-1])
    assert any(document.startswith(pieces[-1]) for document in text.documents)
    assert stream.count(EOS) == 8 * 16 // 41


def test_joined_windows_begin_with_one_bos() -> None:
    """A tokenizer that adds BOS gives one at the very start of the stream, and none between documents."""
    windows = cut(documents(20), with_bos())
    assert windows.ids[0, 0] == BOS
    assert int((windows.ids == BOS).sum()) == 1
    assert "once" in windows.protocol["bos"]
    assert adds_bos(with_bos())
    assert not adds_bos(make_tokenizer())


def test_joined_windows_join_without_end_of_text() -> None:
    """A tokenizer without an end-of-text token joins with nothing, and the protocol says so."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    windows = cut(documents(20), tokenizer)
    assert not int((windows.ids == EOS).sum())
    assert "no end-of-text" in windows.protocol["join"]


def test_joined_windows_of_one_text_do_not_overlap() -> None:
    """Of one text, distinct stretches in its order are taken, and the held-out ones come last."""
    letters = "".join(random.Random(1).choices(LETTERS, k=16 * 40))
    windows = cut(text_of(letters, kind="text"))
    tokenizer = make_tokenizer()
    places = [
        letters.index(tokenizer.decode(row.tolist())) for row in torch.cat([windows.ids, windows.heldout])
    ]
    assert places == sorted(set(places))
    assert all(place % 16 == 0 for place in places)
    assert windows.protocol["join"] == "single text"


@pytest.mark.parametrize("sampler", ["joined", "strict"])
def test_windows_repeat_and_follow_the_seed(sampler: str) -> None:
    """Equal arguments give equal windows and hashes; another seed gives others."""
    text = documents(50)
    first, again, other = (cut(text, sampler=sampler, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.ids, again.ids)
    assert torch.equal(first.heldout, again.heldout)
    assert first.sha256 == again.sha256 == first.protocol["sha256"]
    assert first.sha256 != other.sha256


def test_windows_of_other_shapes_have_other_hashes() -> None:
    """The same ids in windows half as long, or split otherwise, are other windows."""
    text = text_of((LETTERS * 5)[:128], kind="text")
    whole, short, held = (
        cut(text, num_samples=number, seqlen=length, heldout_share=share)
        for number, length, share in ((8, 16, 0.25), (16, 8, 0.25), (8, 16, 0.375))
    )
    ids = [torch.cat([windows.ids, windows.heldout]).flatten() for windows in (whole, short, held)]
    assert torch.equal(ids[0], ids[1])
    assert torch.equal(ids[0], ids[2])
    assert len({whole.sha256, short.sha256, held.sha256}) == 3


def test_joined_windows_use_what_there_is() -> None:
    """A text with fewer windows than asked for is used up, and the protocol gives both numbers."""
    windows = cut(documents(2), num_samples=100)
    assert (len(windows.ids), len(windows.heldout)) == (4, 1)
    assert (windows.protocol["requested_windows"], windows.protocol["windows"]) == (100, 4)


def test_joined_windows_hold_out_at_least_one() -> None:
    """A single sample is still accompanied by a held-out one."""
    windows = cut(documents(5), num_samples=1)
    assert (len(windows.ids), len(windows.heldout)) == (1, 1)


@pytest.mark.parametrize("text", [text_of("abc"), text_of("a" * 31, kind="text")])
def test_joined_windows_refuse_a_short_text(text: TextSource) -> None:
    """A text that does not fill two windows is refused with what to do."""
    with pytest.raises(InputRefused, match=r"test\.jsonl") as refused:
        cut(text)
    assert refused.value.error_id == "E-CALIBRATION-SHORT"
    assert "--seqlen" in refused.value.remedy


def published(text: TextSource, tokenizer: Any, count: int, seqlen: int, seed: int) -> list[list[int]]:
    """The published sampler as its code has it."""
    random.seed(seed)
    rows = []
    for _ in range(count):
        while True:
            place = random.randint(0, len(text.documents) - 1)
            tokens = tokenizer(text.documents[place])["input_ids"]
            if len(tokens) > seqlen:
                break
        start = random.randint(0, len(tokens) - seqlen - 1)
        rows.append(tokens[start : start + seqlen])
    return rows


def test_strict_windows_are_the_published_ones() -> None:
    """The same seed draws the same windows as the published code, short documents and BOS included."""
    rng = random.Random(7)
    text = text_of(*("".join(rng.choices(LETTERS, k=rng.randint(4, 60))) for _ in range(60)))
    state = random.getstate()
    try:
        expected = published(text, with_bos(), 8, 16, seed=11)
    finally:
        random.setstate(state)
    assert cut(text, with_bos(), sampler="strict", seed=11).ids.tolist() == expected


def test_strict_windows_hold_out_other_documents() -> None:
    """Held-out windows come from documents that no other window is cut from, besides all that were asked for."""
    text = documents(50)
    windows = cut(text, sampler="strict")
    assert (len(windows.ids), len(windows.heldout)) == (8, 2)
    tokenizer = make_tokenizer()

    def source(row: torch.Tensor) -> int:
        [place] = [
            n for n, document in enumerate(text.documents) if tokenizer.decode(row.tolist()) in document
        ]
        return place

    assert not {source(row) for row in windows.ids} & {source(row) for row in windows.heldout}


def test_strict_windows_of_one_text_hold_out_its_end() -> None:
    """Of one text, the held-out crops lie behind all others."""
    letters = "".join(random.Random(1).choices(LETTERS, k=600))
    windows = cut(text_of(letters, kind="text"), sampler="strict")
    tokenizer = make_tokenizer()
    places, held = (
        [letters.index(tokenizer.decode(row.tolist())) for row in rows]
        for rows in (windows.ids, windows.heldout)
    )
    assert max(places) + 16 <= min(held)


@pytest.mark.parametrize(
    "text",
    [
        text_of(*["a" * 16] * 3000),
        text_of("a" * 17, "b", "c"),
        text_of("a" * 33, kind="text"),
        text_of(""),
    ],
)
def test_strict_windows_end_where_nothing_is_long_enough(text: TextSource) -> None:
    """Documents no longer than a window, or one only, end in an error and not in a loop without end."""
    with pytest.raises(InputRefused) as refused:
        cut(text, sampler="strict")
    assert refused.value.error_id == "E-CALIBRATION-SHORT"
    assert "joined" in refused.value.remedy


def test_windows_leave_the_global_seed_alone() -> None:
    """Drawing windows does not touch the random numbers of others."""
    random.seed(1)
    before = random.getstate()
    cut(documents(50), sampler="strict")
    assert random.getstate() == before


def test_long_texts_are_cut_at_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a very long text only a stretch of whole lines is tokenized; a short one is taken whole."""
    monkeypatch.setattr("compressor.calibration.text._MIN_STRETCH_CHARACTERS", 100)
    text = "".join(f"line {number}\n" for number in range(1000))
    stretch = stretch_of(text, 4, random.Random(0))
    assert 50 <= len(stretch) <= 100
    assert stretch in text
    assert text[text.index(stretch) - 1] == "\n"
    assert stretch_of(text, 10_000, random.Random(0)) == text


def test_tokens_beyond_the_embedding_are_refused() -> None:
    """A vocabulary larger than the embedding is refused and the first such token named."""
    with pytest.raises(InputRefused, match=r"token 100 \(.*\), .* 100 rows") as refused:
        refuse_tokenizer_beyond(make_tokenizer(), 100)
    assert refused.value.error_id == "E-TOKEN-OUT-OF-RANGE"


@pytest.mark.parametrize("role", ["pad_token", "eos_token", "mask_token"])
def test_special_tokens_with_a_role_are_refused_beyond_the_embedding(role: str) -> None:
    """A padding token that was added without widening the embedding is refused."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({role: "[new]"})
    with pytest.raises(InputRefused, match=r"104 \('\[new\]'\)"):
        refuse_tokenizer_beyond(tokenizer, ROWS)


def test_special_tokens_without_a_role_may_lie_beyond() -> None:
    """A placeholder that no text holds is passed over; a text that spells it out is refused."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    assert cut(documents(20), tokenizer).ids.max() < ROWS
    with pytest.raises(InputRefused, match="104") as refused:
        cut(text_of("<image>" + "a" * 200), tokenizer)
    assert refused.value.error_id == "E-TOKEN-OUT-OF-RANGE"


@pytest.mark.parametrize("sampler", ["joined", "strict"])
def test_windows_state_their_protocol(sampler: str) -> None:
    """Sampler, window, BOS, join, counts and hash stand in plain values."""
    protocol = cut(documents(50), sampler=sampler).protocol
    stated = {"sampler", "window_tokens", "windows", "heldout_windows", "requested_windows", "bos", "join"}
    assert stated <= protocol.keys()
    assert {type(value) for value in protocol.values()} <= {str, int}


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.mark.skipif(
    not (SHARED / "models" / "stories260K").is_dir(), reason="the shared test model is not here"
)
def test_windows_of_the_shared_model_fit_it() -> None:
    """The shared story model and its stories give 112 and 16 windows of ids that it has."""
    from compressor.calibration.text import read_text
    from compressor.models.checkpoint import open_checkpoint

    tokenizer = open_checkpoint(SHARED / "models" / "stories260K").load_tokenizer()
    text = read_text(str(SHARED / "data" / "tinystories" / "calib.jsonl"), role="calibration")
    windows = cut(text, tokenizer, num_samples=128, seqlen=256, heldout_share=0.125, vocab_rows=512)
    assert (windows.ids.shape, windows.heldout.shape) == ((112, 256), (16, 256))
    assert windows.ids.max() < 512
