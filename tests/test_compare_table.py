"""What is written of a comparison: the tables, CSV, JSON, Markdown and the page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Callable

import pytest
from compare_samples import DENSE, cell, figures, sample_comparison, scored_comparison

from compressor.comparison.csv_rows import CSV_COLUMNS, csv_text
from compressor.comparison.markdown import markdown_text
from compressor.comparison.page import render_page
from compressor.comparison.protocol import protocol_lines
from compressor.comparison.results import Comparison, FinishFigures, comparison_from_tree
from compressor.comparison.table import gap_closed, plain_lines, tables_of
from compressor.comparison.task_table import task_tables
from compressor.errors import InputRefused
from compressor.report.schema import LearningRateFacts


def test_compare_csv_has_a_line_for_each_cell_and_text() -> None:
    """Numbers in full; a failed cell has its error and no numbers; an infinite perplexity reads as inf."""
    rows = list(csv.DictReader(io.StringIO(csv_text(sample_comparison()))))
    assert len(rows) == 14
    first = rows[1]
    assert (first["pruner"], first["target"], first["recovery"], first["status"]) == (
        "wanda",
        "0.5",
        "ebft",
        "done",
    )
    assert float(first["perplexity_recovered"]) == 10.0
    assert float(first["method_s"]) == 32.0
    assert float(first["gap_closed"]) == (20.0 - 10.0) / (20.0 - DENSE)
    assert math.isinf(float(rows[12]["perplexity_pruned"]))
    assert (rows[13]["status"], rows[13]["error_id"], rows[13]["perplexity_dense"]) == (
        "failed",
        "E-GRID-METHOD",
        "",
    )


def test_compare_json_reads_back_as_it_was() -> None:
    """The document is strict JSON and comes back equal, infinity included."""
    comparison = sample_comparison()
    text = comparison.to_json()
    assert "Infinity" not in re.sub(r'"nonfinite": \{.*\}', "", text, flags=re.DOTALL)
    tree = json.loads(text)
    assert (tree["schema_version"], tree["cells"][0]["status"], tree["cells"][-1]["status"]) == (
        1,
        "done",
        "failed",
    )
    assert comparison_from_tree(tree) == comparison


def test_compare_json_of_another_schema_is_refused() -> None:
    """A later version's document is refused by its number, a broken one by the place."""
    tree = sample_comparison().tree()
    with pytest.raises(InputRefused, match="schema 2"):
        comparison_from_tree({**tree, "schema_version": 2})
    with pytest.raises(InputRefused, match="validation error"):
        comparison_from_tree({**tree, "device": None})


def test_compare_gap_closed_needs_a_cost() -> None:
    """Where pruning cost nothing, or cost infinity, no share of it can come back."""
    assert gap_closed(figures(20.0, 15.0), "valid.txt") == pytest.approx(5 / (20 - DENSE), rel=1e-12)
    assert gap_closed(figures(DENSE, 9.0), "valid.txt") is None
    assert gap_closed(figures(math.inf, 9.0), "valid.txt") is None


def test_compare_table_marks_the_best_of_each_target() -> None:
    """The lowest perplexity of each target has the star, and columns without content are left out."""
    (table,) = tables_of(sample_comparison())
    starred = [line.split()[:4] for line in plain_lines(table) if line.endswith("*")]
    assert starred == [
        ["50", "%", "sparsegpt", "ebft"],
        ["70", "%", "sparsegpt", "ebft"],
        ["2:4", "sparsegpt", "ebft", "54.00"],
    ]
    assert "device peak" not in table.columns
    assert "finish time" not in table.columns
    narrow = table.narrowed(60)
    assert max(map(len, plain_lines(narrow))) <= 60
    assert narrow.columns[:5] == table.columns[:5]


def test_compare_table_has_columns_for_every_text() -> None:
    """With two texts each one has its own columns, named after it."""
    first, second = figures(20.0, 10.0, recovery_s=1.0), figures(40.0, 30.0, text="other.txt")
    both = first.model_copy(update={"perplexity": {**first.perplexity, **second.perplexity}})
    sample = sample_comparison()
    texts = {**sample.texts, "other.txt": sample.texts["valid.txt"]}
    comparison = sample_comparison(cells=(cell("wanda", "0.5", "ebft", both),), texts=texts)
    (table,) = tables_of(comparison)
    assert "recovered on other.txt" in table.columns
    assert table.rows[0][table.columns.index("recovered on other.txt")] == "30.00"
    assert len(csv_text(comparison).splitlines()) == 3


def test_compare_table_and_csv_show_the_losses_of_the_finish_beside_the_repairs() -> None:
    """Held-out and calibration loss of both stages stand in one row, so that over-fitting of either is seen."""
    finish = FinishFigures(
        method="kl",
        loss="kl",
        heldout_before=0.5,
        heldout=0.3,
        calibration=0.1,
        learning_rate=LearningRateFacts(chosen=0.003),
        best_step=9,
        steps=9,
    )
    found = figures(20.0, 9.9, recovery_s=30.0).model_copy(update={"finish": finish})
    comparison = sample_comparison().model_copy(update={"cells": (cell("wanda", "0.5", "ebft", found),)})
    (table,) = tables_of(comparison)
    row = dict(zip(table.columns, table.rows[0], strict=True))
    assert (row["held-out loss"], row["calibration loss"]) == ("0.1 → 0.02", "0.015")
    assert (row["finish held-out"], row["finish calibration"]) == ("0.5 → 0.3", "0.1")
    (line,) = csv.DictReader(io.StringIO(csv_text(comparison)))
    keys = ("heldout_loss_before", "heldout_loss", "calibration_loss", "learning_rate")
    assert [float(line[f"finish_{key}"]) for key in keys] == [0.5, 0.3, 0.1, 0.003]


def test_compare_markdown_is_a_table_with_its_protocol() -> None:
    """Header, rule and rows have the same number of columns; bars in names are escaped; the protocol follows."""
    text = markdown_text(sample_comparison(cells=(cell("wanda", "0.5", "eb|ft", figures(20.0, 10.0)),)))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) == 1
    assert r"eb\|ft" in rows[2]
    assert "**10.00**" in rows[2]
    assert "64 windows of 256 tokens" in text


def test_compare_tables_say_what_their_variants_set() -> None:
    """Under a table each variant's settings are spelled out, in Markdown and on the page."""
    rate = {"recovery.lr": 2e-4, "recovery.selection": "last"}
    cells = (
        cell("wanda", "0.5", "none", figures(20.0, 20.0)),
        cell("wanda", "0.5", "ebft", figures(20.0, 10.0), variant="published", settings=rate),
    )
    comparison = sample_comparison(cells=cells)
    words = "published: recovery.lr = 0.0002, recovery.selection = last"
    assert tables_of(comparison)[0].settings == (words,)
    assert words in markdown_text(comparison)
    assert words in render_page(comparison)


@pytest.mark.parametrize(("masks", "words"), [("shared", "same pruned model"), ("own", "each cell's own")])
def test_compare_protocol_says_whose_masks(masks: str, words: str) -> None:
    """Whether recoveries start from the same masks is said beside the table."""
    made = cell("wanda", "0.5", "ebft", figures(20.0, 10.0)).model_copy(update={"masks": masks})
    assert words in protocol_lines(sample_comparison(cells=(made,)))[-1]


def test_compare_page_is_whole_and_needs_no_network() -> None:
    """One file with both kinds of drawing, the table, the failure and the protocol; nothing is fetched."""
    page = render_page(sample_comparison())
    assert page.count('class="plot sparsity-') == 2
    assert page.count('class="plot time-') == 3
    for words in (
        "13 of 14 cells measured, 1 failed",
        "E-GRID-METHOD",
        "Perplexity over time spent",
        "stride 256",
    ):
        assert words in page
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "<script" not in page
    assert render_page(sample_comparison()) == page


def test_compare_page_escapes_names() -> None:
    """A model, text or variant named like markup stays text."""
    evil = "<img src=x onerror=alert(1)>"
    made = cell("wanda", "0.5", "ebft", figures(20.0, 10.0, recovery_s=1.0), variant=evil)
    sample = sample_comparison()
    model = sample.model.model_copy(update={"name": evil})
    assert "<img" not in render_page(sample_comparison(cells=(made,), model=model))


def test_compare_page_shows_what_cells_had_to_say() -> None:
    """A notice of a cell, such as zeros that a merge has filled, stands on the page under the cell's name."""
    filled = figures(20.0, 10.0).model_copy(update={"notices": ("lora: 12 zeros were filled",)})
    page = render_page(sample_comparison(cells=(cell("wanda", "0.5", "lora", filled),)))
    assert "<strong>wanda 50 % lora</strong>: lora: 12 zeros were filled" in page
    assert "What cells had to say" not in render_page(sample_comparison())


def test_compare_page_without_a_finished_cell_has_no_drawings() -> None:
    """A grid that was stopped at once still gives a page that says so."""
    page = render_page(sample_comparison(cells=(cell("wanda", "0.5", "none"),)))
    assert "0 of 1 cells measured, 1 not made yet" in page
    assert "Perplexity over sparsity" not in page


def test_compare_task_table_has_the_dense_model_first_and_the_documents_last() -> None:
    """Scores with their errors and directions; a cell without says why; nothing where no task was run."""
    (table,) = task_tables(scored_comparison())
    assert table.columns == ("target", "pruner", "recovery", "piqa acc ↑", "text word_perplexity ↓")
    assert table.rows == (
        ("dense model", "", "", "0.7512 ± 0.0101", "12.35"),
        ("50 %", "wanda", "none", "0.7123 ± 0.0101", "∞"),
        ("50 %", "wanda", "ebft", "E-OUT-OF-MEMORY", ""),
        ("2:4", "wanda", "none", "not made yet", ""),
        ("documents", "", "", "1\u202f838", "3"),
    )
    assert task_tables(sample_comparison()) == []


def test_compare_task_table_is_cut_into_pieces_for_a_narrow_terminal() -> None:
    """Each piece says what its rows are, and together they have every score."""
    (table,) = task_tables(scored_comparison())
    assert table.parts(200) == [table]
    first, second = table.parts(60)
    assert max(map(len, plain_lines(first))) <= 60
    assert (first.columns[3:], second.columns[3:]) == (table.columns[3:4], table.columns[4:])
    assert first.columns[:3] == second.columns[:3] == table.columns[:3]


def test_compare_csv_has_columns_for_every_task_and_stays_rectangular() -> None:
    """Score, standard error, documents and the dense model's score; empty where there is none."""
    lines = list(csv.reader(io.StringIO(csv_text(scored_comparison()))))
    assert tuple(lines[0][: len(CSV_COLUMNS)]) == CSV_COLUMNS
    assert lines[0][-8:-4] == ["piqa_acc", "piqa_acc_stderr", "piqa_acc_documents", "piqa_acc_dense"]
    assert {len(line) for line in lines} == {len(CSV_COLUMNS) + 8}
    assert lines[1][-8:] == ["0.7123", "0.0101", "1838", "0.7512", "inf", "", "3", "12.345"]
    assert lines[2][-8:-4] == ["", "", "", "0.7512"]
    assert tuple(csv_text(sample_comparison()).splitlines()[0].split(",")) == CSV_COLUMNS


def test_compare_json_reads_back_with_scores() -> None:
    """An endless score is strict JSON, too, and comes back as it was."""
    comparison = scored_comparison()
    tree = json.loads(comparison.to_json())
    assert [row["status"] for row in tree["cells"]] == ["done", "failed", "open"]
    assert comparison_from_tree(tree) == comparison


@pytest.mark.parametrize("render", [markdown_text, render_page], ids=["markdown", "page"])
def test_compare_files_show_the_tasks_and_how_they_were_run(render: Callable[[Comparison], str]) -> None:
    """A table of its own and the protocol: lm-eval's version, zero-shot, the limit; nothing of it without tasks."""
    text = render(scored_comparison())
    for words in (
        "Zero-shot tasks",
        "0.7123 ± 0.0101",
        "tasks piqa, text of the folder mine by lm-eval 0.4.13: zero-shot, no chat template, "
        "the first 2\u202f000 documents of each",
    ):
        assert words in text
    assert "ero-shot" not in render(sample_comparison())
