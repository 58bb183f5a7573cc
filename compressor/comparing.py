"""A comparison, from a model and a grid to a table; reads like a table of contents.

Nothing here prints, exits or sets up logging: progress goes to a callback, the result comes back as an object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compressor.calibration.tokens import refuse_tokenizer_beyond
from compressor.comparison.cells import cells_of
from compressor.comparison.csv_rows import csv_text
from compressor.comparison.fingerprint import Surroundings
from compressor.comparison.folder import ResultsFolder, reserve_folder
from compressor.comparison.grid import DEFAULT_PRESET, Grid, Masks, read_preset
from compressor.comparison.making import Making
from compressor.comparison.markdown import markdown_text
from compressor.comparison.page import render_page
from compressor.comparison.results import CellRow, Comparison
from compressor.comparison.schedule import ModelChoice, Planned, Requests, planned_cells
from compressor.comparison.scoring import Scoring
from compressor.comparison.task_set import task_set
from compressor.comparison.texts import GridTexts
from compressor.comparison.workers import OwnProcess, ThisProcess
from compressor.devices import dtype_name, resolve_device
from compressor.errors import UsageError
from compressor.evaluation import window_length
from compressor.models.checkpoint import Checkpoint, open_checkpoint
from compressor.models.source import max_seqlen
from compressor.progress import Notice, Progress, StageStarted, TextReady, silent
from compressor.recipe import EvaluationRecipe, Recipe
from compressor.recipe_file import read_recipe
from compressor.report.schema import ModelFacts, portable_name
from compressor.reporting import installed_versions
from compressor.task_options import check_task_options

DEFAULT_SHARED_BYTES = 20 * 2**30


@dataclass(frozen=True)
class ComparisonResult:
    """What a comparison left behind.

    Attributes:
        comparison: All cells and what they have in common; its ``tree()`` is what ``compare.json`` holds.
        folder: Where ``compare.json``, ``.csv``, ``.md`` and ``.html`` lie.
    """

    comparison: Comparison
    folder: Path

    @property
    def failed(self) -> tuple[CellRow, ...]:
        """The cells that came to no end."""
        return tuple(cell for cell in self.comparison.cells if cell.failure is not None)


def compare(
    model: str | Path,
    out: str | Path,
    grid: Grid | None = None,
    *,
    preset: str | None = None,
    masks: Masks | None = None,
    recipe: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    evaluations: Sequence[EvaluationRecipe] = (),
    tasks: Sequence[str] = (),
    tasks_folder: str | Path | None = None,
    tasks_limit: int | None = None,
    device: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    force: bool = False,
    isolate: bool = True,
    shared_bytes: int = DEFAULT_SHARED_BYTES,
    stop: Callable[[], bool] = lambda: False,
    progress: Progress = silent,
) -> ComparisonResult:
    """Measure every cell of a grid on ``model`` and write the tables to the folder ``out``.

    A second call goes on where the first one ended; a cell whose settings, texts, model or versions have changed is
    made again, and so is one that failed, or whose model was not scored on these tasks.

    Args:
        model: A local Hugging Face folder or a hub id, safetensors only.
        out: A new folder, or that of an earlier comparison.
        grid: What is compared; see ``compressor.comparison.grid``.
        preset: A built-in grid instead: ``quick`` or ``paper``. Without either, ``quick``.
        masks: ``shared`` or ``own``, in the place of what the grid says.
        recipe: File or name of the recipe that cells start from; None takes the grid's, else ``default``.
        overrides: Dotted recipe keys to values, for all cells.
        evaluations: Texts that perplexity is measured on; none takes the grid's, else the recipe's.
        tasks: Zero-shot tasks of lm-eval to run on the dense model and on what each cell ends with.
        tasks_folder: A folder of local tasks; code that their YAML files name is run.
        tasks_limit: Documents per task; None: all.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:i``.
        revision: Branch, tag or commit of a hub model.
        trust_remote_code: Allow code that comes with the checkpoint.
        force: Forget an earlier comparison in ``out``.
        isolate: Make each cell in a process of its own, so that peak memory is the cell's. False makes them here:
            quicker on small models, and without peak memory.
        shared_bytes: What the dense model's hidden states may take on the disk; 0 computes them in every cell.
        stop: Asked between blocks; true ends the comparison with StoppedSafely, finished cells are kept.
        progress: Receives events (compressor.progress).

    Raises:
        ReportedError: Bad input, or an output that cannot be written. A cell that fails is recorded instead.
    """
    check_task_options(tasks, tasks_folder, tasks_limit)
    known = grid if grid is not None else read_preset(preset or DEFAULT_PRESET)
    known = known if masks is None else known.model_copy(update={"masks": masks})
    cells = cells_of(known, recipe, overrides or {}, preset=grid is None)
    source = recipe if recipe is not None else known.recipe
    base = read_recipe(source, {**known.settings, **(overrides or {})})
    _refuse_quantized([base, *(cell.recipe for cell in cells if cell.recipe is not None)])
    with reserve_folder(out, force, model=model) as folder:
        progress(StageStarted("open", str(model)))
        checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
        texts = _texts(checkpoint, base, evaluations or known.evaluations, progress)
        where = resolve_device(device)
        versions = installed_versions()
        common = Surroundings(checkpoint.identity, texts.evaluation_digests(), where.type, versions)
        planned = planned_cells(cells, texts, common)
        choice = ModelChoice(str(model), revision, trust_remote_code, device)
        requests = Requests(folder, texts, common, choice, shared_bytes)
        worker = OwnProcess() if isolate else ThisProcess()
        tokens = window_length(max_seqlen(checkpoint.config))
        asked = task_set(tasks, tasks_folder, tasks_limit, max_tokens=tokens)
        scoring = None if asked is None else Scoring(asked, choice, common, folder, worker, stop)
        making = Making(planned, requests, folder, worker, stop, progress, scoring)
        if making.found:
            progress(Notice(f"{making.found} of {len(planned)} cells were measured before"))

        def result() -> Comparison:
            return Comparison(
                model=_model_facts(checkpoint),
                device=str(where),
                texts={name: found.facts() for name, found in texts.evaluations.items()},
                calibration=texts.base.facts(),
                isolated=isolate,
                cells=tuple(_row(one, making, scoring) for one in planned),
                recipe=_portable(base),
                tasks=None if scoring is None else scoring.facts(),
                versions=versions,
                notices=(*checkpoint.notices, *texts.base.notices),
            )

        try:
            making.run(lambda: _write_figures(folder, result()))
        except Exception:  # a stop, or a model that cannot be opened; a second signal waits for no drawings
            _write_all(folder, result())
            raise
        finally:
            worker.close()
        comparison = result()
        _write_all(folder, comparison)
        folder.forget_shared()
        return ComparisonResult(comparison, folder.root)


def _texts(
    checkpoint: Checkpoint, base: Recipe, evaluations: Sequence[EvaluationRecipe], progress: Progress
) -> GridTexts:
    rows = int(checkpoint.config.vocab_size)
    tokenizer = checkpoint.load_tokenizer()
    refuse_tokenizer_beyond(tokenizer, rows)
    texts = GridTexts(base, evaluations, tokenizer, max_seqlen(checkpoint.config), rows)
    calibration = texts.base
    for message in (*checkpoint.notices, *calibration.notices):
        progress(Notice(message))
    windows, spec = calibration.windows, calibration.text.spec
    progress(TextReady("calibration", spec, len(windows.ids), calibration.seqlen, len(windows.heldout)))
    for name, evaluation in texts.evaluations.items():
        progress(TextReady("evaluation", name, len(evaluation.ids), calibration.seqlen))
    return texts


def _row(one: Planned, making: Making, scoring: Scoring | None) -> CellRow:
    cell, fingerprint = one.cell, one.fingerprint or ""
    failure = one.failure or making.failures.get(fingerprint)
    told = failure is not None or making.is_done(one)  # without its scores a cell is not made yet
    return CellRow(
        table=cell.table,
        pruner=cell.pruner,
        recovery=cell.recovery,
        target=str(cell.target),
        target_sparsity=cell.target.sparsity,
        variant=cell.variant,
        settings=dict(cell.settings),
        masks=cell.masks,
        fingerprint=one.fingerprint,
        figures=making.figures.get(fingerprint) if told else None,
        scores=scoring.of(fingerprint) if scoring is not None else None,
        failure=failure,
    )


def _model_facts(checkpoint: Checkpoint) -> ModelFacts:
    return ModelFacts(
        name=checkpoint.name,
        architecture=checkpoint.architecture.label,
        revision=checkpoint.revision,
        checkpoint_dtype=dtype_name(checkpoint.dtype),
    )


def _portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe without this machine's folders, and without what the grid varies or a comparison leaves out."""
    tree = recipe.model_dump(mode="json")
    for section in ("calibration", "evaluation"):
        tree[section]["source"] = portable_name(tree[section]["source"])
    for key in ("method", "sparsity", "pattern"):
        tree["pruning"].pop(key)
    tree["recovery"].pop("method")
    return {name: part for name, part in tree.items() if name != "gates"}


def _write_figures(folder: ResultsFolder, comparison: Comparison) -> None:
    folder.write("compare.json", comparison.to_json())
    folder.write("compare.csv", csv_text(comparison))


def _write_all(folder: ResultsFolder, comparison: Comparison) -> None:
    _write_figures(folder, comparison)
    folder.write("compare.md", markdown_text(comparison))
    folder.write("compare.html", render_page(comparison))


def _refuse_quantized(recipes: Sequence[Recipe]) -> None:
    """Do nothing where no recipe quantises: a cell measures what pruning and repair do, before any export.

    Raises:
        UsageError: E-COMPARE-QUANTIZED.
    """
    for recipe in recipes:
        if recipe.export.weight_bits is not None:
            raise UsageError(
                "E-COMPARE-QUANTIZED",
                f"a comparison measures float models, the type is {recipe.export.dtype}",
                "leave --dtype out; compress run --dtype measures one quantised model",
            )
