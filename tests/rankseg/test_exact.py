"""The exact solver against brute force over all masks, the dynamic programme, and identities."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import rankseg
from rankseg import gather, solver
from rankseg.nonoverlap import surrogate_objective
from tests.rankseg.oracle import expectations

RULES = {"dice": rankseg.rank_dice, "iou": rankseg.rank_iou}
EXPECTED = {"dice": rankseg.expected_dice, "iou": rankseg.expected_iou}
SMOOTH = st.sampled_from([0.0, 0.3, 1.0, 10.0])
SCORE = st.sampled_from(["dice", "iou"])
PROBABILITY = st.one_of(st.floats(0, 1, width=32), st.sampled_from([0.0, 0.25, 0.5, 1.0]))
FEW = settings(max_examples=20, deadline=None)


def brute_force(p: np.ndarray, smooth: float, score: str) -> np.ndarray:
    """Expected score of all 2^D masks, by summing over all 2^D objects."""
    objects = np.array(list(itertools.product([0, 1], repeat=len(p))), dtype=float)
    law = np.prod(np.where(objects == 1, p, 1 - p), axis=1)
    both, sizes = objects @ objects.T, objects.sum(1)
    total = sizes[:, None] + sizes[None]
    top, bottom = (2 * both, total) if score == "dice" else (both, total - both)
    ratio = np.divide(top + smooth, bottom + smooth, out=np.zeros_like(both), where=bottom + smooth > 0)
    return ratio @ law


def dynamic_programme(p: np.ndarray, smooth: float, score: str) -> np.ndarray:
    """Expected score of every volume 0..D of the sorted probabilities, without quadrature."""
    return expectations(p, smooth, score)[0]


def as_map(p: np.ndarray) -> Tensor:
    return torch.as_tensor(p)[None, None]


@FEW
@given(st.lists(PROBABILITY, min_size=1, max_size=10), SMOOTH, SCORE)
def test_optimal_among_all_masks(p: list[float], smooth: float, score: str) -> None:
    maps = torch.tensor(p, dtype=torch.float64)[None, None]
    scores = brute_force(np.array(p), smooth, score)
    result = RULES[score](maps, smooth=smooth, pruning=False)
    chosen = int("".join(str(int(bit)) for bit in result.predict[0, 0]), 2)
    assert scores[chosen] >= scores.max() - 1e-12
    assert int(result.predict.sum()) == int(result.tau)


@FEW
@given(st.lists(PROBABILITY, min_size=1, max_size=8), st.integers(0, 255), SMOOTH, SCORE)
def test_expected_score_of_any_mask(p: list[float], bits: int, smooth: float, score: str) -> None:
    mask = [bool(bits >> i & 1) for i in reversed(range(len(p)))]
    number = sum(1 << i for i, bit in enumerate(reversed(mask)) if bit)
    maps, masks = torch.tensor(p, dtype=torch.float64)[None, None], torch.tensor(mask)[None, None]
    found = EXPECTED[score](maps, masks, smooth=smooth).item()
    assert found == pytest.approx(brute_force(np.array(p), smooth, score)[number], rel=1e-11, abs=1e-13)


def shapes_of_maps(pixels: int, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    p = rng.random(pixels)
    blob = 1 / (1 + np.exp(np.linspace(-12, 20, pixels)))
    return {
        "uniform": p,
        "sparse": np.where(rng.random(pixels) < 0.1, p, 0.01 * p),
        "blob": blob,
        "ties": np.round(p, 1),
        "saturated": np.clip((p - 0.7) * 50, 0, 1),
        "flat": np.full(pixels, 0.02),
        "tiny object": np.where(np.arange(pixels) < 3, 0.97, 0.0),
    }


@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize(("pixels", "smooth"), [(1, 0.0), (20, 0.0), (60, 0.5), (90, 0.0), (90, 10.0)])
def test_against_dynamic_programme(pixels: int, smooth: float, score: str) -> None:
    for kind, p in shapes_of_maps(pixels, seed=pixels).items():
        p = p.astype(np.float32)
        scores = dynamic_programme(p, smooth, score)
        result = RULES[score](as_map(p), smooth=smooth, pruning=False)
        assert scores[int(result.tau)] >= scores.max() * (1 - 1e-11), kind
        if not p.any():
            continue
        # Any volume, not only the best: the relative error stays below 1e-11.
        order = np.argsort(-p, kind="stable")
        for tau in {0, 1, pixels // 3, pixels // 2, pixels}:
            mask = np.zeros(pixels, bool)
            mask[order[:tau]] = True
            found = EXPECTED[score](as_map(p), as_map(mask), smooth=smooth).item()
            assert found == pytest.approx(scores[tau], rel=1e-11, abs=1e-14), (kind, tau)


@pytest.mark.slow
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_against_dynamic_programme_large(score: str) -> None:
    for kind, p in shapes_of_maps(400, seed=4).items():
        scores = dynamic_programme(p, 0.0, score)
        result = RULES[score](as_map(p), pruning=False)
        assert scores[int(result.tau)] >= scores.max() * (1 - 1e-11), kind


@pytest.mark.parametrize("score", ["dice", "iou"])
def test_large_maps_have_no_better_neighbour(score: str) -> None:
    """Objects of thousands of pixels, ties included: every volume near the found one scores no better."""
    generator = torch.Generator().manual_seed(1)
    field = torch.rand(3, 1, 128, 128, generator=generator)
    field[1] = (field[1] * 20).round() / 20
    field[2] = ((field[2] - 0.6) * 40).clamp(0, 1)
    result = RULES[score](field)
    best = EXPECTED[score](field, result.predict)
    order = field.flatten(2).argsort(dim=2, descending=True, stable=True)
    for shift in (-300, -20, -3, -2, -1, 1, 2, 3, 20, 300):
        masks = torch.zeros(3, 1, 128 * 128, dtype=torch.bool)
        for i in range(3):
            masks[i, 0, order[i, 0, : int(result.tau[i, 0]) + shift]] = True
        assert (EXPECTED[score](field, masks.view_as(field)) <= best * (1 + 1e-13)).all()


@FEW
@given(st.integers(1, 40), st.integers(0, 10**6), SCORE)
def test_permutation_invariance(pixels: int, seed: int, score: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(1, 1, pixels, generator=generator)
    order = torch.randperm(pixels, generator=generator)
    one, two = (RULES[score](x, pruning=False) for x in (p, p[:, :, order]))
    assert torch.equal(one.tau, two.tau)
    assert torch.equal(one.predict[:, :, order], two.predict)
    assert torch.equal(one.cutpoint, two.cutpoint)


@pytest.mark.parametrize("score", ["dice", "iou"])
def test_deterministic_maps_are_their_own_mask(score: str) -> None:
    masks = torch.rand(1, 3, 9, 11, generator=torch.Generator().manual_seed(0)) > 0.6
    masks[0, 0], masks[0, 1] = True, False
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for smooth in (0.0, 1.0):
            result = RULES[score](masks.to(dtype), smooth=smooth)
            assert torch.equal(result.predict, masks)
    perfect = EXPECTED[score](masks.double(), masks)
    assert torch.allclose(perfect, masks.flatten(2).any(2).double(), rtol=0, atol=1e-12)


def test_volume_grows_with_the_probability_of_the_rest() -> None:
    """In the family {0.9 × 10, q × 40} the optimal volume is 10 for small q and 50 for large: a single step."""
    taus = [int(rankseg.rank_dice(as_map(np.r_[np.full(10, 0.9), np.full(40, q)])).tau) for q in np.linspace(0, 1, 41)]
    assert taus[0] == 10 and taus[-1] == 50 and taus == sorted(taus)


@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("shape", [(2, 3, 24, 32), (2, 3, 160, 161), (1, 3, 12, 14, 10)])
def test_batch_equals_single(score: str, shape: tuple[int, ...]) -> None:
    probs = torch.softmax(3 * torch.randn(shape, generator=torch.Generator().manual_seed(3)), dim=1)
    together = RULES[score](probs)
    for i, c in itertools.product(range(shape[0]), range(shape[1])):
        alone = RULES[score](probs[i : i + 1, c : c + 1])
        assert torch.equal(alone.predict[0, 0], together.predict[i, c])
    assert torch.equal(together.tau, together.predict.flatten(2).sum(2))


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_zeros_change_nothing(score: str, overlap: bool) -> None:
    """Padding and void set to 0, as the FAQ says: the masks of the images one by one, and nothing beyond."""
    generator = torch.Generator().manual_seed(4)
    maps = [torch.softmax(2 * torch.randn(3, *size, generator=generator), 0) for size in ((20, 31), (27, 16))]
    together = torch.stack([torch.nn.functional.pad(m, (0, 31 - m.shape[2], 0, 27 - m.shape[1])) for m in maps])
    found = RULES[score](together, allow_overlap=overlap)
    for one, mask, tau in zip(maps, found.predict, found.tau, strict=True):
        alone = RULES[score](one[None], allow_overlap=overlap)
        assert alone.tau.sum() > 0
        assert torch.equal(alone.predict[0], mask[:, : one.shape[1], : one.shape[2]])
        assert torch.equal(alone.tau[0], tau) and torch.equal(tau, mask.flatten(1).sum(1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_changes_nothing_but_the_input(dtype: torch.dtype) -> None:
    """The solver rounds nothing: a map of any dtype gives the result of the same numbers in float64."""
    probs = torch.rand(2, 2, 64, 50, generator=torch.Generator().manual_seed(5)).pow(3).to(dtype)
    for rule in RULES.values():
        low, high = rule(probs), rule(probs.double())
        assert torch.equal(low.predict, high.predict)
        assert low.cutpoint.dtype == dtype
        assert torch.equal(low.cutpoint.double(), high.cutpoint)


@pytest.mark.parametrize("size", [40, 104, 1000])
def test_tiles_change_nothing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows cut into tiles of any length, or several to a tile, are the rows: volumes, masks and expected scores."""
    generator = torch.Generator().manual_seed(9)
    for shape in ((2, 2, 307), (3, 2, 83), (1, 3, 120, 120)):
        probs = torch.rand(shape, generator=generator).pow(2)
        whole = {score: rule(probs) for score, rule in RULES.items()}
        scores = {score: EXPECTED[score](probs, whole[score].predict) for score in RULES}
        with monkeypatch.context() as patch:
            patch.setitem(gather._TILE, "cpu", size)
            for score, rule in RULES.items():
                cut = rule(probs)
                assert torch.equal(cut.predict, whole[score].predict)
                assert torch.equal(cut.cutpoint, whole[score].cutpoint)
                found = EXPECTED[score](probs, cut.predict)
                assert torch.allclose(found, scores[score], rtol=1e-10, atol=0)


def test_single_precision_sums_are_accurate_enough() -> None:
    """Powers are summed in the precision of the map: the expected score of the same numbers in float64 agrees."""
    generator = torch.Generator().manual_seed(10)
    for scale, size in ((1.0, 200), (0.02, 200), (0.3, 40)):
        probs = torch.rand(2, 2, size, size, generator=generator).pow(3) * scale
        masks = probs > 0.3 * scale
        for smooth, score in itertools.product((0.0, 3.0), RULES):
            single = EXPECTED[score](probs, masks, smooth=smooth)
            double = EXPECTED[score](probs.double(), masks, smooth=smooth)
            assert torch.allclose(single, double, rtol=1e-10, atol=0)


@pytest.mark.parametrize("score", ["dice", "iou"])
def test_the_optimal_score_of_single_precision_is_as_accurate(score: str) -> None:
    """The sums over the pixels outside the bracket lose nothing where they are corrected for those above it."""
    generator = torch.Generator().manual_seed(11)
    for size in (64, 256):
        flat = (torch.randn(4, size * size, generator=generator) * 2 - 1).sigmoid()
        single, double = (solver.solve(p, gather.statistics(p), score, 0.0, True) for p in (flat, flat.double()))
        assert torch.equal(single.tau, double.tau)
        assert torch.allclose(single.value, double.value, rtol=1e-11, atol=0)


def test_cutpoint_is_the_largest_probability_left_out() -> None:
    probs = torch.rand(2, 3, 40, 40, generator=torch.Generator().manual_seed(6))
    for rule in RULES.values():
        result = rule(probs)
        assert torch.equal(result.cutpoint, probs.masked_fill(result.predict, 0).flatten(2).amax(2))
        assert torch.equal(result.predict, probs > result.cutpoint[:, :, None, None])


def test_wide_brackets_are_widened_until_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first guess that misses costs time, never the optimum."""
    probs = torch.rand(1, 2, 150, 150, generator=torch.Generator().manual_seed(7))
    right = rankseg.rank_dice(probs)
    for low, high in ((0.2, 0.21), (0.6, 0.7), (0.99, 1.0)):
        monkeypatch.setattr(
            "rankseg.surrogate.bracket",
            lambda cut, density, low=low, high=high: (torch.full_like(cut, low), torch.full_like(cut, high)),
        )
        assert torch.equal(rankseg.rank_dice(probs).predict, right.predict)


@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("levels", [(0.0, 1.0), (0.1, 0.9), (0.0, 0.9), (0.02, 1.0), (0.45, 0.55)])
@pytest.mark.parametrize("part", [0.4, 0.003])
def test_maps_of_two_levels_need_few_pixels(
    levels: tuple[float, float], part: float, score: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No pixel is near the cut-off: the bracket takes a few from both sides, not the whole row."""
    widths = []
    pack = solver.blocks

    def recorded(rows: Tensor, values: Tensor, width: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        widths.append(int(width.max()))
        yield from pack(rows, values, width)

    monkeypatch.setattr(solver, "blocks", recorded)
    generator = torch.Generator().manual_seed(12)
    masks = torch.rand(1, 2, 400, 400, generator=generator) < part
    low, high = levels
    probs = torch.where(masks, high, low)
    result = RULES[score](probs)
    best = EXPECTED[score](probs, result.predict)
    for other in (masks, torch.ones_like(masks)):
        assert (EXPECTED[score](probs, other) <= best * (1 + 1e-12)).all()
    if low == 0:
        assert torch.equal(result.predict, masks) and not result.cutpoint.any()
    # Small objects are taken whole, which are the 480 pixels or so of a level; brackets by rank are within 4096.
    if rankseg.backend() == "python":
        assert max(widths) <= 2 * 4096 + 600 and len(widths) <= 3


@pytest.mark.parametrize("smooth", [1e6, 3e12, 1e15])
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_large_smooth_keeps_the_order_of_scores(score: str, smooth: float) -> None:
    """If every score rounds to 1, the loss decides: in the limit a pixel is worth it exactly if p > 1/2."""
    generator = torch.Generator().manual_seed(13)
    probs = torch.rand(2, 2, 60, 70, generator=generator)
    probs[1, 1] *= 0.01
    limit = (probs > 0.5).flatten(2).sum(2)
    tau = RULES[score](probs, smooth=smooth, pruning=False).tau
    if smooth > 1e9:
        assert torch.equal(tau, limit)
        one_label = RULES[score](probs / probs.sum(1, keepdim=True), smooth=smooth, allow_overlap=False)
        assert torch.equal(one_label.predict, probs == probs.amax(1, keepdim=True))
    for row, p in enumerate(probs[:, :, :2].flatten(2).flatten(0, 1)):
        losses = expectations(p.numpy(), smooth, score)[1]
        found = RULES[score](p[None, None], smooth=smooth, pruning=False)
        assert losses[int(found.tau)] <= losses.min() * (1 + 1e-12), row


@pytest.mark.golden
@pytest.mark.parametrize("score", ["dice", "iou"])
def test_saturated_maps_of_a_real_network(real_data, score: str) -> None:
    data = np.load(real_data / "probabilities" / "voc2012_espnetv2.npz")
    probs = torch.softmax(torch.from_numpy(data["logits"][:2, :, ::2, ::2]).float(), dim=1)
    result = RULES[score](probs)
    best = EXPECTED[score](probs, result.predict)
    kept = probs.flatten(2).amax(2) > 0.5
    assert kept.any() and not result.predict.flatten(2).any(2)[~kept].any()
    ordered = probs.flatten(2).sort(dim=2, descending=True).values
    for at in (0.2, 0.3, 0.4, 0.5, 0.6):
        assert (EXPECTED[score](probs, probs > at)[kept] <= best[kept] * (1 + 1e-12)).all()
    for shift in (-2, -1, 1, 2):
        tau = (result.tau + shift).clamp(1, ordered.shape[2] - 1)
        cut = ordered.gather(2, tau[:, :, None])[..., None]
        assert (EXPECTED[score](probs, probs > cut)[kept] <= best[kept] * (1 + 1e-12)).all()


@pytest.mark.parametrize("score", ["dice", "iou"])
@pytest.mark.parametrize("smooth", [0.0, 5.0])
def test_one_label_a_pixel(score: str, smooth: float) -> None:
    generator = torch.Generator().manual_seed(8)
    probs = torch.softmax(2.5 * torch.randn(3, 6, 40, 40, generator=generator), dim=1)
    probs[2] = 1 / 6  # nothing is likely
    result = RULES[score](probs, smooth=smooth, allow_overlap=False)
    assert int(result.predict.sum(1).max()) == 1
    assert not result.predict[2].any()
    assert torch.equal(result.tau, result.predict.flatten(2).sum(2))
    flat, present = probs.flatten(2), probs.flatten(2).amax(2) > 0.5

    def objective(masks: Tensor) -> Tensor:
        labels = torch.where(masks.any(1), masks.float().argmax(1), 6).flatten(1)
        return surrogate_objective(flat, labels, present, score, smooth)

    assert (objective(result.predict)[:2] > objective(rankseg.argmax(probs))[:2]).all()
    # No single pixel of the first image can be relabelled with profit.
    labels = torch.where(result.predict.any(1), result.predict.float().argmax(1), 6).flatten(1)
    base = surrogate_objective(flat[:1], labels[:1], present[:1], score, smooth)
    for pixel, label in itertools.product(range(0, 1600, 97), range(7)):
        changed = labels[:1].clone()
        changed[0, pixel] = label
        assert surrogate_objective(flat[:1], changed, present[:1], score, smooth) <= base * (1 + 2e-6)


@pytest.mark.parametrize("score", ["dice", "iou"])
def test_one_label_with_ties_in_tiles(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps full of equal probabilities: one label per pixel, never below the argmax, and tiles change nothing."""
    generator = torch.Generator().manual_seed(11)
    probs = (torch.rand(3, 5, 33, 31, generator=generator) * 4).round()
    probs = probs / probs.sum(1, keepdim=True).clamp(min=1)
    whole = RULES[score](probs, allow_overlap=False)
    assert int(whole.predict.sum(1).max()) == 1
    assert torch.equal(whole.tau, whole.predict.flatten(2).sum(2))
    assert torch.equal(whole.cutpoint, probs.masked_fill(whole.predict, 0).flatten(2).amax(2))
    present = probs.flatten(2).amax(2) > 0.5

    def objective(masks: Tensor) -> Tensor:
        labels = torch.where(masks.any(1), masks.float().argmax(1), 5).flatten(1)
        return surrogate_objective(probs.flatten(2), labels, present, score, 0.0)

    assert (objective(whole.predict) >= objective(rankseg.argmax(probs) & present[..., None, None])).all()
    monkeypatch.setitem(gather._TILE, "cpu", 500)
    assert torch.equal(RULES[score](probs, allow_overlap=False).predict, whole.predict)
