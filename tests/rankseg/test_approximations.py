"""The published approximations: recordings of the original, and the laws they are made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rankseg
from rankseg import approximations
from tests.rankseg.oracle import laws


def recorded(file: Path) -> list[tuple[str, Tensor, np.ndarray, dict]]:
    """Cases of one golden file: name, probabilities, volumes, options."""
    data = np.load(file)
    cases = []
    for key in data.files:
        if not key.endswith("__tau"):
            continue
        name, probs = key.removesuffix("__tau"), data["probs"] if "probs" in data else data[f"{key[0]}_prob"]
        parts = name.split("__")[-4:]
        variant = "published" if parts[0] in ("top", "rankseg") else "experiments"
        truncated = parts[3] in ("truncate1", "trunc_True") or (parts[3] == "trunc_default" and parts[0] == "rankdice")
        options = {"app": int(parts[1][3:]), "smooth": float(parts[2][6:]), "truncate_mean": truncated}
        cases.append((name, torch.from_numpy(probs), data[key], options | {"variant": variant}))
    return cases


@pytest.mark.golden
@pytest.mark.parametrize("file", ["rank_dice_a", "rank_dice_b", "rank_dice_c", "full/rankdice"])
def test_volumes_of_the_original(recordings, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal volumes, or a pixel away where the approximate scores differ by less than 1e-6."""
    seen = {}
    best = approximations._best

    def spy(ordered, law, upper, smooth, refined, variant):
        seen["arguments"] = (ordered, law, upper, smooth, refined, variant)
        return best(ordered, law, upper, smooth, refined, variant)

    monkeypatch.setattr(approximations, "_best", spy)
    for name, probs, volumes, options in recorded(recordings / f"{file}.npz"):
        result = rankseg.rank_dice(probs, **options)
        assert torch.equal(result.tau, result.predict.flatten(2).sum(2)), name
        for i, c in np.argwhere(result.tau.numpy() != volumes):
            ours, theirs = int(result.tau[i, c]), int(volumes[i, c])
            assert abs(ours - theirs) <= 2, name
            rankseg.rank_dice(probs[i : i + 1, c : c + 1], **options)
            ordered, law, upper, smooth, refined, variant = seen["arguments"]
            capped = torch.full_like(upper, theirs)
            # The best score up to the original's volume, against the best of all.
            if theirs < ours:
                short = best(ordered, law, capped, smooth, refined, variant)[1]
                assert float(best(ordered, law, upper, smooth, refined, variant)[1] - short) < 1e-6, name


@pytest.mark.golden
def test_voc_maps_of_the_original(recordings, real_data) -> None:
    logits = np.load(real_data / "probabilities" / "voc2012_espnetv2.npz")["logits"][:2].astype(np.float32)
    probs = torch.softmax(torch.from_numpy(logits), dim=1)[:, :, ::2, ::2]
    data = np.load(recordings / "rank_dice_voc.npz")
    cases = [key for key in data.files if key.endswith("__tau")]
    assert cases
    far = 0
    for key in cases:
        kind, app, smooth, truncate, _ = key.split("__")
        result = rankseg.rank_dice(
            probs,
            app=int(app[3:]),
            smooth=float(smooth[6:]),
            truncate_mean=truncate.endswith("1"),
            variant="published" if kind == "top" else "experiments",
        )
        theirs = torch.from_numpy(data[key]).long()
        away = (result.tau - theirs).abs() > 2
        far += int(away.sum())
        if not away.any():
            continue
        ours_score = rankseg.expected_dice(probs, result.predict, float(smooth[6:]))
        # Where the original stops short or breaks down, ours must be the better mask.
        order = probs.flatten(2).argsort(dim=2, descending=True, stable=True)
        ranks = order.argsort(dim=2)
        masks = (ranks < theirs[:, :, None]).view_as(probs)
        theirs_score = rankseg.expected_dice(probs, masks, float(smooth[6:]))
        assert (ours_score[away] >= theirs_score[away] - 1e-9).all(), key
    assert far <= 2 * len(cases)


DEGENERATE = {
    "all zero": (torch.zeros(1, 1, 8, 8), 0),
    "all one": (torch.ones(1, 1, 8, 8), 64),
    "one pixel": (torch.full((1, 1, 1, 1), 0.9), 1),
    "one confident pixel": (
        torch.zeros(1, 1, 8, 8).index_put((*torch.zeros(4, 1).long(),), torch.tensor(0.99)),
        1,
    ),
    "clean object": ((torch.arange(64.0) < 20).float().view(1, 1, 8, 8), 20),
    "near-certain object": (torch.where(torch.arange(256) < 100, 0.9999, 1e-6).view(1, 1, 16, 16), 100),
    "two levels": (torch.where(torch.arange(2000) < 1000, 0.999, 0.3).view(1, 1, 40, 50), None),
    "tiny image": (torch.full((1, 1, 3, 3), 0.9), 9),
    "constant": (torch.full((1, 1, 16, 16), 0.6), 256),
}


@pytest.mark.parametrize("app", [0, 1, 2])
@pytest.mark.parametrize("name", list(DEGENERATE))
def test_maps_where_the_original_fails(name: str, app: int) -> None:
    probs, volume = DEGENERATE[name]
    result = rankseg.rank_dice(probs, app=app)
    best = rankseg.expected_dice(probs, rankseg.rank_dice(probs).predict)
    assert volume is None or int(result.tau) == volume
    assert int(result.predict.sum()) == int(result.tau)
    assert (rankseg.expected_dice(probs, result.predict) >= best - 1e-3).all()


def test_half_is_pruned_by_one_variant_only() -> None:
    probs = torch.full((1, 1, 20, 20), 0.5)
    assert int(rankseg.rank_dice(probs, app=2).tau) == 0
    assert int(rankseg.rank_dice(probs, app=2, variant="experiments").tau) == 400
    assert int(rankseg.rank_dice(probs, app=2, pruning=False).tau) == 400


def test_range_below_the_support() -> None:
    """The published function takes the end of its range, the experiments' variant selects nothing."""
    probs = torch.where(torch.arange(2000) < 1000, 0.999, 0.3).view(1, 1, 40, 50)
    assert int(rankseg.rank_dice(probs, app=2).tau) == 1000
    assert int(rankseg.rank_dice(probs, app=2, variant="experiments").tau) == 0


@pytest.mark.parametrize("app", [1, 2])
def test_close_to_exact_on_ordinary_maps(app: int) -> None:
    probs = torch.softmax(3 * torch.randn(2, 4, 48, 48, generator=torch.Generator().manual_seed(0)), dim=1)
    for smooth in (0.0, 10.0):
        best = rankseg.expected_dice(probs, rankseg.rank_dice(probs, smooth=smooth).predict, smooth)
        near = rankseg.expected_dice(probs, rankseg.rank_dice(probs, app=app, smooth=smooth).predict, smooth)
        assert (near <= best * (1 + 1e-12)).all() and (near > best - 1e-5).all()


def test_interpolated_scores_equal_the_sums_they_replace() -> None:
    """T-RNA's score by Chebyshev and FFT against the plain double sum over pixels and counts."""
    p = torch.rand(1, 150, generator=torch.Generator().manual_seed(1), dtype=torch.float64).sort(1, True).values
    mean, variance, _ = approximations.moments(p)
    low = torch.tensor([50])
    support = low[:, None] + torch.arange(60)

    def weights(q: float) -> Tensor:
        sigma = (variance - q * (1 - q)).sqrt()[:, None]
        return torch.exp(-(((support - mean[:, None] + q) / sigma) ** 2) / 2) / sigma

    pairs = zip(approximations._chebyshev(p), approximations._coefficients(weights), strict=True)
    fast = sum((p * t).cumsum(1) * approximations._correlate(c, low, 150, 2.0) for t, c in pairs)
    summed = torch.stack([q * weights(float(q))[0] for q in p[0]]).cumsum(0)
    tau = torch.arange(1, 151)[:, None]
    assert torch.allclose(fast[0], (summed / (support + tau + 2.0)).sum(1), rtol=1e-10)


def test_exact_law_and_moments_agree_with_the_characteristic_function() -> None:
    p = torch.rand(3, 40, generator=torch.Generator().manual_seed(2))
    count = torch.arange(41.0, dtype=torch.float64)
    turns = torch.exp(-2j * torch.pi * count / 41)  # the law is the inverse transform of E[turn^count]
    characteristic = (1 + p.double()[:, :, None] * (turns - 1)).prod(1)
    fourier = torch.fft.ifft(characteristic, dim=1).real
    found = approximations.moments(p)
    for row in range(3):
        law = torch.from_numpy(laws(p[row].double().numpy())[-1])
        assert torch.allclose(law, fourier[row], atol=1e-14)
        mean = law @ count
        assert torch.allclose(mean, found[0][row])
        assert torch.allclose(law @ (count - mean) ** 2, found[1][row])
        assert torch.allclose(law @ (count - mean) ** 3, found[2][row])


def test_refined_normal_law() -> None:
    from scipy import stats

    x, none = torch.linspace(-4, 4, 33, dtype=torch.float64), torch.zeros(33, dtype=torch.float64)
    assert np.allclose(approximations.refined_cdf(x, none), stats.norm.cdf(x))
    skew = torch.tensor([-1.0, 0.0, 0.3], dtype=torch.float64)
    for level in (1e-4, 0.5, 1 - 1e-4):
        root = approximations.refined_quantile(level, skew)
        assert torch.allclose(approximations.refined_cdf(root, skew), torch.full_like(skew, level), atol=1e-12)
    p = torch.rand(200, generator=torch.Generator().manual_seed(3))
    law, (mean, variance, third) = torch.from_numpy(laws(p.double().numpy())[-1]).cumsum(0), approximations.moments(p)
    count = (torch.arange(201) + 0.5 - mean) / variance.sqrt()
    assert (approximations.refined_cdf(count, third / variance**1.5) - law).abs().max() < 5e-4


@pytest.mark.parametrize("app", [1, 2])
@pytest.mark.parametrize("smooth", [1e10, 1e15])
def test_large_smooth_keeps_the_order_of_scores(app: int, smooth: float) -> None:
    probs = torch.rand(1, 2, 60, 70, generator=torch.Generator().manual_seed(13))
    assert torch.equal(rankseg.rank_dice(probs, app, smooth).tau, (probs > 0.5).flatten(2).sum(2))
