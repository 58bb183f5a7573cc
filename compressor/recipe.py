"""The recipe: everything that decides what a run computes. YAML in and out; unknown keys are errors."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from compressor.errors import UsageError

BUILT_IN_FOLDER = Path(__file__).parent / "recipes"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Share = Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FlapRecipe(_Section):
    """Structured pruning: heads and neurons (arXiv 2312.11983), as published."""

    metric: Literal["WIFV", "IFV", "WIFN"] = "WIFV"
    # layers uniform or adaptive (UL, AL); heads against neurons in proportion, by score, or as given (UM, AM, MM)
    structure: Literal["AL-AM", "AL-MM", "UL-UM", "UL-MM"] = "AL-AM"
    remove_heads: Annotated[int, Field(ge=0, le=10_000_000)] = 8  # over all layers; AL-MM and UL-MM only
    bias_compensation: bool = True
    uniform: bool = (
        False  # as many heads and neurons in every layer, no new biases: loads in stock transformers
    )


class OwlRecipe(_Section):
    """Layer sparsities by outliers (arXiv 2310.05175), as published."""

    lmbda: NonNegative = 0.08  # λ: no two blocks' sparsities differ by more than 2 λ
    m: Positive = 5.0  # a score above m times the block's mean is an outlier


class LinearRecipe(_Section):
    """Layer sparsities that rise, or fall, from block to block in equal steps (arXiv 2502.14770)."""

    slope: Annotated[float, Field(gt=-1, lt=1, allow_inf_nan=False)] = 0.01  # from one block to the next


class AdmmRecipe(_Section):
    """ADMM pruning, as published (arXiv 2401.02938)."""

    damping: Positive = 0.1  # share of the mean diagonal of the scaled Hessian added to it
    penalty: Positive = 1.0  # ρ
    iterations: Count = 20
    mask_iterations: Count = 15  # the first of them, in which the mask grows to the sparsity

    @model_validator(mode="after")
    def _mask_is_finished(self) -> AdmmRecipe:
        if self.mask_iterations > self.iterations:
            raise ValueError("mask_iterations must be at most iterations")
        return self


class AlpsRecipe(_Section):
    """ALPS, as published (arXiv 2406.07831)."""

    damping: Positive = 0.01  # share of the mean Hessian diagonal added to it
    penalty: Positive = 0.1  # ρ at first
    max_iterations: Count = 300
    cg_iterations: Count = 10  # conjugate gradients on the support that was found


class PruningRecipe(_Section):
    """Which weights become zero.

    ``sparsity`` and ``pattern`` exclude each other; the run needs one of them.
    """

    method: Literal["magnitude", "wanda", "sparsegpt", "admm", "alps", "flap"] = "wanda"
    sparsity: Share | None = None
    pattern: Annotated[str, Field(pattern=r"^\s*\d{1,6}:\d{1,6}\s*$")] | None = None
    update_weights: bool = True  # of SparseGPT, ADMM and ALPS; the others have no update
    ignore: tuple[str, ...] = ()  # beyond lm_head and embeddings, which are never pruned
    column_block: Count = 128  # SparseGPT: columns per saliency block
    damping: Positive = 0.01  # SparseGPT: share of the mean Hessian diagonal added to it
    admm: AdmmRecipe = AdmmRecipe()
    alps: AlpsRecipe = AlpsRecipe()
    flap: FlapRecipe = FlapRecipe()
    allocation: Literal["uniform", "owl", "linear"] = (
        "uniform"  # of the sparsity to blocks, where zeros are free
    )
    owl: OwlRecipe = OwlRecipe()
    linear: LinearRecipe = LinearRecipe()

    @model_validator(mode="after")
    def _one_target(self) -> PruningRecipe:
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("sparsity and pattern exclude each other")
        return self


class LearningRateTrials(_Section):
    """Short trials on held-out windows that choose the learning rate."""

    candidates: tuple[Positive, ...] = Field(default=(3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), min_length=1)
    epochs: Count = 2


class LearningRateProbe(LearningRateTrials):
    """Trials on each of the first blocks."""

    blocks: Count = 2


class TrainingRecipe(_Section):
    """How weights are trained, whatever the method."""

    epochs: Count = 10
    batch_size: Count = 8  # windows per optimiser step
    lr: Positive | Literal["auto"] = "auto"
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    weight_decay: NonNegative = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05  # share of all steps
    max_grad_norm: Positive | None = 1.0
    selection: Literal["heldout", "last"] = (
        "heldout"  # which step's weights are kept; heldout includes step 0
    )


class DsnotRecipe(_Section):
    """Mask tuning without training (arXiv 2310.08915), as published."""

    max_cycle_time: Count = 50  # swaps per row, at most
    update_threshold: NonNegative = 0.1  # of a row's expected error, summed over a window's tokens
    pow_of_var_regrowing: NonNegative = 1.0  # weights that grow back are compared in units of variance ^ this
    without_same_sign: bool = True  # a row's error may change its sign; for N:M it never may
    skip: tuple[str, ...] = ("*.mlp", "*.fc1", "*.fc2")  # what keeps the pruner's mask: globs, as in ignore


class EbftMaskRecipe(_Section):
    """The mask tuning that EBFT's paper compares with (arXiv 2402.12419); all else as for ebft."""

    lr: Positive = 2e-2  # of the scores, where recovery.lr is auto


class LoraRecipe(_Section):
    """Plain LoRA, which fills zeros as it is merged; rank to lr as in Wanda's lora_ft (arXiv 2306.11695)."""

    rank: Count = 8
    alpha: Positive = 16.0  # the product B A is multiplied by alpha / rank
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    targets: Literal["qv", "all"] = "qv"  # query and value projections, or every matrix that was pruned
    lr: Positive | Literal["auto"] = 1e-4


class MaskedLoraRecipe(LoraRecipe):
    """LoRA under the mask; settings as published with LoSA."""

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    targets: Literal["qv", "all"] = "all"
    lr: Positive | Literal["auto"] = 2e-4


class SppRecipe(_Section):
    """Sparsity-preserving factors (arXiv 2405.16057), as published."""

    rank: Count = 16  # rows of A; each serves a stretch of consecutive rows of W
    scale: Positive = 2.0
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr: Positive | Literal["auto"] = 4e-3
    weight_decay: NonNegative = 1e-3


class SquareHeadRecipe(_Section):
    """Distillation from the dense model's layers (arXiv 2310.06927), as published."""

    ce: NonNegative = 1.0  # weight of the cross entropy with the text
    kd: NonNegative = 0.0  # weight of the divergence from the dense model's logits
    sq: NonNegative = 1.0  # weight of the layers' normalised squared errors
    temperature: Positive = 1.0
    lr: Positive | Literal["auto"] = 1e-4

    @model_validator(mode="after")
    def _some_term(self) -> SquareHeadRecipe:
        if not self.ce and not self.kd and not self.sq:
            raise ValueError("one of ce, kd and sq must be above 0")
        return self


class NormsRecipe(_Section):
    """Norm gains and biases alone (arXiv 2312.15230)."""

    lr: Positive | Literal["auto"] = "auto"


class _RecoveryMethod(_Section):
    """The first keys of ``RecoveryRecipe``: bases come in this order, so that they stand first in a file."""

    method: Literal[
        "ebft", "dsnot", "ebft-mask", "none", "lora", "masked-lora", "spp", "squarehead", "norms"
    ] = "ebft"
    targets: Literal["block", "model", "blend"] = (
        "model"  # the dense block on the same inputs, the dense model's own activations, or a mixture
    )
    targets_blend: Annotated[float, Field(ge=0, le=1)] = 0.5  # of blend: the share of the dense model's
    loss: Literal["mse", "normalized"] = "mse"
    first_token: Literal["keep", "exclude", "per_token"] = "keep"  # against massive activations
    # Of ebft. split: attention, then MLP; overlap: pairs of blocks, towards the dense model's activations
    window: Literal["block", "split", "overlap"] = "block"
    start: Literal["pruned", "least_squares"] = "pruned"  # of ebft: where the kept weights start


class RecoveryRecipe(TrainingRecipe, _RecoveryMethod):
    """How the kept weights are repaired, masks frozen: block by block, or all blocks at once."""

    probe: LearningRateProbe = LearningRateProbe()
    dsnot: DsnotRecipe = DsnotRecipe()
    ebft_mask: EbftMaskRecipe = EbftMaskRecipe()
    # End-to-end methods; where recovery.lr is auto, their own lr counts
    lora: LoraRecipe = LoraRecipe()
    masked_lora: MaskedLoraRecipe = MaskedLoraRecipe()
    spp: SppRecipe = SppRecipe()
    squarehead: SquareHeadRecipe = SquareHeadRecipe()
    norms: NormsRecipe = NormsRecipe()

    @model_validator(mode="after")
    def _overlap_aims_at_the_model(self) -> RecoveryRecipe:
        if self.window == "overlap" and self.targets != "model":
            raise ValueError("window overlap aims at the dense model's activations: targets must be model")
        return self


class _FinishMethod(_Section):
    """The first keys of ``FinishRecipe``."""

    # auto: kl where weights, gradients, Adam's moments and activations of the whole model fit in memory
    method: Literal["none", "kl", "auto"] = "none"
    temperature: Positive = 1.0


class FinishRecipe(TrainingRecipe, _FinishMethod):
    """A stage after the recovery: kept weights of all blocks, tuned end to end towards the dense model's logits."""

    epochs: Count = 5
    trials: LearningRateTrials = LearningRateTrials(epochs=1)


class CalibrationRecipe(_Section):
    """The text that statistics and repair see."""

    source: str = "python-docs"
    dataset_config: str | None = None
    split: str | None = None
    text_column: str | None = None
    num_samples: Count = 128
    seqlen: Annotated[Count, Field(ge=2)] | None = None  # None: min(2048, the model's limit)
    sampler: Literal["joined", "strict"] = (
        "joined"  # strict: documents longer than the window only, as published
    )
    heldout: Annotated[float, Field(gt=0, lt=0.5)] = (
        0.125  # share of windows kept apart for step and learning-rate selection
    )


class EvaluationRecipe(_Section):
    """The text that perplexity is measured on."""

    source: str = "python-docs"
    dataset_config: str | None = None
    split: str | None = None
    text_column: str | None = None
    max_windows: Count | None = 64


class ExportRecipe(_Section):
    """How the ONNX file is written."""

    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"
    encoding: Literal["auto", "dense", "sparse"] = "auto"
    opset: Annotated[int, Field(ge=18, le=23)] = 18


class GatesRecipe(_Section):
    """Limits that the validator holds the export to; ``None`` takes the default of the weights' dtype, or no gate."""

    max_abs_error: Positive | None = None
    min_top1_agreement: Annotated[float, Field(ge=0, le=1)] | None = None
    max_onnx_ppl_drift: NonNegative | None = None  # relative, ONNX against PyTorch sparse
    max_ppl_increase: NonNegative | None = None  # relative, recovered against dense; no gate unless given
    min_sparsity: Annotated[float, Field(ge=0, le=1)] | None = None


class Recipe(_Section):
    """One run's settings, complete. Two equal recipes on equal inputs give equal bytes."""

    pruning: PruningRecipe = PruningRecipe()
    recovery: RecoveryRecipe = RecoveryRecipe()
    finish: FinishRecipe = FinishRecipe()
    calibration: CalibrationRecipe = CalibrationRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    export: ExportRecipe = ExportRecipe()
    gates: GatesRecipe = GatesRecipe()
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    def digest(self) -> str:
        """sha256 over the canonical JSON of all settings (hex)."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def built_in_recipes() -> dict[str, Path]:
    """Name and file of each recipe that the package ships."""
    return {path.stem: path for path in sorted(BUILT_IN_FOLDER.glob("*.yaml"))}


def read_recipe(source: str | Path | None, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe of a file or built-in name, with dotted overrides (``{"recovery.lr": 1e-3}``) on top.

    Args:
        source: A YAML file, the name of a built-in recipe, or ``None`` for ``default``.
        overrides: Dotted key to value; a value beats the file, the file beats the defaults. Setting one of
            ``pruning.sparsity`` and ``pruning.pattern`` clears the other one of the file.

    Raises:
        UsageError: The file is absent or no YAML mapping, a key is unknown, a value is out of range.
    """
    tree = _read_tree("default" if source is None else source)
    overrides = dict(overrides or {})
    if "pruning.sparsity" in overrides and "pruning.pattern" in overrides:
        raise UsageError(
            "E-SPARSITY-AND-PATTERN",
            "sparsity and pattern exclude each other",
            "give --sparsity or --pattern, not both",
        )
    for key, other in (("pruning.sparsity", "pattern"), ("pruning.pattern", "sparsity")):
        if key in overrides and isinstance(tree.get("pruning"), dict):
            tree["pruning"].pop(other, None)
    for key, value in overrides.items():
        check_key(key, "overrides")
        _set_dotted(tree, key, value)
    return parse_recipe(tree, str(source or "default"), overrides)


def read_overrides(overrides: Mapping[str, Any]) -> Recipe:
    """The defaults with dotted overrides on top; each section knows which of its keys were set.

    Raises:
        UsageError: A key is unknown or a value is out of range.
    """
    tree: dict[str, Any] = {}
    for key, value in overrides.items():
        check_key(key, "overrides")
        _set_dotted(tree, key, value)
    return parse_recipe(tree, given=overrides)


def parse_recipe(tree: Mapping[str, Any], origin: str = "recipe", given: Collection[str] = ()) -> Recipe:
    """The recipe of a nested mapping.

    Args:
        tree: Sections and their keys.
        origin: Where the tree comes from, for messages.
        given: Dotted keys that the caller has set on top; what is wrong with one is not blamed on ``origin``.

    Raises:
        UsageError: A key is unknown (the nearest known one is named) or a value is out of range.
    """
    try:
        return Recipe.model_validate(dict(tree))
    except ValidationError as error:
        raise _usage_error(error, origin, given) from None


def _read_tree(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    if not os.path.isfile(path):  # Path.is_file raises for a name that is too long
        known = built_in_recipes()
        if str(source) not in known:
            near = difflib.get_close_matches(str(source), known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(
                "E-RECIPE-NOT-FOUND",
                f"no recipe file or built-in recipe named {source}",
                f"{hint}built-in recipes: {', '.join(known)}",
            )
        path = known[str(source)]
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        first = " ".join(str(error).split())
        raise UsageError(
            "E-RECIPE-SYNTAX",
            f"{path.name} is not plain YAML: {first}",
            "mend the file; tags are not allowed",
        ) from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UsageError(
            "E-RECIPE-SYNTAX",
            f"{path.name} must be a mapping of sections, got {type(tree).__name__}",
            "start from recipes/default.yaml",
        )
    return tree


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise UsageError(
                "E-RECIPE-KEY",
                f"{key}: {section} is not a section of the recipe",
                "see recipes/default.yaml for the keys",
            )
        node = child
    node[leaf] = value


def check_key(key: str, origin: str) -> None:
    """Do nothing when a recipe can have the dotted ``key``; ``origin`` is who named it, for the message.

    Raises:
        UsageError: E-RECIPE-KEY: it cannot; the nearest known key is named.
    """
    known = list(recipe_keys())
    if key not in known:
        raise UsageError("E-RECIPE-KEY", f"{origin}: unknown key {key}", _suggestion(key, known))


def recipe_keys(model: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Every dotted key that a recipe can have, sections included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        annotation = field.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from recipe_keys(annotation, f"{prefix}{name}.")


def _usage_error(error: ValidationError, origin: str, given: Collection[str] = ()) -> UsageError:
    """The first trouble, with the recipe it came from unless the caller set that key."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    known = list(recipe_keys())
    while len(place) > 1 and ".".join(place) not in known and first["type"] != "extra_forbidden":
        place.pop()  # an index, or the name of one alternative of a union
    key = ".".join(place)
    on_top = any(key == one or key.startswith(f"{one}.") for one in given)
    where = "" if on_top else f"{origin}: "
    if first["type"] == "extra_forbidden":
        return UsageError("E-RECIPE-KEY", f"{where}unknown key {key}", _suggestion(key, known))
    if key == "pruning.sparsity":
        return UsageError(
            "E-SPARSITY-RANGE",
            f"{where}sparsity must be between 0 and 1, both excluded; got {first['input']}",
            "give a share such as 0.5 for 50 %",
        )
    if first["type"] == "string_pattern_mismatch" and key == "pruning.pattern":
        return UsageError(
            "E-PATTERN-SYNTAX",
            f"{where}a pattern is N:M, two whole numbers; got {first['input']!r}",
            "give a pattern such as 2:4",
        )
    if first["type"] == "value_error" and key == "pruning":
        return UsageError(
            "E-SPARSITY-AND-PATTERN", f"{where}sparsity and pattern exclude each other", "keep one of the two"
        )
    return UsageError(
        "E-RECIPE-VALUE",
        f"{where}{key}: {first['msg']}; got {first['input']!r}",
        "see recipes/default.yaml for each key's range",
    )


def _suggestion(key: str, known: Sequence[str]) -> str:
    """The key of that name in another section, else the nearest: of the same section, of any; else a list."""
    section, _, leaf = key.rpartition(".")
    siblings = [other for other in known if other.rpartition(".")[0] == section]
    namesakes = [other for other in known if other.rpartition(".")[2] == leaf]
    for candidates in (namesakes, siblings, known):
        leaves = {other.rpartition(".")[2]: other for other in reversed(candidates)}
        near = difflib.get_close_matches(leaf, leaves, n=1)
        if near:
            return f"did you mean {leaves[near[0]]}?"
    sections = {other.rpartition(".")[0] for other in known}
    while section not in sections:  # the whole recipe, "", is one
        section = section.rpartition(".")[0]
    names = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == section]
    return f"{section or 'a recipe'} has {', '.join(names)}"
