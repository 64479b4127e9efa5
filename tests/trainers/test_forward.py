"""Scoring, calibration and pictures see the same logits, in the precision of the training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rankseg.calibration import fit_temperature, focal_correction
from rankseg.rules import threshold
from tests.trainers.test_update import ALONE
from trainers.evaluator import evaluate
from trainers.fitted import fit_calibration_on
from trainers.forward import ToProbs, forward, logits_of
from trainers.losses import CrossEntropy
from trainers.metrics import Scoring
from trainers.panels import panels

INFO = SimpleNamespace(
    mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2), num_classes=2, scored=(1,), palette=[(0, 0, 0), (255, 0, 0)]
)


class Net(nn.Module):
    """Logits at half the size of the images; notes in which precision it computed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(3, 2, 3, stride=2, padding=1)
        self.seen: list[torch.dtype] = []

    def forward(self, images: Tensor) -> Any:
        logits = 4 * self.layer(images)
        self.seen.append(logits.dtype)
        return SimpleNamespace(logits=logits, aux=None)


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    return [
        SimpleNamespace(
            images=torch.randn(1, 3, 8, 8, generator=generator),
            targets=torch.randint(0, 2, (1, 12, 10), generator=generator),
            names=[f"image{k}"],
            indices=[k],
        )
        for k in range(3)
    ]


def test_probabilities_are_corrected_with_the_exponent_of_the_loss() -> None:
    logits = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = logits.softmax(1)
    assert torch.equal(ToProbs("softmax", focal_gamma=0)(logits), raw)
    for gamma in (0.5, 2.0):
        assert torch.equal(ToProbs("softmax", focal_gamma=gamma)(logits), focal_correction(raw, gamma))


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_every_use_sees_the_same_logits(precision: str, dtype: torch.dtype) -> None:
    net, given = Net(), batches()
    logits = [found for _, _, found in forward(net, given, ALONE, precision=precision)]
    assert all(one.dtype == torch.float32 and one.shape == (1, 2, 12, 10) for one in logits)
    single = [logits_of(net, b.images, b.targets.shape[-2:], ALONE, precision) for b in given]
    assert all(torch.equal(a, b) for a, b in zip(logits, single, strict=True))

    scored: list[Tensor] = []
    evaluate(
        net, given, {"T": threshold}, CrossEntropy(), Scoring(2, (1,)), ALONE, precision=precision,
        to_probs=lambda found: scored.append(found.clone()) or found.softmax(1),
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(logits, scored, strict=True))

    data = SimpleNamespace(
        names=[b.names[0] for b in given], info=INFO, read=lambda k: (given[k].images[0], given[k].targets[0])
    )
    drawn = panels(net, data, lambda *pair: pair, {}, ToProbs("softmax"), ALONE, range(3), precision)
    assert all(torch.equal(a.softmax(1)[0], panel.probs) for a, (_, panel) in zip(logits, drawn, strict=True))

    fitted = fit_calibration_on(fit_temperature, net, given, "softmax", ALONE, precision=precision)
    pixels = torch.cat([one.flatten(2) for one in logits], dim=2)
    labels = torch.cat([b.targets.flatten(1) for b in given], dim=1)
    assert fitted == pytest.approx(float(fit_temperature(pixels, labels, "softmax")), rel=1e-6)
    assert set(net.seen) == {dtype}
