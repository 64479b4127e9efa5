"""Pooled rules against enumeration, against the exact rule on the joined split, and on maps of a real network."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rankseg
from rankseg.pooled import ProbabilityHistogram
from trainers.metrics import Counts, Scoring, count

SCORING = Scoring(21, tuple(range(1, 21)))
MAPS = Path(__file__).resolve().parents[3] / "shared/data/probabilities/voc2012_espnetv2.npz"


def histogram(*batches: Tensor) -> ProbabilityHistogram:
    result = ProbabilityHistogram()
    for batch in batches:
        result.update(batch)
    return result


def uniform(*shape: int, seed: int = 0, power: float = 1.0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) ** power


@pytest.mark.parametrize("seed", range(5))
def test_ratio_is_the_best_of_all_masks(seed: int) -> None:
    """Every one of the 2^12 sets of pixels of a split of three images."""
    probs = uniform(3, 1, 4, seed=seed, power=2).half().float()
    p = probs.flatten().double()
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=12)), dtype=torch.float64)
    captured, volume = masks @ p, masks.sum(1)
    ratios = {"dice": 2 * captured / (volume + p.sum()), "iou": captured / (volume + p.sum() - captured)}
    found = histogram(probs)
    for score, ratio in ratios.items():
        best = ratio.max()
        assert float(found.best(score)[0]) == pytest.approx(float(best), abs=1e-12)
        chosen = rankseg.threshold(probs, at=found.cutoffs(score, pruning=False)).flatten().double()
        assert float(ratio[(masks == chosen).all(1)]) == pytest.approx(float(best), abs=1e-12)


def test_cutoff_is_the_fixed_point() -> None:
    probs = uniform(4, 3, 60, 50, power=3).half().float()
    cutoffs = histogram(probs).cutoffs()
    for p, cut in zip(probs.movedim(1, 0).flatten(1).double(), cutoffs, strict=True):
        assert float((p - cut).clamp(min=0).sum()) == pytest.approx(float(cut * p.sum()), rel=1e-9)
    assert torch.allclose(histogram(probs).cutoffs("iou"), cutoffs, rtol=1e-12)


@pytest.mark.parametrize("pixels", [40, 400, 4000])
def test_expected_pooled_dice_against_the_exact_rule(pixels: int) -> None:
    """The joined split is one image: `rank_dice` is the exact optimum, and the loss falls with the volume."""
    probs = uniform(5, 2, pixels // 5, power=2)
    joined = probs.movedim(1, 0).flatten(1)[None]
    exact = rankseg.rank_dice(joined, pruning=False).predict
    pooled = rankseg.threshold(joined, at=histogram(probs).cutoffs())
    best, found = (rankseg.expected_dice(joined, masks) for masks in (exact, pooled))
    loss = best - found
    assert (loss >= -1e-12).all() and (loss < 0.5 / joined.sum(2)).all()
    assert ((histogram(probs).best() - best[0]).abs() < 1 / joined[0].sum(1)).all()


def test_batches_and_processes_merge() -> None:
    probs = uniform(6, 3, 20, 20, power=2)
    whole, first, second = histogram(probs), histogram(probs[:1], probs[1:4]), histogram(probs[4:])
    merged = ProbabilityHistogram().merge(first).merge(second).merge(ProbabilityHistogram())
    assert torch.equal(merged.cutoffs(), whole.cutoffs())


def test_float32_loses_nothing_by_the_bins() -> None:
    probs = uniform(2, 1, 200, 200, power=4)
    p = probs.flatten().double().sort(descending=True).values
    exact = (2 * p.cumsum(0) / (torch.arange(1, p.numel() + 1) + p.sum())).max()
    masks = rankseg.threshold(probs, at=histogram(probs).cutoffs())
    reached = 2 * probs[masks].double().sum() / (masks.sum() + p.sum())
    assert 0 <= float(exact - reached) < 1e-7


def test_pixels_that_do_not_count() -> None:
    probs = uniform(2, 2, 8, 8)
    valid = uniform(2, 8, 8, seed=1) > 0.3
    found = ProbabilityHistogram()
    found.update(probs, valid)
    kept = torch.stack([p[valid] for p in probs.movedim(1, 0)])[None]
    assert torch.equal(found.cutoffs(), histogram(kept).cutoffs())


def test_class_that_is_impossible_is_never_selected() -> None:
    probs = torch.stack([torch.zeros(2, 30), uniform(2, 30)], dim=1)
    cutoffs = histogram(probs).cutoffs()
    assert cutoffs[0] == 1 and not rankseg.threshold(probs, at=cutoffs)[:, 0].any()


def test_pruning_leaves_out_classes_that_are_nowhere_likely() -> None:
    probs = torch.stack([uniform(2, 30) / 2, uniform(2, 30)], dim=1)
    pruned, full = histogram(probs).cutoffs(), histogram(probs).cutoffs(pruning=False)
    assert pruned[0] == 1 and full[0] < 0.25 and pruned[1] == full[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_pruning_compares_the_probabilities_themselves(dtype: torch.dtype) -> None:
    """float16 rounds 0.5001 to 1/2. `rank_dice` selects such a class, so it must not be pruned here either."""
    top = torch.tensor([0.5, torch.nextafter(torch.tensor(0.5, dtype=dtype), torch.ones((), dtype=dtype)), 0.5001])
    probs = torch.cat([top.to(dtype).view(1, 3, 1), torch.full((1, 3, 9), 0.2, dtype=dtype)], 2)
    expected = probs.amax((0, 2)) > 0.5
    found = histogram(probs[..., 5:]).merge(histogram(probs[..., :5]))
    assert torch.equal(found.cutoffs() < 1, expected)
    assert torch.equal(found.cutoffs()[expected], found.cutoffs(pruning=False)[expected])
    assert torch.equal(rankseg.rank_dice(probs).tau[0] > 0, expected)


def test_probabilities_that_float16_rounds_to_zero() -> None:
    found = histogram(torch.full((1, 1, 50), 2.0**-25))
    assert found.best().isnan().all() and found.cutoffs(pruning=False) == 1


@pytest.mark.parametrize(
    "at", [[0.5], [0.5, 0.5, 1.5], torch.tensor([0.5, float("nan"), 0.5]), ["a", "b", "c"], [True, 0.5, 0.5]]
)
def test_threshold_rejects_what_is_not_one_number_per_class(at: object) -> None:
    with pytest.raises(ValueError, match="at must be"):
        rankseg.threshold(uniform(1, 3, 4), at=at)  # type: ignore[arg-type]


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="empty"):
        ProbabilityHistogram().cutoffs()
    found = histogram(uniform(1, 2, 4))
    with pytest.raises(ValueError, match="classes=3"):
        found.update(uniform(1, 3, 4))
    with pytest.raises(ValueError, match="valid"):
        found.update(uniform(1, 2, 4), torch.ones(1, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="score"):
        found.cutoffs("f1")


@pytest.mark.skipif(not MAPS.exists(), reason="the shared maps are not here")
class TestRealMaps:
    """16 maps of a network on VOC: each rule wins its own column."""

    @pytest.fixture(scope="class")
    def counts(self) -> dict[str, Counts]:
        data = np.load(MAPS)
        labels = torch.from_numpy(data["target"])
        truth, valid = SCORING.encode(labels), labels != 255
        probs = torch.from_numpy(data["logits"]).float().softmax(1)
        found = ProbabilityHistogram()
        found.update(probs, valid)
        masks = {
            "T": rankseg.threshold(probs),
            "rankdice": rankseg.rankdice(probs * valid[:, None]),
            "pooled": rankseg.threshold(probs, at=found.cutoffs()),
        }
        return {name: count(mask, truth) for name, mask in masks.items()}

    def test_all_classes(self, counts: dict[str, Counts]) -> None:
        scores = {name: SCORING.summary(one) for name, one in counts.items()}
        for column, winner in (("mean_dice", "rankdice"), ("pooled_mean_dice", "pooled")):
            assert max(scores, key=lambda name: scores[name][column]) == winner

    def test_against_independent_numbers(self, counts: dict[str, Counts]) -> None:
        """Means over the eleven classes that occur: of the pooled Dice, and of the Dice over images."""
        known = {"T": (0.7502, 0.6378), "rankdice": (0.7588, 0.6449), "pooled": (0.7602, 0.6412)}
        occur = [c for c in range(1, 21) if counts["T"].actual[:, c].any()]
        for name, (pooled, by_image) in known.items():
            found = counts[name]
            assert float(found.pooled().dice()[0, occur].mean()) == pytest.approx(pooled, abs=6e-5)
            assert float(found.dice()[:, occur].nanmean(0).mean()) == pytest.approx(by_image, abs=6e-5)


def test_minus_zero_is_zero_and_valid_is_a_mask() -> None:
    probs = torch.rand(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    probs[..., :4] = 0
    found = []
    for values in (probs, torch.where(probs == 0, -0.0, probs)):
        histogram = ProbabilityHistogram()
        histogram.update(values)
        found.append(histogram.count)
    assert torch.equal(*found)
    with pytest.raises(TypeError, match=r"valid.*bool"):
        ProbabilityHistogram().update(probs, torch.ones(1, 8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match=r"valid.*bool torch.Tensor, got ndarray"):
        ProbabilityHistogram().update(probs, torch.ones(1, 8, 8, dtype=torch.bool).numpy())  # type: ignore[arg-type]
