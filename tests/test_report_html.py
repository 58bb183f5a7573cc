"""The HTML page: whole for every kind of run, offline, inert, small, and the same each time."""

from __future__ import annotations

import functools
import math
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_samples import block_rows, check_rows, expert_rows, fields, sample_report, weight_rows

from compressor.report.html import render_html, write_report
from compressor.report.schema import (
    BlockRow,
    CheckRow,
    EncodingBytes,
    LoadFacts,
    ModelFacts,
    PerplexityFacts,
    Report,
    SizeFacts,
    SparsityFacts,
    ValidationFacts,
)

MAX_PAGE_BYTES = 300_000  # "under a few hundred KB": it is mailed around
HOSTILE = '</title><script>alert("$x_1$")</script><img src=x onerror=alert(1)>'
VOID = {"meta", "br", "img", "link", "hr", "input"}


class PageReader(HTMLParser):
    """Collects the tags, attributes and text of a page, and whether its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(html: str) -> PageReader:
    """The page, parsed to its end."""
    page = PageReader()
    page.feed(html)
    page.close()
    assert page.open == []
    return page


def words_of(html: str) -> str:
    """The page's text without tags, white space folded."""
    return " ".join(" ".join(read_page(html).text).split())


def failed_report() -> Report:
    """A run whose export computes something else, with a number that is none."""
    checks = tuple(
        check.model_copy(update={"status": "failed", "measured": math.nan, "why": "block 11 differs"})
        if check.name == "parity-decode"
        else check
        for check in check_rows()
    )
    return sample_report(
        validation=ValidationFacts(
            passed=False, provider="CUDAExecutionProvider", first_divergence="block 11", checks=checks
        ),
        perplexity=PerplexityFacts(dense=9.7, pruned=14_812.0, recovered=12.8, onnx=math.nan),
    )


VARIANTS = {
    "whole": lambda: sample_report(),
    "failed": failed_report,
    "not validated": lambda: sample_report(validation=ValidationFacts()),
    "no recovery": lambda: sample_report(
        recovery="none",
        learning_rate=None,
        finetuning=(),
        blocks=tuple(BlockRow(index=index) for index in range(16)),
    ),
    "one block": lambda: sample_report(1),
    "80 blocks": lambda: sample_report(80),
    "128 experts": lambda: sample_report(48, weights=expert_rows(48, 128)),
    "N:M": lambda: sample_report(sparsity=SparsityFacts(target=0.5, measured=0.5, pattern="2:4")),
    "hybrid": lambda: sample_report(weights=(*weight_rows(1), *expert_rows(3, 2)[2:])),
    "bare": lambda: Report(command="validate", output="model.onnx", model=ModelFacts(name="model.onnx")),
    "empty encodings": lambda: sample_report(
        size=SizeFacts(onnx_bytes=0, by_encoding={"dense": EncodingBytes(tensors=0, bytes=0, dense_bytes=0)})
    ),
    "zero and endless losses": lambda: sample_report(
        blocks=(
            BlockRow(index=0, loss_before=1e-3, loss_after=0.0),
            BlockRow(index=1, loss_before=math.inf, loss_after=math.nan),
        )
    ),
    "no finite perplexity": lambda: sample_report(perplexity=PerplexityFacts(dense=math.nan, onnx=math.inf)),
}


@functools.cache
def page_of(variant: str) -> str:
    """The page of one variant, rendered once for all tests."""
    return render_html(VARIANTS[variant]())


@pytest.mark.parametrize("variant", VARIANTS)
def test_report_page_renders_every_kind_of_run(variant: str) -> None:
    """Each kind of run gives one well-nested page with a title, under the size that can be forwarded."""
    html = page_of(variant)
    page = read_page(html)
    assert page.tags.count("h1") == 1
    assert page.tags.count("title") == 1
    assert len(html.encode()) < MAX_PAGE_BYTES


@pytest.mark.parametrize("variant", VARIANTS)
def test_report_page_loads_nothing(variant: str) -> None:
    """No script, no link, no font, no address: references stay inside the page."""
    html = page_of(variant)
    page = read_page(html)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert re.findall(r"(?:https?|ftp|file):|//\w|@import|@font-face", html.replace("://", ":")) == []
    for _, name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert (value or "").startswith(("#", "data:image/png;base64,"))
        assert not name.startswith("on")


def test_report_page_is_the_same_each_time() -> None:
    """Equal reports give equal pages, drawings included."""
    assert render_html(sample_report()) == page_of("whole")


def test_report_page_has_no_identifier_twice() -> None:
    """The drawings' identifiers do not clash, and what they refer to is there."""
    html = page_of("whole")
    identifiers = [value for _, name, value in read_page(html).attributes if name == "id"]
    referred = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", html))
    assert len(identifiers) == len(set(identifiers))
    assert {left or right for left, right in referred} <= set(identifiers)


def test_report_page_escapes_every_name() -> None:
    """Markup in any name is shown as text, in the page and in its drawings."""
    blocks = block_rows(2)
    weights = tuple(
        row.model_copy(update={"name": HOSTILE, "encoding": HOSTILE}) for row in weight_rows(1)[:1]
    )
    report = sample_report(
        2,
        blocks=blocks,
        weights=weights,
        output=HOSTILE,
        model=ModelFacts(name=HOSTILE, architecture=HOSTILE, revision=HOSTILE),
        notices=(HOSTILE,),
        device=HOSTILE,
        recovery=HOSTILE,
        recipe={HOSTILE: {HOSTILE: HOSTILE}},
        versions={HOSTILE: HOSTILE},
        timings={HOSTILE: 1.0},
        size=SizeFacts(onnx_bytes=9, by_encoding={HOSTILE: EncodingBytes(tensors=1, bytes=5, dense_bytes=9)}),
        validation=ValidationFacts(
            passed=False,
            provider=HOSTILE,
            first_divergence=HOSTILE,
            checks=(
                CheckRow(
                    name=HOSTILE, status="failed", measured=HOSTILE, limit=HOSTILE, unit=HOSTILE, why=HOSTILE
                ),
            ),
        ),
    )
    page = read_page(render_html(report))
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert HOSTILE in " ".join(page.text)


def test_report_page_says_whose_shape_it_shows() -> None:
    """The graph stores other layouts than PyTorch, so the column names PyTorch."""
    texts = read_page(page_of("whole")).text
    assert "PyTorch shape" in texts
    assert "Shape" not in texts


def test_report_page_draws_names_in_any_script() -> None:
    """Names that matplotlib's own font cannot draw raise no warning and stay whole."""
    weights = tuple(row.model_copy(update={"name": "混合.専門家"}) for row in weight_rows(1)[:1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "専門家" in render_html(sample_report(weights=weights))


@pytest.mark.parametrize(
    ("variant", "word"), [("whole", "PASSED"), ("failed", "FAILED"), ("not validated", "NOT VALIDATED")]
)
def test_report_page_puts_the_verdict_first(variant: str, word: str) -> None:
    """The verdict stands in the page's title and before everything else in its body."""
    html = page_of(variant)
    assert re.search(rf"<title>{word}: Llama-3.2-1B", html)
    body = html.partition("<body>")[2]
    assert 0 < body.index(word) < body.index("<svg")


def test_report_page_names_failed_and_skipped_checks_at_the_top() -> None:
    """Whoever reads the first lines learns what failed, by how much, where, and what was not checked."""
    head = words_of("<header" + page_of("failed").partition("<header")[2].partition("<dl")[0])
    assert "1 of 10 checks failed on CUDAExecutionProvider. Skipped: pattern." in head
    assert "parity-decode : measured NaN max |Δlogit|, limit 0.002; block 11 differs" in head
    assert "first divergence : block 11" in head


def test_report_page_says_what_sparse_files_do_not_buy() -> None:
    """Every page states that stock ONNX Runtime expands sparse initializers."""
    for variant in VARIANTS:
        assert "Smaller on disk, not faster" in words_of(page_of(variant))


def test_report_page_shows_the_measured_numbers() -> None:
    """The key figures carry units and what they compare with."""
    words = words_of(page_of("whole"))
    for figure in (
        "60.0 %",
        "12.84 dense 9.761 (+31.6 %)",
        "85.6 % from pruned only to dense, by EBFT and KL finish",
        "3.48 GiB",
    ):
        assert figure in words
    assert "141 windows of 2 048 tokens, without overlap" in words


def test_report_page_shows_the_end_to_end_stage() -> None:
    """Held-out and calibration losses, step, rate and weights of a stage stand in its row; trials below."""
    words = words_of(page_of("whole"))
    assert "finish kl kl 0.4021 → 0.3187 0.3644 → 0.2511 160 of 160 1e−4 389 100 000 8 min 32 s" in words
    assert "The learning rate 1e−4 of the finish was chosen on held-out windows from" in words


def test_report_page_says_when_an_end_to_end_stage_failed() -> None:
    """A stage that diverged, or left the model as it was, is named in words."""
    (row,) = sample_report().finetuning
    kept = row.model_copy(update={"best_step": 0, "diverged": True, "tried": ()})
    words = words_of(render_html(sample_report(finetuning=(kept,))))
    assert "The finish diverged and ended early" in words
    assert "No step of the finish made the model better" in words


def test_report_page_counts_each_second_once() -> None:
    """The time at the top adds up stages, not the parts of stages as well."""
    report = sample_report(timings={"blocks": 40.0, "validate": 20.0, "validate: parity": 15.0})
    assert "Time 1 min 0 s" in words_of(render_html(report))


def test_report_page_lists_a_checks_further_figures() -> None:
    """What a check measured beside its gate, such as top-1 agreement, stands in its row."""
    assert "top1_agreement 1 tokens 512" in words_of(page_of("whole"))


def test_report_page_describes_each_drawing_in_words() -> None:
    """Each of the four drawings has a label that says what it shows, numbers included."""
    page = read_page(page_of("whole"))
    labels = [value or "" for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(labels) == 4
    assert any("pruned only 31.20" in label for label in labels)


def test_report_page_without_recovery_says_why_losses_are_absent() -> None:
    """With recovery none there is no loss plot but a sentence, and no share of a gap closed."""
    html = page_of("no recovery")
    assert "were not repaired (recovery: none)" in words_of(html)
    assert "Loss by block" not in html
    assert "Gap closed" not in html


def test_report_page_averages_experts_by_parameter() -> None:
    """128 experts of 48 blocks become one row for each parameter, and the page says so."""
    words = words_of(page_of("128 experts"))
    assert "mean over all experts" in words
    assert "mlp.experts.down_proj 6 144" in words


def test_report_page_knows_dark_phone_and_paper() -> None:
    """The style sheet answers to dark screens, narrow screens and print."""
    html = page_of("whole")
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    for query in ("(prefers-color-scheme: dark)", "(max-width: 760px)", "@media print"):
        assert query in html


def test_report_page_defines_every_colour_it_uses() -> None:
    """Each CSS variable that page or drawing refers to has a light value, and no stand-in colour is left."""
    html = page_of("whole")
    assert set(re.findall(r"var\((--[a-z-]+)\)", html)) <= set(re.findall(r"(--[a-z-]+):", html))
    assert re.findall(r"#(0[1-9])\1\1\b", html) == []


def test_report_drawings_ignore_the_users_matplotlib_settings() -> None:
    """A user's own matplotlib settings change nothing, and are left as they were."""
    import matplotlib

    expected = page_of("whole")
    with matplotlib.rc_context({"font.size": 30, "text.color": "red", "svg.fonttype": "path"}):
        assert render_html(sample_report()) == expected
        assert matplotlib.rcParams["font.size"] == 30


def test_report_is_written_as_json_and_page(tmp_path: Path) -> None:
    """Both files are written, and an existing one is replaced."""
    json_path, html_path = tmp_path / "sparse.report.json", tmp_path / "sparse.report.html"
    html_path.write_text("old", encoding="utf-8")
    write_report(sample_report(), json_path, html_path)
    assert json_path.read_bytes() == sample_report().to_json().encode()
    assert html_path.read_text(encoding="utf-8") == page_of("whole")


def test_report_sample_is_complete() -> None:
    """The sample fills every field, so that the tests above see all of the page."""
    assert set(fields()) | {"schema_version", "statement"} == set(Report.model_fields)


def test_report_load_says_what_it_cost() -> None:
    """The page tells seconds and memory of the load, and nothing where the file was not loaded."""
    page = render_html(sample_report(4))
    assert "Loaded by ONNX Runtime in 1.25 s, 2.00 GiB resident." in page
    assert "Loaded by ONNX Runtime" not in render_html(sample_report(4, load=LoadFacts()))
