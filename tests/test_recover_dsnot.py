"""DSnoT: equal to a loop over rows and cycles; zeros per row and per group kept; errors shrink; never worse."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import pytest
import torch
from repair_samples import Sample, sample, weights_of
from torch import Tensor

from compressor.errors import InputRefused
from compressor.recipe import DsnotRecipe, RecoveryRecipe
from compressor.recovery.block_io import BlockIO
from compressor.recovery.dsnot import Rows, WindowMoments, repair, rows_of, swap_cycles
from compressor.sparsity import SparsityPattern, holds_n_m

COLUMNS = 512  # wide rows, so that no row runs out of candidates before it has made its swaps
TWO_OF_FOUR = SparsityPattern.n_m(2, 4)


def moments(width: int = COLUMNS, windows: int = 5, seed: int = 0) -> WindowMoments:
    """Moments of inputs whose columns have means and scales of their own."""
    generator = torch.Generator().manual_seed(seed)
    mean, scale = (torch.randn(width, generator=generator) for _ in range(2))
    found = WindowMoments(width)
    for _ in range(windows):
        found.add(mean + scale.exp() * torch.randn(7, width, generator=generator))
    return found


def matrix(pattern: SparsityPattern | None = None, *, moved: bool = False, rows: int = 24) -> Rows:
    """A random matrix, half pruned by magnitude; ``moved``: its kept weights were updated by the pruner."""
    generator = torch.Generator().manual_seed(1)
    dense = torch.randn(rows, COLUMNS, generator=generator)
    groups = dense.abs().reshape(-1, pattern.m if pattern and pattern.m else COLUMNS)
    order = groups.argsort(dim=1, descending=True)[:, : groups.shape[1] // 2]
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter(1, order, True).view(dense.shape)
    pruned = dense + 0.05 * torch.randn(dense.shape, generator=generator) if moved else dense
    return rows_of(pruned * mask, dense, mask, moments(), 5, DsnotRecipe())


def swapped(rows: Rows, settings: DsnotRecipe, pattern: SparsityPattern | None = None) -> Tensor:
    """The mask after all cycles."""
    return rows.mask ^ (swap_cycles(rows, settings, pattern) > 0)


def slow_swaps(
    rows: Rows, settings: DsnotRecipe, pattern: SparsityPattern | None
) -> tuple[Tensor, list[list[float]]]:
    """The published loop for one row at a time, by plain searches; and each row's errors after each swap."""
    mask, courses = rows.mask.clone(), []
    for i, start in enumerate(rows.error.tolist()):
        c, e, course = rows.contributions[i].double().tolist(), start, [start]
        kept, gone = [set(part.nonzero().flatten().tolist()) for part in (rows.mask[i], ~rows.mask[i])]
        for _ in range(settings.max_cycle_time):
            growing = [j for j in gone if c[j] * e > 0]
            if abs(e) <= settings.update_threshold or not growing:
                break
            grown = min(growing, key=lambda j: (-float(rows.growth[i, j]), j))
            if pattern is None:
                dying = [j for j in kept if c[j] * e < 0]
            else:
                dying = [j for j in kept if j // pattern.m == grown // pattern.m]
            if not dying and pattern is None:
                break
            gone.discard(grown)
            if not dying:
                continue
            dead = min(dying, key=lambda j: (float(rows.scores[i, j]), j))
            after = e - c[grown] + c[dead]
            if pattern is not None and abs(after) >= abs(e):
                continue
            if (pattern is not None or not settings.without_same_sign) and after * start <= 0:
                break
            kept.discard(dead)
            mask[i, grown], mask[i, dead], e = True, False, after
            course.append(e)
        courses.append(course)
    return mask, courses


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"without_same_sign": False}, {"max_cycle_time": 3}, {"update_threshold": 40.0}]
)
def test_dsnot_equals_a_loop_over_rows(settings: dict[str, object], moved: bool) -> None:
    """All rows at once give the mask of one row after the other, also after an update of the kept weights."""
    rows, chosen = matrix(moved=moved), DsnotRecipe.model_validate(settings)
    expected, _ = slow_swaps(rows, chosen, None)
    assert torch.equal(swapped(rows, chosen), expected)
    assert not torch.equal(expected, rows.mask)


def test_dsnot_cycles_are_those_of_a_shorter_run() -> None:
    """The mask after 7 of 50 cycles is that of a run of 7 cycles, for rows and for groups."""
    for pattern in (None, TWO_OF_FOUR):
        rows = matrix(pattern)
        cycles = swap_cycles(rows, DsnotRecipe(), pattern)
        short = swapped(rows, DsnotRecipe(max_cycle_time=7), pattern)
        assert torch.equal(rows.mask ^ ((cycles > 0) & (cycles <= 7)), short)
        assert not torch.equal(short, swapped(rows, DsnotRecipe(), pattern))


@pytest.mark.parametrize("settings", [{}, {"max_cycle_time": 3}, {"update_threshold": 40.0}])
def test_dsnot_in_groups_equals_a_loop_over_rows(settings: dict[str, object]) -> None:
    """The same for 2:4, where a weight that grows back takes the place of one of its own group."""
    rows, chosen = matrix(TWO_OF_FOUR), DsnotRecipe.model_validate(settings)
    expected, _ = slow_swaps(rows, chosen, TWO_OF_FOUR)
    assert torch.equal(swapped(rows, chosen, TWO_OF_FOUR), expected)
    assert not torch.equal(expected, rows.mask)


def test_dsnot_keeps_the_zeros_of_each_row() -> None:
    """As many weights are kept in each row as before, and at most 50 of them are others."""
    rows = matrix()
    mask = swapped(rows, DsnotRecipe())
    assert torch.equal(mask.sum(1), rows.mask.sum(1))
    swaps = (mask & ~rows.mask).sum(1)
    assert 0 < int(swaps.max()) <= 50


def test_dsnot_keeps_the_zeros_of_each_group() -> None:
    """Each group of four keeps two, before and after, though half of the rows or more have moved."""
    rows = matrix(TWO_OF_FOUR)
    mask = swapped(rows, DsnotRecipe(), TWO_OF_FOUR)
    assert holds_n_m(mask, 2, 4)
    assert torch.equal(mask.view(-1, 4).sum(1), rows.mask.view(-1, 4).sum(1))
    assert ((mask != rows.mask).any(dim=1)).float().mean() > 0.5


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_dsnot_errors_shrink_until_they_change_their_sign(pattern: SparsityPattern | None) -> None:
    """Each swap brings a row's error towards 0: it is smaller than before, or on the other side."""
    rows = matrix(pattern)
    mask, courses = slow_swaps(rows, DsnotRecipe(), pattern)
    assert torch.equal(mask, swapped(rows, DsnotRecipe(), pattern))
    for course in courses:
        for before, after in itertools.pairwise(course):
            assert abs(after) < abs(before) or after * before < 0


def test_dsnot_leaves_rows_whose_error_is_small() -> None:
    """A row at or below the threshold keeps its mask; one above it does not."""
    rows = matrix()
    median = float(rows.error.abs().median())
    changed = (swapped(rows, DsnotRecipe(update_threshold=median)) != rows.mask).any(dim=1)
    assert torch.equal(changed, rows.error.abs() > median)


def test_dsnot_never_runs_past_its_candidates() -> None:
    """A row of four columns has fewer candidates than cycles; the zeros of each row stay as many."""
    rows = matrix()
    narrow = Rows(
        rows.mask[:, :4], rows.contributions[:, :4], rows.growth[:, :4], rows.scores[:, :4], rows.error
    )
    settings = DsnotRecipe(update_threshold=0.0)
    assert torch.equal(swapped(narrow, settings), slow_swaps(narrow, settings, None)[0])
    assert torch.equal(swapped(narrow, settings).sum(1), narrow.mask.sum(1))


def test_moments_are_those_of_the_paper() -> None:
    """Mean over windows of the sum over tokens, variance within windows weighted by tokens, length."""
    generator = torch.Generator().manual_seed(2)
    windows = [torch.randn(tokens, 3, generator=generator) + 5 * k for k, tokens in enumerate((4, 9))]
    found = WindowMoments(3)
    for window in windows:
        found.add(window)
    torch.testing.assert_close(found.mean_of_sums(2), (windows[0].sum(0) + windows[1].sum(0)) / 2)
    within = sum(len(w) * w.var(0, unbiased=False) for w in windows) / 13
    torch.testing.assert_close(found.variances(), within)
    torch.testing.assert_close(found.norms(), torch.cat(windows).norm(dim=0))


def recipe(dsnot: Mapping[str, object] | None = None, **settings: object) -> RecoveryRecipe:
    """DSnoT on everything, whatever a row's error."""
    own = {"skip": (), "update_threshold": 0.0, **(dsnot or {})}
    return RecoveryRecipe.model_validate({"dsnot": own, **settings})


def given(pattern: SparsityPattern | None = None) -> Sample:
    """A block whose inputs have a mean, so that its rows have an expected error."""
    return sample(width=32, mean=1.0, pattern=pattern)


def inputs_of(case: Sample) -> tuple[torch.nn.Module, dict[str, Tensor], BlockIO]:
    """What a repair is given."""
    return case.block, case.masks, case.io


def heldout_mse(case: Sample) -> float:
    """Held-out loss of the block as it is now, written out."""
    output = case.block(case.io.heldout_inputs.states)
    return float((output - case.io.heldout_targets.states).square().mean())


@pytest.mark.parametrize("pattern", [None, TWO_OF_FOUR])
def test_repair_moves_masks_and_weights_together(pattern: SparsityPattern | None) -> None:
    """What grew has its dense value, what stayed its own, all else is 0; the loss told is the block's, and lower."""
    case = given(pattern)
    before = weights_of(case.block)
    result = repair(case.block, case.masks, case.io, recipe())
    assert result.masks is not None
    assert result.loss_after == pytest.approx(heldout_mse(case), rel=1e-6)
    assert result.loss_after < result.loss_before
    for name, mask in result.masks.items():
        old, dense = case.masks[name], case.dense.get_parameter(name)
        expected = torch.where(old, before[name], dense) * mask
        assert torch.equal(case.block.get_parameter(name), expected)
        assert not torch.equal(mask, old)
        assert torch.equal(mask.sum(1), old.sum(1))
        assert pattern is None or holds_n_m(mask, 2, 4)


def test_repair_keeps_the_best_number_of_cycles() -> None:
    """The cycles told are the best of 1, 2, 4 and 7 on held-out windows."""
    losses = {}
    for cycles in (1, 2, 4, 7):
        settings = {"max_cycle_time": cycles}
        losses[cycles] = repair(*inputs_of(given()), recipe(settings, selection="last")).loss_after
    result = repair(*inputs_of(given()), recipe({"max_cycle_time": 7}))
    assert result.best_step == min(losses, key=losses.__getitem__)
    assert result.loss_after == min(losses.values())
    assert result.steps == 7


def test_repair_keeps_the_pruners_updated_weights() -> None:
    """Weights that the pruner changed stay as they are where they stay."""
    case = given()
    with torch.no_grad():
        case.block.up.weight.mul_(1.25)
    before = weights_of(case.block)
    masks = repair(case.block, case.masks, case.io, recipe(selection="last")).masks
    assert masks is not None
    stayed = masks["up.weight"] & case.masks["up.weight"]
    assert torch.equal(case.block.up.weight[stayed], before["up.weight"][stayed])


def test_repair_lets_masks_be_that_do_not_help() -> None:
    """Held-out windows whose wanted output is what the pruned block gives: nothing moves, unless asked to."""
    case = given()
    before = weights_of(case.block)
    case.io.heldout_targets.states.copy_(case.block(case.io.heldout_inputs.states))
    result = repair(case.block, case.masks, case.io, recipe())
    assert result.best_step == 0
    assert result.loss_after == result.loss_before == 0
    assert result.masks is not None
    assert all(torch.equal(result.masks[name], mask) for name, mask in case.masks.items())
    assert all(torch.equal(case.block.get_parameter(name), weight) for name, weight in before.items())
    last = repair(case.block, case.masks, case.io, recipe(selection="last"))
    assert last.best_step == last.steps == 50
    assert last.loss_after == pytest.approx(heldout_mse(case), rel=1e-6)
    assert last.loss_after > 0


def test_repair_leaves_what_it_is_told_to_skip() -> None:
    """A glob names what keeps the pruner's mask; as published, that is the MLP."""
    case = given()
    masks = repair(case.block, case.masks, case.io, recipe({"skip": ("*.up",)}, selection="last")).masks
    assert masks is not None
    assert torch.equal(masks["up.weight"], case.masks["up.weight"])
    assert not torch.equal(masks["down.weight"], case.masks["down.weight"])
    assert "*.mlp" in DsnotRecipe().skip


def test_repair_repeats_bit_for_bit_and_tells_each_matrix() -> None:
    """Two runs give the same masks; the progress counts matrices."""
    results, told = [], []
    for _ in range(2):
        case = given()
        results.append(
            repair(case.block, case.masks, case.io, recipe(), progress=lambda *at: told.append(at))
        )
    assert told == [(1, 2), (2, 2)] * 2
    first, second = (result.masks for result in results)
    assert first is not None
    assert second is not None
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_experts_without_tokens_keep_their_masks() -> None:
    """Inputs that nothing is known of give no error, and no swap."""
    rows = matrix()
    nothing = rows_of(
        torch.zeros_like(rows.scores), rows.contributions, rows.mask, WindowMoments(COLUMNS), 5, DsnotRecipe()
    )
    assert torch.equal(swapped(nothing, DsnotRecipe(update_threshold=0.0)), rows.mask)


def test_inputs_that_are_not_finite_are_refused() -> None:
    """An infinite activation names the matrix that it enters."""
    case = given()
    case.io.inputs.states[0, 0, 0] = math.inf
    with pytest.raises(InputRefused, match=r"the block.up.weight") as caught:
        repair(case.block, case.masks, case.io, recipe())
    assert caught.value.error_id == "E-STATISTIC-NONFINITE"
