"""Expected scores of all volumes by the dynamic programme over pixels: no quadrature, no cancellation."""

from __future__ import annotations

import numpy as np


def laws(p: np.ndarray) -> list[np.ndarray]:
    """Poisson-binomial laws of the first 0, 1, ..., D probabilities."""
    found = [np.ones(1)]
    for x in p:
        found.append(np.convolve(found[-1], [1 - x, x]))
    return found


def expectations(p: np.ndarray, smooth: float, score: str) -> tuple[np.ndarray, np.ndarray]:
    """Expected score, and expected 1 - score, of every volume 0..D of the sorted probabilities: two (D + 1,).

    All terms of both sums are positive, so that both are accurate relative to their own size.
    """
    p = np.sort(p.astype(np.float64))[::-1]
    inside, outside = laws(p), laws(p[::-1])[::-1]
    scores, losses = [], []
    for tau, (first, second) in enumerate(zip(inside, outside, strict=True)):
        hits, missed = np.arange(len(first))[:, None], np.arange(len(second))[None]
        top = (2 * hits if score == "dice" else hits) + 0 * missed
        union = tau + missed + 0 * hits
        bottom = (union + hits if score == "dice" else union) + smooth
        loss = bottom - smooth - top
        scores.append(first @ np.divide(top + smooth, bottom, out=np.zeros(bottom.shape), where=bottom > 0) @ second)
        losses.append(first @ np.divide(loss, bottom, out=np.ones(bottom.shape), where=bottom > 0) @ second)
    return np.array(scores), np.array(losses)
