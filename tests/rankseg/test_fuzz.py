"""Ten thousand small maps of every kind, with every size of `smooth`, against the dynamic programme."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import rankseg
from tests.rankseg.oracle import expectations

RULES = {"dice": rankseg.rank_dice, "iou": rankseg.rank_iou}
EXPECTED = {"dice": rankseg.expected_dice, "iou": rankseg.expected_iou}
SMOOTH = (0.0, 1e-12, 1.0, 1e3, 1e12, 1e15)
ROWS = 40


def random_map(rng: np.random.Generator, pixels: int) -> np.ndarray:
    """Probabilities (D,) of one of nine kinds: sparse, saturated, tied, tiny, almost certain, and so on."""
    p = rng.random(pixels)
    kind = rng.integers(9)
    if kind == 0:
        return p
    if kind == 1:
        return p ** rng.integers(2, 12)
    if kind == 2:
        return np.clip((p - rng.random()) * 50, 0, 1)
    if kind == 3:
        return (p > rng.random()).astype(float)
    if kind == 4:
        return np.round(p * 4) / 4
    if kind == 5:
        return p * 10.0 ** -rng.integers(1, 13)
    if kind == 6:
        return 1 - p * 10.0 ** -rng.integers(1, 13)
    if kind == 7:
        return np.full(pixels, rng.choice([p[0], 0.5, 1e-30, 1 - 1e-9]))
    return p.astype(np.float16).astype(float)


def check(rng: np.random.Generator, pixels: int, smooth: float, score: str) -> None:
    dtype = torch.float64 if rng.integers(2) else torch.float32
    maps = torch.tensor(np.stack([random_map(rng, pixels) for _ in range(ROWS)]), dtype=dtype)[:, None]
    result = RULES[score](maps, smooth=smooth, pruning=False)
    assert torch.equal(result.predict.sum(2), result.tau)
    found = EXPECTED[score](maps, result.predict, smooth=smooth)[:, 0]
    nothing = EXPECTED[score](maps, torch.zeros_like(result.predict), smooth=smooth)[:, 0]
    for row in range(ROWS):
        p, tau = maps[row, 0].double().numpy(), int(result.tau[row])
        scores, losses = expectations(p, smooth, score)
        context = (score, smooth, p.tolist())
        if smooth > pixels:
            scale = (1 + p.sum()) / (1 + p.sum() + smooth)
            assert losses[tau] <= losses.min() + 1e-12 * scale, context
        else:
            assert scores[tau] >= scores.max() * (1 - 1e-11), context
        # The mask holds the most probable pixels, and its expected score is what is promised.
        mask = result.predict[row, 0].numpy()
        assert not mask.any() or mask.all() or p[mask].min() >= p[~mask].max(), context
        assert found[row].item() == pytest.approx(scores[tau], rel=1e-11, abs=1e-300), context
        assert nothing[row].item() == pytest.approx(scores[0], rel=2e-12, abs=1e-300), context


@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_some_maps(score: str, smooth: float) -> None:
    rng = np.random.default_rng(1)
    for pixels in (1, 7, 30):
        check(rng, pixels, smooth, score)


@pytest.mark.slow
@pytest.mark.parametrize("smooth", SMOOTH)
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_ten_thousand_maps(score: str, smooth: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        check(rng, int(rng.integers(1, 40)), smooth, score)
    check(rng, 150, smooth, score)
