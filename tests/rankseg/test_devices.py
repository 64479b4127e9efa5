"""The torch path on other devices: the same results, no mixed operands, few synchronisations and launches."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import rankseg
from rankseg import exact, gather
from rankseg.calibration import Reliability, focal_correction
from rankseg.expected import gate_by_score
from rankseg.masks import RankResult
from rankseg.pooled import ProbabilityHistogram
from tests.rankseg.claiming import DEVICE, Claiming, Ledger

RULES: dict[str, Callable[..., RankResult]] = {
    "dice": rankseg.rank_dice,
    "iou": rankseg.rank_iou,
    "one label, dice": functools.partial(rankseg.rank_dice, allow_overlap=False),
    "one label, iou": functools.partial(rankseg.rank_iou, allow_overlap=False),
    "T-RNA": functools.partial(rankseg.rank_dice, app=1),
    "BA": functools.partial(rankseg.rank_dice, app=2),
}


@functools.cache
def maps() -> dict[str, Tensor]:
    """Probabilities of unlike shapes, sizes and kinds."""
    generator = torch.Generator().manual_seed(0)

    def softmax(sharpness: float, *shape: int) -> Tensor:
        return torch.softmax(sharpness * torch.randn(shape, generator=generator), 1)

    small = torch.rand(1, 3, 64, 64, generator=generator) ** 20
    return {
        "one small image": torch.rand(1, 2, 24, 31, generator=generator),
        "images": softmax(3, 3, 5, 80, 80),
        "classes": softmax(6, 1, 60, 40, 40),
        "a volume": torch.rand(1, 2, 60, 60, 40, generator=generator) ** 3,
        "zeros and ones": (torch.rand(1, 3, 150, 150, generator=generator) < 0.3).float(),
        "tiny objects": small,
        "tied": (torch.rand(1, 2, 90, 90, generator=generator) * 8).round() / 8,
        "half precision": softmax(4, 1, 3, 90, 90).half(),
        "nothing": torch.zeros(1, 2, 30, 30),
    }


@pytest.mark.parametrize(
    ("kind", "smooth"),
    [
        *((kind, 0.0) for kind in maps()),
        *(
            pytest.param(kind, 2.5, marks=() if kind in ("images", "tied", "nothing") else pytest.mark.slow)
            for kind in maps()
        ),
    ],
)
@pytest.mark.parametrize("name", list(RULES))
def test_results_and_costs(name: str, kind: str, smooth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small maps, but cut into as many tiles as the largest are: the bounds hold at any size."""
    monkeypatch.setattr(gather, "_MIN_DEVICE_TILE", 1)
    probs = maps()[kind]
    here = RULES[name](probs, smooth=smooth)
    with Ledger() as ledger:
        there = RULES[name](Claiming(probs), smooth=smooth)
    for mine, other in zip(here, there, strict=True):
        assert isinstance(other, Claiming) and other.device == DEVICE
        assert torch.equal(mine, other.inner)
    assert sum(ledger.waits.values()) <= 30, ledger.waits
    # The approximations are kept for comparison, not for speed; the bisection for their search range has 60 steps.
    assert sum(ledger.launches.values()) <= (3500 if name in ("T-RNA", "BA") else 1000), ledger.launches


@pytest.mark.parametrize("kind", list(maps()))
def test_the_rest_of_the_package(kind: str) -> None:
    """Expected scores, plain rules, confidence, calibration, pooled cut-offs, label maps."""
    probs = maps()[kind].float()
    masks = probs > 0.4
    masks[0, -1] = False
    classes = probs.shape[1]
    onehot = torch.nn.functional.one_hot(probs.argmax(1), classes).movedim(-1, 1)
    valid = probs[:, 0] > 0.1

    def results(probs: Tensor, masks: Tensor, onehot: Tensor, valid: Tensor) -> list[Tensor]:
        reliability, histogram = Reliability(5), ProbabilityHistogram()
        reliability.update(probs, onehot, valid)
        histogram.update(probs, valid)
        return [
            rankseg.expected_dice(probs, masks),
            rankseg.expected_dice(probs, masks, smooth=1e-6),
            rankseg.expected_iou(probs, masks, smooth=3.0),
            rankseg.threshold(probs, at=0.3),
            rankseg.argmax(probs),
            rankseg.rankdice(probs, allow_overlap=False, classes=[classes - 1]),
            rankseg.confidence(probs, masks),
            rankseg.label_map(masks, probs=probs),
            focal_correction(probs),
            reliability.classwise_ece(),
            histogram.cutoffs(),
        ]

    here = results(probs, masks, onehot, valid)
    with Ledger():
        there = results(*(Claiming(x) for x in (probs, masks, onehot, valid)))
    for i, (mine, other) in enumerate(zip(here, there, strict=True)):
        assert isinstance(other, Claiming), i
        assert torch.allclose(mine.double(), other.inner.double(), rtol=1e-10, atol=1e-300, equal_nan=True), i


@pytest.mark.parametrize("smooth", [0.0, 0.5])
def test_expected_scores_wait_as_rarely(smooth: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "_MIN_DEVICE_TILE", 1)
    for probs in maps().values():
        with Ledger() as ledger:
            rankseg.expected_dice(Claiming(probs), Claiming(probs > 0.5), smooth)
        assert sum(ledger.waits.values()) <= 30, ledger.waits
        assert sum(ledger.launches.values()) <= 1000, ledger.launches


def test_mixed_devices_are_noticed() -> None:
    """The tensors of these tests are no use unless they complain."""
    with pytest.raises(RuntimeError, match="in one operation"), Ledger():
        Claiming(torch.ones(3)) + torch.ones(3)
    with Ledger() as ledger:
        assert float(Claiming(torch.ones(3)).sum()) == 3
    assert ledger.waits == {"_local_scalar_dense": 1} and ledger.launches["sum"] == 1


def test_metrics_of_the_trainers() -> None:
    """What evaluation does with the masks of a device: encode the labels, and count."""
    metrics = pytest.importorskip("trainers.metrics")
    labels = torch.randint(0, 4, (2, 9, 8), generator=torch.Generator().manual_seed(1))
    labels[0, :2] = 255
    masks = torch.rand(2, 4, 9, 8, generator=torch.Generator().manual_seed(2)) > 0.5
    here = metrics.count(masks, metrics.Scoring(4, ()).encode(labels))
    with Ledger():
        there = metrics.count(Claiming(masks), metrics.Scoring(4, ()).encode(Claiming(labels)))
    for name in ("intersection", "predicted", "actual", "pixels"):
        mine, other = getattr(here, name), getattr(there, name)
        assert isinstance(other, Claiming) and torch.equal(mine, other.inner)


def test_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    """`evaluate` and `record_masks`, from the network to the tables with every rule: equal numbers, nothing mixed."""
    evaluator = pytest.importorskip("trainers.evaluator")
    metrics = pytest.importorskip("trainers.metrics")
    forward = pytest.importorskip("trainers.forward")
    from scripts.analysis.selective import record_masks
    from trainers.distributed import World
    from trainers.fitted import ThresholdTable
    from trainers.losses import CrossEntropy

    # torch has no autocast for this device; in fp32 it does nothing.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (4, 20, 24), generator=generator)
    labels[1:, :3] = 255
    pixels = torch.randn(4, 3, 10, 12, generator=generator)
    rules = {
        "max": rankseg.argmax,
        "T": functools.partial(rankseg.threshold, at=0.5),
        "rankdice": rankseg.rankdice,
        "rankiou": rankseg.rankiou,
        "gated": lambda probs: gate_by_score(probs, rankseg.rankdice(probs, pruning=False), 0.6),
        "one label": functools.partial(rankseg.rankdice, allow_overlap=False),
    }

    class Network(torch.nn.Module):
        def forward(self, images: Tensor) -> Any:
            return SimpleNamespace(logits=4 * images, aux=None)

    def results(device: torch.device) -> list[Any]:
        batches = [
            SimpleNamespace(images=pixels[i], targets=labels[i], names=["a", "b"], indices=[2 * k, 2 * k + 1])
            for k, i in enumerate((slice(0, 2), slice(2, 4)))
        ]
        world = World(0, 1, device)
        found: list[Any] = []
        for void in ("masked", "counted"):
            scoring = metrics.Scoring(3, (0, 1, 2), void=void)
            scored = evaluator.evaluate(Network(), batches, rules, CrossEntropy(), scoring, world, confidences=True)
            found += [(x.counts, x.confidence, x.scores) for x in scored.values()]
            record = record_masks(
                Network(), batches, rankseg.rankdice, forward.ToProbs("softmax", 1.3, 2.0), scoring, world
            )
            found.append((record.counts, record.confidence, record.signals()))
            probs, truth = (4 * pixels.to(device)).softmax(1), scoring.encode(labels[:, ::2, ::2].to(device))
            found.append(ThresholdTable.of_batch(probs, truth).dice())
        return found

    here = results(torch.device("cpu"))
    exact.node_table.cache_clear()  # these tensors cannot be used in inference mode if they were made outside, nor back
    with Ledger() as ledger:
        there = results(DEVICE)
    exact.node_table.cache_clear()
    assert ledger.launches, "nothing ran on the device"
    # The probabilities are float32, and the operations of the network are rounded in another order.
    torch.testing.assert_close(_plain(there), _plain(here), rtol=1e-6, atol=1e-9, equal_nan=True)


def _plain(found: Any) -> Any:
    """Dataclasses as dictionaries, and every tensor on the CPU."""
    if isinstance(found, Tensor):
        assert not isinstance(found, Claiming), "a result was left on the device"
        return found
    if dataclasses.is_dataclass(found):
        return {field.name: _plain(getattr(found, field.name)) for field in dataclasses.fields(found)}
    if isinstance(found, dict):
        return {name: _plain(value) for name, value in found.items() if name not in ("seconds",)}
    return [_plain(x) for x in found] if isinstance(found, (list, tuple)) else found
