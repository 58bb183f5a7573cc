"""Options that several commands share, and the recipe key that each of them sets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from compressor.cli.sections import SectionedOption
from compressor.cli.values import bytes_of, device, learning_rate, limit, sparsity
from compressor.errors import UsageError

Command = TypeVar("Command", bound=Callable[..., Any])
Decorator = Callable[[Any], Any]


@dataclass(frozen=True)
class Setting:
    """A flag that sets one key of the recipe."""

    flag: str
    key: str
    type: Any  # a click type, or a function of the text
    help: str
    metavar: str | None = None
    multiple: bool = False
    is_flag: bool = False  # without a value: giving it sets the key to true

    @property
    def parameter(self) -> str:
        """The name of the command function's argument."""
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Section:
    """Flags under one heading of the help."""

    heading: str
    settings: tuple[Setting, ...]


_TEXT = "python-docs, a .txt or .raw file (one text), a .jsonl or .parquet file (documents), or a dataset id."

PRUNING = Section(
    "Pruning",
    (
        Setting(
            "--sparsity", "pruning.sparsity", sparsity, "Share of weights to prune; 0.5 by default.", "SHARE"
        ),
        Setting(
            "--pattern", "pruning.pattern", str, "Keep N of each M consecutive inputs, such as 2:4.", "N:M"
        ),
        Setting(
            "--pruner",
            "pruning.method",
            click.Choice(["magnitude", "wanda", "sparsegpt", "admm", "alps", "flap"]),
            "How the weights that go are chosen; flap takes out whole heads and neurons.",
        ),
        Setting(
            "--allocation",
            "pruning.allocation",
            click.Choice(["uniform", "owl", "linear"]),
            "How the sparsity is shared out over blocks; flap has its own way.",
        ),
        Setting(
            "--uniform",
            "pruning.flap.uniform",
            bool,
            "flap: the same widths in every layer and no new biases, so that stock transformers loads the model.",
            is_flag=True,
        ),
        Setting(
            "--ignore",
            "pruning.ignore",
            str,
            "Weights to leave dense besides lm_head and embeddings: a glob, or re: and a regular expression. "
            "Repeatable.",
            "PATTERN",
            multiple=True,
        ),
    ),
)
RECOVERY = Section(
    "Recovery",
    (
        Setting(
            "--recovery",
            "recovery.method",
            click.Choice(
                ["ebft", "dsnot", "ebft-mask", "none", "lora", "masked-lora", "spp", "squarehead", "norms"]
            ),
            "How kept weights are repaired: block by block, or (from lora on) all blocks together.",
        ),
        Setting("--epochs", "recovery.epochs", int, "Passes over the calibration windows per block."),
        Setting(
            "--lr", "recovery.lr", learning_rate, "Learning rate; auto tries a few on first blocks.", "RATE"
        ),
        Setting("--batch-size", "recovery.batch_size", int, "Windows per optimiser step."),
        Setting(
            "--finish",
            "finish.method",
            click.Choice(["none", "kl", "auto"]),
            "Tune all blocks together towards the dense model's logits afterwards; auto: if memory allows.",
        ),
    ),
)
CALIBRATION = Section(
    "Calibration",
    (
        Setting(
            "--calibration", "calibration.source", str, f"What pruning and repair see: {_TEXT}", "SOURCE"
        ),
        Setting(
            "--dataset-config", "calibration.dataset_config", str, "Configuration of the dataset.", "NAME"
        ),
        Setting("--split", "calibration.split", str, "Split of the dataset.", "NAME"),
        Setting(
            "--text-column", "calibration.text_column", str, "Column of text in files or dataset.", "NAME"
        ),
        Setting("--num-calibration-samples", "calibration.num_samples", int, "Calibration windows."),
        Setting(
            "--seqlen",
            "calibration.seqlen",
            int,
            "Tokens per window; by default min(2048, the model's limit).",
        ),
    ),
)
EVALUATION = Section(
    "Evaluation",
    (
        Setting(
            "--eval-data", "evaluation.source", str, f"What perplexity is measured on: {_TEXT}", "SOURCE"
        ),
        Setting("--max-eval-windows", "evaluation.max_windows", int, "Measure on at most this many windows."),
    ),
)
EVALUATION_DATASET = Section(
    "Evaluation",
    (
        Setting(
            "--dataset-config", "evaluation.dataset_config", str, "Configuration of the dataset.", "NAME"
        ),
        Setting("--split", "evaluation.split", str, "Split of the dataset.", "NAME"),
        Setting(
            "--text-column", "evaluation.text_column", str, "Column of text in files or dataset.", "NAME"
        ),
    ),
)
EXPORT = Section(
    "Export",
    (
        Setting(
            "--dtype",
            "export.dtype",
            click.Choice(["auto", "float32", "float16", "bfloat16", "int8", "int4"]),
            "Type of the exported weights; auto keeps the checkpoint's, int8 and int4 are quantised and packed.",
        ),
        Setting(
            "--encoding",
            "export.encoding",
            click.Choice(["auto", "dense", "sparse", "packed"]),
            "How weights are stored; auto goes sparse where that saves 10 %, packed is for blockpress-runtime.",
        ),
        Setting(
            "--activation-bits",
            "export.activation_bits",
            int,
            "8 rounds what enters int8 and int4 weights, row by row (their default); 32 leaves it.",
            "8|32",
        ),
        Setting("--opset", "export.opset", int, "ONNX opset."),
    ),
)
GATES = Section(
    "Gates (a failed one ends with exit code 4)",
    (
        Setting(
            "--max-abs-error",
            "gates.max_abs_error",
            limit,
            "Largest difference of a logit from PyTorch's.",
            "NUMBER",
        ),
        Setting(
            "--min-top1-agreement",
            "gates.min_top1_agreement",
            limit,
            "Least share of tokens whose best guess is PyTorch's.",
            "SHARE",
        ),
        Setting(
            "--max-onnx-ppl-drift",
            "gates.max_onnx_ppl_drift",
            limit,
            "Largest relative difference of ONNX perplexity from PyTorch's.",
            "SHARE",
        ),
        Setting(
            "--max-ppl-increase",
            "gates.max_ppl_increase",
            limit,
            "Largest relative increase of perplexity over the dense model, such as 15%; no gate by default.",
            "SHARE",
        ),
        Setting(
            "--min-sparsity", "gates.min_sparsity", limit, "Least share of zeros in pruned weights.", "SHARE"
        ),
    ),
)


def settings(*sections: Section) -> Callable[[Command], Command]:
    """A decorator that adds the flags of ``sections``; the function gets what was set as ``overrides``."""
    rows = [(section.heading, row) for section in sections for row in section.settings]

    def decorate(function: Command) -> Command:
        @functools.wraps(function)
        def collected(**options: Any) -> Any:
            overrides: dict[str, Any] = {}
            for _, row in rows:
                value = options.pop(row.parameter)
                if value is not None and value != ():
                    overrides[row.key] = list(value) if row.multiple else value
            return function(overrides=overrides, **options)

        result: Command = _stack(*(_flag(heading, row) for heading, row in rows))(collected)
        return result

    return decorate


def _flag(heading: str, row: Setting) -> Decorator:
    value: dict[str, Any] = {"type": row.type, "multiple": row.multiple, "metavar": row.metavar}
    if row.is_flag:
        value = {"is_flag": True, "default": None}
    return click.option(row.flag, row.parameter, help=row.help, cls=SectionedOption, section=heading, **value)


def flag(section: str, *declarations: str, **attributes: Any) -> Decorator:
    """A click option under a heading."""
    return click.option(*declarations, cls=SectionedOption, section=section, **attributes)


def _stack(*decorators: Decorator) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


output_options = _stack(
    flag(
        "Output",
        "--out",
        required=True,
        metavar="PATH",
        help="A path ending in .onnx is a file, else a folder.",
    ),
    flag("Output", "--force", is_flag=True, help="Replace an existing output."),
)
resume_option = flag(
    "Output",
    "--resume",
    type=click.Choice(["auto", "required", "never"]),
    default="auto",
    show_default=True,
    help="auto goes on where an earlier run was stopped or killed, required refuses to begin anew, never begins anew.",
)
recipe_options = _stack(
    flag(
        "Recipe", "--recipe", metavar="FILE|NAME", help="A YAML file, or a built-in one: default, ebft-paper."
    ),
    flag(
        "Recipe",
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set any key of the recipe, such as recovery.loss=normalized. Repeatable.",
    ),
    flag("Recipe", "--seed", type=int, help="Seed of all that is drawn at random."),
)
model_options = _stack(
    flag("Model", "--revision", metavar="REV", help="Branch, tag or commit of a hub model."),
    flag(
        "Model",
        "--trust-remote-code",
        is_flag=True,
        help="Run code that comes with the model; it is reported.",
    ),
)
device_option = flag(
    "Model",
    "--device",
    type=device,
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto, cpu, cuda or cuda:N.",
)
activation_memory_option = flag(
    "Model",
    "--activation-memory",
    type=bytes_of,
    metavar="SIZE",
    help="Memory that hidden states of all windows may take; more lies on the disk. No limit by default.",
)
no_validate_option = flag(
    "Validation", "--no-validate", is_flag=True, help="Do not validate; the verdict is null."
)
validation_options = _stack(
    flag(
        "Validation",
        "--provider",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Execution provider.",
    ),
    flag(
        "Validation",
        "--require",
        multiple=True,
        metavar="CHECK",
        help="Fail when CHECK is skipped. Repeatable.",
    ),
)
talk_options = _stack(
    flag("Other", "--json", "as_json", is_flag=True, help="One JSON document on stdout, errors included."),
    flag(
        "Other",
        "-v",
        "--verbose",
        "verbosity",
        count=True,
        help="What libraries warn of, and on a terminal a line per block; -vv: all that libraries log.",
    ),
    flag("Other", "-q", "--quiet", is_flag=True, help="Nothing but the verdict and errors."),
)


def recipe_overrides(
    assignments: tuple[str, ...], flags: Mapping[str, Any], seed: int | None = None
) -> dict[str, Any]:
    """Dotted key to value from ``--set key=value`` texts and flags; the values of ``--set`` are YAML.

    Raises:
        UsageError: A text is no assignment, its value is no YAML, its key is unknown or set twice.
    """
    import yaml

    from compressor.recipe_file import check_key

    chosen: dict[str, Any] = dict(flags)
    if seed is not None:
        chosen["seed"] = seed
    for text in assignments:
        key, sign, value = (part.strip() for part in text.partition("="))
        if not sign or not key:
            raise UsageError(
                "E-SET-SYNTAX", f"--set needs KEY=VALUE, got {text!r}", "write --set recovery.epochs=5"
            )
        check_key(key, "--set")
        if key in chosen:
            raise UsageError(
                "E-SET-TWICE", f"{key} is set twice", "give it once, by --set or by its own option"
            )
        try:
            chosen[key] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that there is not
            raise UsageError(
                "E-SET-SYNTAX", f"--set {key}: {value!r} is no plain value", "quote it"
            ) from None
    return chosen
