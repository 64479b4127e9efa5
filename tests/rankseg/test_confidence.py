"""Confidence against enumeration and simulation; the gates against a search over all decisions."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import rankseg
from rankseg.expected import (
    absence,
    confidence,
    gate_by_presence,
    gate_by_score,
    image_confidence,
    mean_entropy,
    mean_max_probability,
    soft_dice_confidence,
)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def outcomes(p: Tensor) -> tuple[Tensor, Tensor]:
    """All 2^D objects (2^D, D) and their probabilities."""
    objects = torch.tensor(list(itertools.product([0.0, 1.0], repeat=len(p))), dtype=torch.float64)
    return objects, torch.where(objects > 0, p, 1 - p).prod(1)


@pytest.mark.parametrize("pixels", [1, 2, 5, 12])
@pytest.mark.parametrize("seed", range(3))
def test_confidence_against_enumeration(pixels: int, seed: int) -> None:
    probs = uniform(2, 3, pixels, seed=seed).double()
    masks = uniform(2, 3, pixels, seed=seed + 10) > 0.6
    masks[0, 0] = False
    found = confidence(probs, masks)
    for row in itertools.product(range(2), range(3)):
        objects, weight = outcomes(probs[row])
        mask = masks[row].double()
        total = objects.sum(1) + mask.sum()
        right = torch.where(total > 0, 2 * objects @ mask / total.clamp(min=1), 1.0)  # empty and empty is right
        assert float(found[row]) == pytest.approx(float(weight @ right), abs=1e-12)


def test_confidence_against_simulation() -> None:
    probs = uniform(1, 2, 40, 40) ** 2
    masks = rankseg.rankdice(probs)
    generator, dice = torch.Generator().manual_seed(1), []
    for _ in range(2000):
        truth = torch.rand(probs.shape, generator=generator) < probs
        dice.append(2 * (masks & truth).sum((2, 3)) / (masks.sum((2, 3)) + truth.sum((2, 3))))
    sample = torch.stack(dice).double()
    error = 5 * sample.std(0) / 2000**0.5
    assert ((sample.mean(0) - confidence(probs, masks)).abs() < error).all()
    assert (error < 0.004).all()


def test_image_confidence_is_the_mean_over_predicted_classes() -> None:
    values = torch.tensor([[0.9, 0.2, 0.7], [0.9, 0.2, 0.7]]).double()
    predicted = torch.tensor([[True, False, True], [False, False, False]])
    assert image_confidence(values, predicted).tolist() == pytest.approx([0.8, 0.6])


def test_soft_dice_confidence_by_hand() -> None:
    probs = torch.tensor([[[0.9, 0.6, 0.1]], [[0.0, 0.0, 0.0]]])
    masks = torch.tensor([[[True, True, False]], [[False, False, False]]])
    assert soft_dice_confidence(probs, masks)[:, 0].tolist() == pytest.approx([2 * 1.5 / 3.6, 0.0])


def test_one_class_and_its_complement_are_two_classes() -> None:
    one = uniform(3, 1, 6, 5)
    two = torch.cat([1 - one, one], dim=1)
    assert torch.allclose(mean_max_probability(one), mean_max_probability(two))
    assert torch.allclose(mean_entropy(one), mean_entropy(two), atol=1e-6)
    even = torch.full((1, 4, 3), 0.25)
    assert float(mean_entropy(even)) == pytest.approx(torch.tensor(4.0).log().item(), rel=1e-6)


def test_gate_by_score_keeps_what_is_good_enough() -> None:
    probs = uniform(4, 3, 10, 10) ** 3
    masks = rankseg.rank_dice(probs, pruning=False).predict
    scores = rankseg.expected_dice(probs, masks)
    least = float(scores.median())
    kept = gate_by_score(probs, masks, least).flatten(2).any(2)
    assert torch.equal(kept, scores >= least) and kept.any() and not kept.all()
    per_class = gate_by_score(probs, masks, torch.tensor([0.0, 1.0, least])).flatten(2).any(2)
    assert per_class[:, 0].all() and not per_class[:, 1].any()


@pytest.mark.parametrize("seed", range(5))
def test_gate_by_presence_is_the_best_of_all_decisions(seed: int) -> None:
    """Expected sum over expected count of defined scores, over all 2^6 ways to keep or empty six masks."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([0.02, 0.05, 0.1, 0.3, 0.6, 0.9]).view(6, 1, 1)
    probs = torch.rand(6, 1, 9, generator=generator).double() * scale
    masks = rankseg.rank_dice(probs, pruning=False).predict
    dice, missing = rankseg.expected_dice(probs, masks)[:, 0], absence(probs)[:, 0]
    ways = torch.tensor(list(itertools.product([0.0, 1.0], repeat=6)), dtype=torch.float64)
    means = ways @ dice / (ways + (1 - ways) * (1 - missing)).sum(1)
    best = float(means.max())
    kept = gate_by_presence(probs, masks, best).flatten(2).any(2)[:, 0]
    assert float(means[(ways == kept.double()).all(1)]) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_gates_reject_what_is_not_a_dice(value: float) -> None:
    probs = uniform(1, 1, 4)
    for gate in (gate_by_score, gate_by_presence):
        with pytest.raises(ValueError, match="is invalid"):
            gate(probs, probs > 0.5, value)
