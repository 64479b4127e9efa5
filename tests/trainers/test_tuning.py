"""Fitted thresholds, gates and choices against loops over every candidate."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import rankseg
from trainers.fitted import ThresholdTable, choose, fit_gate
from trainers.metrics import Scoring, Truth, count, mean_over_classes

SCORED = (1, 2, 3)


def maps(images: int = 6, seed: int = 0) -> tuple[Tensor, Truth]:
    """Probabilities that know something of the labels; class 3 is absent from half of the images; some void."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (images, 3, 3), generator=generator).repeat_interleave(5, 1).repeat_interleave(5, 2)
    labels[::2] = labels[::2].clamp(max=2)
    onehot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)
    probs = (1.5 * onehot + torch.randn(onehot.shape, generator=generator)).softmax(1)
    labels[:, 0, :4] = 255
    return probs, Scoring(4, SCORED).encode(labels)


def mean_dice(masks: Tensor, truth: Truth) -> Tensor:
    return mean_over_classes(count(masks, truth).dice(), SCORED)


def gated(masks: Tensor, probs: Tensor) -> Tensor:
    return masks & (probs.flatten(2).amax(2) > 0.5)[..., None, None]


@pytest.mark.parametrize("seed", range(4))
def test_common_threshold_against_a_loop(seed: int) -> None:
    probs, truth = maps(seed=seed)
    table = ThresholdTable.of_batch(probs, truth)
    means = {}
    for at, gate in itertools.product(table.thresholds, (False, True)):
        masks = rankseg.threshold(probs, at=at)
        means[at, gate] = mean_dice(gated(masks, probs) if gate else masks, truth)
    best = max(float(values.nanmean()) for values in means.values())
    found = table.fit(SCORED)
    assert isinstance(found.at, float)
    assert found.mean_dice == pytest.approx(best, abs=1e-9)
    assert float(means[found.at, found.gated].nanmean()) == pytest.approx(best, abs=1e-9)
    # Without image 2 the other images choose; their choice scores image 2.
    rest = [0, 1, 3, 4, 5]
    by_rest = {key: float(values[rest].nanmean()) for key, values in means.items()}
    equal = [key for key, value in by_rest.items() if value == pytest.approx(max(by_rest.values()), abs=1e-9)]
    assert found.leave_one_out is not None
    assert any(float(found.leave_one_out[2]) == pytest.approx(float(means[key][2]), abs=1e-9) for key in equal)


def test_dice_at_every_threshold_is_that_of_the_masks() -> None:
    probs, truth = maps()
    for dtype in (torch.float32, torch.float64, torch.float16):
        table = ThresholdTable.of_batch(probs.to(dtype), truth, (0.1, 0.3, 0.5, 0.7))
        for k, at in enumerate(table.thresholds):
            expected = count(rankseg.threshold(probs.to(dtype), at=at), truth).dice()
            assert torch.equal(table.dice()[..., k].nan_to_num(-1), expected.nan_to_num(-1))


def test_thresholds_per_class_against_all_triples() -> None:
    grid = (0.2, 0.3, 0.4, 0.5, 0.6)
    for seed in range(4):
        probs, truth = maps(seed=seed)
        table = ThresholdTable.of_batch(probs, truth, grid)
        common, found = table.fit(SCORED), table.fit(SCORED, per_class=True)
        assert isinstance(found.at, list) and len(found.at) == 4
        masks = rankseg.threshold(probs, at=found.at)
        masks = gated(masks, probs) if found.gated else masks
        assert float(mean_dice(masks, truth).nanmean()) == pytest.approx(found.mean_dice, abs=1e-9)
        best = 0.0
        for triple in itertools.product(grid, repeat=3):
            masks = rankseg.threshold(probs, at=[0.5, *triple])
            masks = gated(masks, probs) if found.gated else masks
            best = max(best, float(mean_dice(masks, truth).nanmean()))
        assert common.mean_dice - 1e-9 <= found.mean_dice <= best + 1e-9
        assert found.mean_dice > best - 0.01  # coordinate ascent may stop at a local maximum


def test_batches_and_processes_join() -> None:
    probs, truth = maps()
    whole, parts = ThresholdTable.of_batch(probs, truth), []
    for images in (slice(0, 4), slice(4, 6)):
        assert truth.valid is not None
        part = Truth(truth.onehot[images], truth.valid[images], truth.actual[images], truth.pixels[images])
        parts.append(ThresholdTable.of_batch(probs[images], part))
    joined = ThresholdTable.cat(parts)
    assert torch.equal(joined.dice(True).nan_to_num(-1), whole.dice(True).nan_to_num(-1))
    assert joined.fit(SCORED)[:3] == whole.fit(SCORED)[:3]


def test_gate_against_a_loop() -> None:
    probs, truth = maps(12, seed=7)
    masks = rankseg.rank_dice(probs, pruning=False).predict
    expected, counts = rankseg.expected_dice(probs, masks), count(masks, truth)
    least, mean = fit_gate(expected, counts.dice(), counts.actual, SCORED)
    means = []
    for k in range(100):
        kept = (expected >= k / 100)[..., None, None]
        means.append(float(mean_dice(masks & kept, truth).nanmean()))
    assert mean == pytest.approx(max(means), abs=1e-9)
    assert least == next(k / 100 for k in range(100) if means[k] >= max(means) - 1e-9)
    assert mean > means[0] + 0.01  # classes are absent here: a gate has to help


class TestChoice:
    def test_takes_the_largest_lower_bound(self) -> None:
        noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).double() / 100
        base = torch.full((200,), 0.7).double()
        candidates = {"T": base, "steady": base + 0.02 + noise, "wild": base + 0.025 + 20 * noise}
        found = choose(candidates)
        assert found.rule == "steady" and "+" in found.why
        assert found.differences["wild"]["low"] < 0 < found.differences["steady"]["low"] < 0.02 + 0.005

    def test_the_bound_is_the_lower_end_of_the_two_sided_interval(self) -> None:
        """For 2000 normal values the bound is mean − 1.960 standard errors. A one-sided one would be at 1.645."""
        base = torch.zeros(2000).double()
        other = torch.randn(2000, generator=torch.Generator().manual_seed(2)).double()
        found = choose({"T": base, "rankdice": other}).differences["rankdice"]
        error = float(other.std()) / 2000**0.5
        assert (found["mean"] - found["low"]) / error == pytest.approx(1.960, abs=0.15)

    def test_keeps_the_baseline_without_evidence(self) -> None:
        base = torch.rand(50, generator=torch.Generator().manual_seed(1)).double()
        assert choose({"T": base, "max": base, "rankdice": base - 0.1}).rule == "T"
        assert choose({"T": base}).rule == "T"

    def test_leaves_out_undefined_images(self) -> None:
        base, other = torch.full((2, 30), 0.5).double()
        base[0], other[1] = torch.nan, torch.nan
        other[2:] += torch.linspace(0.01, 0.1, 28)
        assert choose({"T": base, "rankdice": other}).rule == "rankdice"
