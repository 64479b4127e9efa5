"""evaluate(): no number depends on how the images were put into batches or shared between processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainers import forward
from trainers.distributed import World
from trainers.evaluator import evaluate
from trainers.losses import CrossEntropy
from trainers.metrics import Scoring
from trainers.results import comparison_table

ALONE = World(0, 1, torch.device("cpu"))
IMAGES, CLASSES = 11, 3
SCORING = Scoring(CLASSES, (1, 2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, CLASSES, 1).double()

    def forward(self, images: Tensor) -> Any:
        return SimpleNamespace(logits=self.layer(images), aux=None)


def image(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    pixels = torch.randn(3, 6, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, CLASSES, (12, 12), generator=generator)
    target[:, : index % 5] = 255
    return pixels, target


def batches(size: int, indices: range = range(IMAGES)) -> Iterator[Any]:
    for start in range(0, len(indices), size):
        chosen = list(indices[start : start + size])
        pixels, targets = zip(*map(image, chosen), strict=True)
        yield SimpleNamespace(
            images=torch.stack(pixels),
            targets=torch.stack(targets),
            names=[f"image{index:02d}" for index in chosen],
            indices=chosen,
        )


def argmax(probs: Tensor) -> Tensor:
    return torch.zeros_like(probs, dtype=torch.bool).scatter_(1, probs.argmax(1, keepdim=True), True)


def half(probs: Tensor) -> Tensor:
    return probs >= 0.5


RULES = {"max": argmax, "T": half}


def score(given: Any, where: World = ALONE) -> Any:
    return evaluate(Net(), given, RULES, CrossEntropy(), SCORING, where)


def close(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key])
    else:
        assert a == pytest.approx(b, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("size", [1, 4, 11])
def test_the_batch_size_changes_nothing(size: int) -> None:
    expected, found = score(batches(3)), score(batches(size))
    for rule in RULES:
        assert found[rule].names == expected[rule].names == [f"image{k:02d}" for k in range(IMAGES)]
        assert torch.equal(found[rule].counts.intersection, expected[rule].counts.intersection)
        close(found[rule].scores, expected[rule].scores)


@pytest.mark.parametrize("size", [2, 3, 16])
def test_any_number_of_shares_makes_the_whole(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process's share is scored by itself; what they would gather is then given to one of them."""
    shares: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(forward, "gather_objects", lambda value, where: shares.append(value) or [value])
        for rank in range(size):
            indices = [k for start in range(2 * rank, IMAGES, 2 * size) for k in range(start, min(start + 2, IMAGES))]
            if indices:
                score(batches(2, indices), World(rank, size, ALONE.device))
            else:  # more processes than images
                with pytest.raises(ValueError, match="no image"):
                    score(batches(2, indices), World(rank, size, ALONE.device))
    with monkeypatch.context() as patch:
        patch.setattr(forward, "gather_objects", lambda value, where: shares)
        found = score(batches(2))
    expected = score(batches(3))
    for rule in RULES:
        assert found[rule].names == expected[rule].names
        assert torch.equal(found[rule].counts.predicted, expected[rule].counts.predicted)
        close(found[rule].scores, expected[rule].scores)


def test_the_state_of_the_generators_is_left_alone() -> None:
    network = Net()  # seeds the generator
    torch.manual_seed(5)
    before = torch.get_rng_state()
    evaluate(network, batches(3), RULES, CrossEntropy(), SCORING, ALONE)
    assert torch.equal(before, torch.get_rng_state())


def test_no_image_at_all_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"no image to score.*split"):
        score(iter(()))


def test_the_best_score_is_marked_beside_a_score_that_no_image_defines() -> None:
    found = score(batches(3))
    found["max"] = replace(found["max"], scores={**found["max"].scores, "mean_dice": math.nan})
    assert f"{100 * found['T'].scores['mean_dice']:.2f}*" in comparison_table(found)
