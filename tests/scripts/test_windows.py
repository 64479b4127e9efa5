"""Windows, flips, scales and the label map of prediction, without a file."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datasets import DatasetInfo
from datasets.transforms import normalise
from rankseg import argmax, rankdice, threshold
from scripts.decoding.arrays import scratch
from scripts.inference.windows import View, is_separable, label_map, masks_of, probabilities, starts

INFO = DatasetInfo("three", ("background", "a", "b"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), (1, 2))


def picture(height: int, width: int, seed: int = 0) -> Tensor:
    """A smooth random image (3, H, W) uint8."""
    noise = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (nn.functional.interpolate(noise, (height, width), mode="bicubic")[0].clamp(0, 1) * 255).byte()


class Spy(nn.Module):
    """Logits that depend on each pixel alone, so that windows cannot matter; notes the sizes it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return torch.stack([images[:, 0], 2 * images[:, 1], images[:, 2] - images[:, 0]], 1)


def look(image: Tensor, network: nn.Module, **options: object) -> Tensor:
    scale = partial(normalise, mean=INFO.mean, std=INFO.std)
    return probabilities(image, network, lambda logits: logits.softmax(1), scale, View(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("size", [(64, 64), (97, 41), (33, 150), (20, 20)])
def test_windows_of_a_pixelwise_network_equal_the_whole(size: tuple[int, int], overlap: float) -> None:
    image, spy = picture(*size), Spy()
    whole = look(image, Spy())
    torch.testing.assert_close(look(image, spy, window=32, overlap=overlap, batch=3), whole, atol=1e-5, rtol=0)
    assert all(n <= 3 and h <= 32 and w <= 32 for n, _, h, w in spy.seen)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 100, 257])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.75])
def test_windows_cover_everything_and_stay_inside(length: int, overlap: float) -> None:
    begins = starts(length, min(32, length), overlap)
    assert begins[0] == 0 and begins[-1] + min(32, length) == length
    gaps = np.diff(begins)
    assert (gaps > 0).all() and (gaps <= max(1, round(32 * (1 - overlap)))).all()


def test_flips_and_scales_average_probabilities() -> None:
    image = picture(40, 60)

    class LeftRight(nn.Module):  # depends on where a pixel lies, as a network with padding does
        def forward(self, images: Tensor) -> Tensor:
            ramp = torch.linspace(-1, 1, images.shape[-1]).expand_as(images[:, 0])
            return torch.stack([ramp, -ramp, images[:, 0]], 1)

    plain, mirrored = look(image, LeftRight()), look(image.flip(-1), LeftRight()).flip(-1)
    torch.testing.assert_close(look(image, LeftRight(), flip=True), (plain + mirrored) / 2)
    double = look(image, LeftRight(), scales=(2.0,))
    both = look(image, LeftRight(), scales=(1.0, 2.0))
    torch.testing.assert_close(both, (plain + double) / 2, atol=1e-6, rtol=0)
    torch.testing.assert_close(both.sum(0), torch.ones(40, 60))


def test_windows_are_measured_as_the_network_sees_them() -> None:
    spy = Spy()
    probs = look(picture(120, 90), spy, window=32, scales=(0.5, 2.0), resize=60)
    assert probs.shape == (3, 120, 90) and all(max(h, w) <= 32 for _, _, h, w in spy.seen)


def test_probabilities_beyond_the_memory_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = picture(70, 80)
    inside = look(image, Spy(), window=32)
    monkeypatch.setattr("scripts.inference.windows.IN_MEMORY", 0)
    outside = look(image, Spy(), window=32, folder=tmp_path)
    assert torch.equal(inside, outside)
    assert not list(tmp_path.iterdir())  # nothing is left behind
    array = scratch((2, 3), np.float32, tmp_path, 0)
    assert isinstance(array, np.memmap) and not array.any() and array.shape == (2, 3)


@pytest.mark.parametrize("options", [{"window": 3}, {"overlap": 0.9}, {"scales": ()}, {"scales": (0,)}, {"batch": 0}])
def test_impossible_views_are_rejected(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}="):
        View(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "rule", [threshold, argmax, rankdice, partial(rankdice, app=2), partial(rankdice, allow_overlap=False)]
)
def test_classes_one_by_one_are_classes_at_once(rule: partial) -> None:
    probs = (3 * torch.randn(3, 24, 31, generator=torch.Generator().manual_seed(0))).softmax(0)
    assert torch.equal(torch.stack(list(masks_of(probs, rule))), rule(probs[None])[0])
    expected = rule is not argmax and not (isinstance(rule, partial) and "allow_overlap" in rule.keywords)
    assert is_separable(rule) == expected


def test_labels_resolve_overlaps_and_gaps_as_documented() -> None:
    #         overlap a<b | a alone | nobody | background too | tie
    probs = torch.tensor([[0.1, 0.1, 0.3, 0.9, 0.0], [0.6, 0.7, 0.4, 0.6, 0.5], [0.8, 0.2, 0.3, 0.1, 0.5]])
    labels = label_map(probs[:, None], threshold, INFO)
    assert labels.tolist() == [[2, 1, 0, 1, 1]]
    all_scored = DatasetInfo("all", INFO.classes, INFO.palette, (0, 1, 2))
    assert label_map(probs[:, None], threshold, all_scored).tolist() == [[2, 1, 255, 0, 1]]


def test_labels_of_argmax_are_argmax() -> None:
    probs = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(1)).softmax(0)
    assert torch.equal(label_map(probs, argmax, INFO).long(), probs.argmax(0))
    with pytest.raises(ValueError, match=r"2 classes.*3"):
        label_map(probs[:2], argmax, INFO)
