"""The recipe: everything that decides what a run computes, section by section; ``recipe_file`` reads it."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

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
    # as many heads and neurons in every layer, no new biases: loads in stock transformers
    uniform: bool = False


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
    # of the sparsity to blocks, where zeros are free
    allocation: Literal["uniform", "owl", "linear"] = "uniform"
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
    # which step's weights are kept; heldout includes step 0
    selection: Literal["heldout", "last"] = "heldout"


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
    # the dense block on the same inputs, the dense model's own activations, or a mixture
    targets: Literal["block", "model", "blend"] = "model"
    targets_blend: Annotated[float, Field(ge=0, le=1)] = 0.5  # of blend: the share of the dense model's
    loss: Literal["mse", "normalized"] = "mse"
    first_token: Literal["keep", "exclude", "per_token"] = "keep"  # against massive activations
    # Of ebft. split: attention, then MLP; overlap: pairs of blocks towards the dense model's activations, so that two
    # windows hold each block, and each takes half of the epochs
    window: Literal["block", "split", "overlap"] = "block"
    start: Literal["pruned", "least_squares"] = "pruned"  # of ebft: where the kept weights start
    epochs_before_finish: Count | None = None  # of ebft, in the place of epochs where a finish follows


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
        if self.method == "ebft" and self.window == "overlap" and self.targets != "model":
            raise ValueError(
                "window overlap aims at the dense model's activations: targets must be model, or window block"
            )
        return self


class _FinishMethod(_Section):
    """The first keys of ``FinishRecipe``."""

    # auto: kl after ebft where the whole model fits in memory, with gradients, Adam's moments and activations
    method: Literal["none", "kl", "auto"] = "none"
    temperature: Positive = 1.0
    # against over-fitting: weight of the layers' normalised squared errors beside KL (0: KL alone), and the share of a
    # training window's tokens that are exchanged each time it is used, for others of the text or for what the dense
    # model expects there; fading, the share falls to 0 in a line over the steps
    squarehead: NonNegative = 2.0
    noise: Annotated[float, Field(ge=0, lt=1)] = 0.15
    noise_from: Literal["text", "model"] = "model"
    noise_fades: bool = False


class FinishRecipe(TrainingRecipe, _FinishMethod):
    """A stage after the recovery: kept weights of all blocks, tuned end to end towards the dense model."""

    epochs: Count = 8
    batch_size: Count = 2
    trials: LearningRateTrials = LearningRateTrials(epochs=1)

    @property
    def runs_dense(self) -> bool:
        """Whether a dense copy of the blocks runs along, since its states for the windows as they are do not do."""
        return self.squarehead > 0 or self.noise > 0

    @property
    def draws_from_dense(self) -> bool:
        """Whether the dense model's states for the windows as they are say what to exchange tokens for."""
        return self.noise > 0 and self.noise_from == "model"


class CalibrationRecipe(_Section):
    """The text that statistics and repair see."""

    source: str = "python-docs"
    dataset_config: str | None = None
    split: str | None = None
    text_column: str | None = None
    num_samples: Count = 128
    seqlen: Annotated[Count, Field(ge=2)] | None = None  # None: min(2048, the model's limit)
    # strict: documents longer than the window only, as published
    sampler: Literal["joined", "strict"] = "joined"
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

    # int8 and int4: kept weights are quantised after the repair and packed; head and embeddings are int8
    dtype: Literal["auto", "float32", "float16", "bfloat16", "int8", "int4"] = "auto"
    encoding: Literal["auto", "dense", "sparse", "packed"] = "auto"  # auto: packed for int8 and int4
    activation_bits: Literal[8, 32] | None = (
        None  # of what enters a linear; None: 8 for int8 and int4, else 32
    )
    # auto: in packed exports one operator for each block's attention where that can be; standard: none
    attention: Literal["auto", "standard"] = "auto"
    opset: Annotated[int, Field(ge=18, le=23)] = 18

    @property
    def weight_bits(self) -> int | None:
        """Bits of the blocks' weights where they are quantised, else None."""
        return {"int8": 8, "int4": 4}.get(self.dtype)

    @property
    def packs(self) -> bool:
        """Whether sparse weights are packed."""
        return self.encoding == "packed" or self.weight_bits is not None

    @property
    def joins_attention(self) -> bool:
        """Whether a block's attention becomes one operator where that can be."""
        return self.packs and self.attention == "auto"

    @property
    def used_activation_bits(self) -> int:
        """Bits of what enters a packed or quantised linear."""
        return self.activation_bits or (32 if self.weight_bits is None else 8)


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

    @property
    def may_finish(self) -> bool:
        """Whether a finish may follow; with ``auto`` every recovery but EBFT shows what it does by itself."""
        return self.finish.method == "kl" or (self.finish.method == "auto" and self.recovery.method == "ebft")

    def digest(self) -> str:
        """sha256 over the canonical JSON of all settings (hex)."""
        return hashlib.sha256(json.dumps(self.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The recipe as YAML, every key written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
