"""Risk-coverage against all orders, conformal bounds against simulation and re-splits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from configs.errors import UserError
from scripts.analysis.selective import (
    _resampled_aurc,
    aurc,
    compare_aurc,
    conformal_margin,
    resplit_coverages,
    risk_coverage,
)


def test_risk_coverage_by_hand() -> None:
    coverage, risk = risk_coverage(torch.tensor([0.2, 0.9, 0.5]), torch.tensor([0.6, 0.0, 0.3]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert risk.tolist() == pytest.approx([0, 0.15, 0.3])


def test_ties_are_the_mean_over_all_orders() -> None:
    confidence, risk = torch.tensor([0.9, 0.5, 0.5, 0.5, 0.1]), torch.tensor([0.1, 0.7, 0.2, 0.4, 0.9])
    curves = []
    for middle in itertools.permutations([1, 2, 3]):
        ordered = risk[[0, *middle, 4]].double()
        curves.append(ordered.cumsum(0) / torch.arange(1, 6))
    assert torch.allclose(risk_coverage(confidence, risk)[1], torch.stack(curves).mean(0))


def test_the_oracle_order_is_best_and_no_order_is_the_mean() -> None:
    risk = torch.rand(50, generator=torch.Generator().manual_seed(0)).double()
    assert aurc(torch.zeros(50), risk) == pytest.approx(float(risk.mean()))
    shuffled = torch.rand(50, generator=torch.Generator().manual_seed(1))
    assert aurc(-risk, risk) < aurc(shuffled, risk) < aurc(risk, risk)


def test_comparison_tells_a_better_order_from_a_worse_one() -> None:
    generator = torch.Generator().manual_seed(2)
    risk = torch.rand(150, generator=generator).double()
    noise = torch.randn(150, generator=generator).double()
    found = compare_aurc(
        {"none": torch.zeros(150), "good": -risk + 0.1 * noise, "poor": -risk + 2 * noise}, risk, "poor", resamples=300
    )
    assert found["poor"]["gain"] == 0 and found["poor"]["gain_interval"] == [0, 0]
    assert found["good"]["gain_interval"][0] > 0
    low, high = found["good"]["interval"]
    assert low < found["good"]["aurc"] < high


@pytest.mark.parametrize(("images", "alpha"), [(9, 0.1), (19, 0.1), (50, 0.2), (99, 0.05), (20, 0.3)])
def test_margin_is_the_right_order_statistic(images: int, alpha: float) -> None:
    score = torch.rand(images, generator=torch.Generator().manual_seed(images)).double()
    margin = conformal_margin(torch.zeros(images), score, alpha)
    place = sum(1 for value in (-score).tolist() if value <= margin)
    assert place - 1 < (images + 1) * (1 - alpha) <= place + 1e-9


@pytest.mark.parametrize("alpha", [0.1, 0.25])
def test_bound_holds_for_exchangeable_images(alpha: float) -> None:
    """However wrong the confidence is: with n images the coverage is in [1 - α, 1 - α + 1 / (n + 1)]."""
    generator, hits, trials, images = torch.Generator().manual_seed(3), 0, 4000, 39
    for _ in range(trials):
        score = torch.rand(images + 1, generator=generator).double()
        confidence = 1 - (score - 0.3).abs() + 0.2 * torch.rand(images + 1, generator=generator)
        margin = conformal_margin(confidence[:-1], score[:-1], alpha)
        hits += int(score[-1] >= confidence[-1] - margin)
    error = 4 * math.sqrt(alpha * (1 - alpha) / trials)
    assert 1 - alpha - error <= hits / trials <= 1 - alpha + 1 / (images + 1) + error


def test_resplits_cover() -> None:
    score = torch.rand(200, generator=torch.Generator().manual_seed(4)).double()
    confidence = score**2 + 0.3
    coverages = resplit_coverages(confidence, score, 100, 0.1)
    assert coverages.shape == (200,) and 0.88 < float(coverages.mean()) < 0.93
    assert torch.equal(coverages, resplit_coverages(confidence, score, 100, 0.1))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_alpha_outside_its_range(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha="):
        conformal_margin(torch.ones(50), torch.ones(50), alpha)


@pytest.mark.parametrize(("alpha", "least"), [(0.1, 9), (0.05, 19), (0.3, 3), (0.01, 99)])
def test_too_few_images(alpha: float, least: int) -> None:
    conformal_margin(torch.ones(least), torch.ones(least), alpha)
    with pytest.raises(UserError, match=f"alpha={alpha:g} needs at least {least} .*found {least - 1}"):
        conformal_margin(torch.ones(least - 1), torch.ones(least - 1), alpha)


def test_resampled_aurc_is_the_aurc_of_each_sample() -> None:
    """Also with images of equal confidence, and with images that occur several times."""
    torch.manual_seed(0)
    confidence, risk = (5 * torch.rand(30)).round(), torch.rand(30, dtype=torch.float64)
    draws = torch.randint(30, (50, 30))
    counts = torch.stack([torch.bincount(draw, minlength=30) for draw in draws])
    one_by_one = torch.tensor([aurc(confidence[draw], risk[draw]) for draw in draws], dtype=torch.float64)
    assert torch.allclose(_resampled_aurc(confidence, risk, counts), one_by_one, rtol=1e-12)
