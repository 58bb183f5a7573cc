"""EBFT: equal to a plain loop with explicit masks; masks frozen to the bit; a block never gets worse."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from repair_samples import Sample, sample, weights_of
from torch import Tensor

from compressor.errors import InputRefused, ReportedError
from compressor.recipe import RecoveryRecipe
from compressor.recovery.block_io import BlockIO, Repaired
from compressor.recovery.ebft import repair
from compressor.recovery.frozen_masks import FrozenMasks
from compressor.recovery.precision import Stepper, deterministic
from compressor.recovery.reconstruction import ReconstructionLoss
from compressor.recovery.schedule import learning_rate_factor
from compressor.streams import shuffled


def recipe(**settings: object) -> RecoveryRecipe:
    """A short repair."""
    return RecoveryRecipe.model_validate({"epochs": 4, "batch_size": 5, **settings})


def run(given: Sample, lr: float = 1e-2, seed: int = 0, **settings: object) -> Repaired:
    """The sample's block repaired."""
    return repair(given.block, given.masks, given.io, recipe(**settings), lr=lr, seed=seed)


def heldout_mse(given: Sample) -> float:
    """Held-out loss of the block as it is now, written out."""
    output = given.block(given.io.heldout_inputs.states)
    return float((output - given.io.heldout_targets.states).square().mean())


def plain_training(given: Sample, lr: float, chosen: RecoveryRecipe) -> dict[str, Tensor]:
    """The same optimisation as in a textbook: W * M in the forward, unfused AdamW on the leaves."""
    leaves = {
        n: w.clone().requires_grad_()
        for n, w in weights_of(given.block).items()
        if not n.startswith("router")
    }
    optimizer = torch.optim.AdamW(
        leaves.values(),
        lr=lr,
        betas=(chosen.beta1, chosen.beta2),
        eps=chosen.eps,
        weight_decay=chosen.weight_decay,
    )
    generator = torch.Generator().manual_seed(0)
    steps = chosen.epochs * math.ceil(len(given.io.inputs) / chosen.batch_size)
    done = 0
    for _ in range(chosen.epochs):
        for rows in shuffled(len(given.io.inputs), chosen.batch_size, generator):
            masked = {n: w * given.masks[n] if n in given.masks else w for n, w in leaves.items()}
            output = torch.func.functional_call(given.block, masked, (given.io.inputs.states[rows],))
            optimizer.zero_grad()
            (output - given.io.targets.states[rows]).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(leaves.values(), chosen.max_grad_norm or math.inf)
            optimizer.param_groups[0]["lr"] = lr * learning_rate_factor(
                done, steps, chosen.schedule, chosen.warmup
            )
            optimizer.step()
            done += 1
    return leaves


@pytest.mark.parametrize("clip", [None, 0.01])
def test_repair_equals_a_plain_loop_with_explicit_masks(clip: float | None) -> None:
    """Twelve steps end where the textbook loop ends (fused AdamW rounds differently: 1e-5)."""
    settings = {
        "selection": "last",
        "weight_decay": 0.1,
        "max_grad_norm": clip,
        "schedule": "linear",
        "warmup": 0.2,
    }
    expected = plain_training(sample(), 1e-2, recipe(**settings))
    given = sample()
    result = run(given, **settings)
    assert result.steps == result.best_step == 12
    for name, weight in expected.items():
        kept = weight * given.masks[name] if name in given.masks else weight
        torch.testing.assert_close(
            given.block.get_parameter(name), kept, rtol=1e-5, atol=1e-5, check_stride=False
        )


def test_loss_before_is_that_of_the_masked_block() -> None:
    """Step 0 is the mean squared error of the masked block against the targets (float64 sums: 1e-6)."""
    given = sample()
    expected = heldout_mse(given)
    result = run(given)
    assert result.loss_before == pytest.approx(expected, rel=1e-6)
    power = given.io.heldout_targets.states.square().mean()
    assert result.relative_before == pytest.approx(expected / float(power), rel=1e-5)


def test_loss_after_is_that_of_the_kept_weights_and_lower() -> None:
    """What is reported is what the block now gives, and less than half of the loss before."""
    given = sample()
    result = run(given, epochs=20)
    assert result.loss_after == pytest.approx(heldout_mse(given), rel=1e-5)
    assert result.loss_after < 0.5 * result.loss_before
    assert result.train_loss_first is not None
    assert result.train_loss_last is not None
    assert result.train_loss_last < result.train_loss_first


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_masks_stay_frozen_to_the_bit(amp: torch.dtype | None) -> None:
    """Masked weights are +0.0 after training with decay and clipping, in every precision; others moved."""
    given = sample(amp=amp)
    before = weights_of(given.block)
    result = run(given, weight_decay=0.5, max_grad_norm=0.1, selection="last")
    assert result.loss_after < result.loss_before
    for name, mask in given.masks.items():
        weight = given.block.get_parameter(name)
        assert not weight[~mask].view(torch.int32).any()
        assert bool((weight[mask] != before[name][mask]).all())


def test_repair_zeroes_masked_weights_that_came_dense() -> None:
    """A block handed over with its dense weights is masked first."""
    given, pruned = sample(), sample()
    given.block.load_state_dict(given.dense.state_dict())
    assert run(given).loss_before == run(pruned).loss_before


def test_repair_repeats_bit_for_bit() -> None:
    """The same seed gives the same bits, another seed another order of windows and other bits."""
    runs = []
    for seed in (0, 0, 1):
        given = sample()
        run(given, seed=seed)
        runs.append(weights_of(given.block))
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])
    assert not torch.equal(runs[0]["up.weight"], runs[2]["up.weight"])


def test_repair_leaves_the_global_random_state() -> None:
    """The order of windows comes from a generator of its own."""
    before = torch.random.get_rng_state()
    run(sample())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_held_out_selection_includes_step_0() -> None:
    """With a learning rate that only does harm, the block comes back as it was."""
    given = sample()
    before = weights_of(given.block)
    result = run(given, lr=30.0)
    assert result.best_step == 0
    assert result.loss_after == result.loss_before
    assert all(torch.equal(given.block.get_parameter(name), weight) for name, weight in before.items())


def test_last_selection_keeps_the_last_step_even_if_worse() -> None:
    """As published: the last weights are kept, and the report says what they cost."""
    given = sample()
    result = run(given, lr=30.0, selection="last")
    assert result.best_step == result.steps
    assert result.loss_after > result.loss_before
    assert result.loss_after == pytest.approx(heldout_mse(given), rel=1e-5)


@pytest.mark.parametrize("selection", ["heldout", "last"])
def test_divergence_stops_and_falls_back(selection: str) -> None:
    """A loss that overflows ends the repair; the best finite weights are kept, whatever the selection."""
    given = sample()
    before = weights_of(given.block)
    result = run(given, lr=1e30, selection=selection)
    assert result.diverged
    assert result.steps == 3  # one epoch
    assert result.train_loss_last is None
    assert all(torch.equal(given.block.get_parameter(name), weight) for name, weight in before.items())


def test_non_finite_loss_at_step_0_is_refused() -> None:
    """A block that answers NaN before its repair is an error, not a repair."""
    given = sample()
    given.io.heldout_inputs.states[0, 0, 0] = float("nan")
    with pytest.raises(InputRefused) as caught:
        run(given)
    assert caught.value.error_id == "E-LOSS-NONFINITE"


@pytest.mark.parametrize(("windows", "heldout"), [(0, 4), (4, 0)])
def test_repair_without_windows_is_refused(windows: int, heldout: int) -> None:
    """Both training and held-out windows are needed."""
    with pytest.raises(InputRefused) as caught:
        run(sample(windows=windows, heldout=heldout))
    assert caught.value.error_id == "E-CALIBRATION-SHORT"


def test_last_partial_batch_counts_and_progress_tells_each_step() -> None:
    """12 windows in batches of 5 are 3 steps an epoch, all of them told."""
    given, told = sample(), []
    repair(
        given.block,
        given.masks,
        given.io,
        recipe(epochs=2),
        lr=1e-3,
        seed=0,
        progress=lambda *at: told.append(at),
    )
    assert told == [(step, 6) for step in range(1, 7)]


def test_everything_but_the_router_is_trained() -> None:
    """Linears, biases and norm gains move; the router stays, and so does a parameter without gradient."""
    given = sample()
    before = weights_of(given.block)
    run(given, selection="last")
    moved = {n for n, w in given.block.named_parameters() if not torch.equal(w, before[n])}
    assert moved == {"norm.weight", "up.weight", "up.bias", "down.weight", "down.bias"}


def test_gradients_are_off_and_forgotten_afterwards() -> None:
    """The block holds no gradient memory and asks for none."""
    given = sample()
    run(given)
    assert all(weight.grad is None and not weight.requires_grad for weight in given.block.parameters())


def test_normalized_loss_divides_by_the_targets_mean_square() -> None:
    """The normalised loss is the plain one in units of mean(target^2) of the training windows."""
    given = sample()
    power = float(given.io.targets.states.double().square().mean())
    found = ReconstructionLoss.of(recipe(loss="normalized"), given.io.targets)
    assert found.scale == pytest.approx(1 / power, rel=1e-6)
    assert ReconstructionLoss.of(recipe(loss="mse"), given.io.targets).scale == 1.0


def test_gradients_are_clipped_in_true_units_under_a_loss_scale() -> None:
    """With float16's loss scale of 65536 the clipped step still has the length of the plain one."""
    given = sample(amp=torch.float16)
    weight = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    stepper = Stepper(torch.optim.SGD([weight], lr=1.0), [weight], given.io, max_grad_norm=2.5)
    stepper.backward((weight.square() / 2).sum())
    stepper.unscale()
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0, 4.0]
    stepper.step(lr=1.0)
    # Halved from length 5 to 2.5; the norm's guard against 0 takes 1e-6 off.
    torch.testing.assert_close(weight.detach(), torch.tensor([1.5, 2.0]), rtol=1e-5, atol=0)


def test_a_moved_masked_weight_is_reported() -> None:
    """The check at the end of a repair sees one masked weight that is not 0, even if it is -0.0."""
    given = sample()
    frozen = FrozenMasks(given.block, given.masks)
    frozen.verify()
    row, column = (~given.masks["up.weight"]).nonzero()[0].tolist()
    given.block.up.weight[row, column] = -0.0
    with pytest.raises(ReportedError, match=r"1 masked weights of up.weight") as caught:
        frozen.verify()
    assert caught.value.error_id == "E-MASK-BROKEN"


def test_schedule_rises_and_falls() -> None:
    """Warm-up reaches the peak at its last step; line and half cosine fall from there towards 0."""
    linear = [learning_rate_factor(step, 10, "linear", 0.2) for step in range(10)]
    assert linear[:3] == [0.5, 1.0, 1.0]
    assert linear[-1] == pytest.approx(1 / 8)
    cosine = [learning_rate_factor(step, 10, "cosine", 0.0) for step in range(10)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert all(a > b > 0 for a, b in itertools.pairwise(cosine))
    assert {learning_rate_factor(step, 10, "constant", 0.0) for step in range(10)} == {1.0}


def test_determinism_on_the_cpu_changes_no_global_setting() -> None:
    """The request for fixed orders of summation is CUDA's alone."""
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic(torch.device("cpu")):
        assert torch.are_deterministic_algorithms_enabled() == before


def test_fused_experts_are_trained_under_their_masks() -> None:
    """A 3-D parameter of all experts is masked like any other."""

    class Experts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.Parameter(
                torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
            )

        def forward(self, hidden: Tensor) -> Tensor:
            return hidden + torch.einsum("btd,edk->btk", hidden, self.experts)

    block, given = Experts(), sample()
    narrow = {
        name: getattr(given.io, name) for name in ("inputs", "targets", "heldout_inputs", "heldout_targets")
    }
    for store in narrow.values():
        store.states = store.states[..., :4].contiguous()
    io = BlockIO(**narrow, forward=lambda module, hidden: module(hidden), device=torch.device("cpu"))
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.5
    result = repair(block, {"experts": mask}, io, recipe(), lr=1e-2, seed=0)
    assert result.loss_after < result.loss_before
    assert not block.experts[~mask].any()
