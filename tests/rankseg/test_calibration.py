"""Calibration: known miscalibration is measured, and undone."""

from __future__ import annotations

import math
from decimal import Decimal

import pytest
import torch
from torch import Tensor

from rankseg.calibration import Reliability, ece, fit_calibration, fit_temperature, focal_correction


def sample(temperature: float, link: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits that are `temperature` times too sharp, their labels (3, 50, 50), and the one-hot labels."""
    generator = torch.Generator().manual_seed(seed)
    true = 1.5 * torch.randn(3, 3, 50, 50, generator=generator)
    probs = torch.softmax(true, 1).movedim(1, -1).reshape(-1, 3)
    labels = torch.multinomial(probs, 1, generator=generator).view(3, 50, 50)
    return temperature * true, labels, torch.nn.functional.one_hot(labels, 3).movedim(-1, 1)


def test_ece_of_a_forecaster_that_is_right_and_one_that_is_not() -> None:
    probs = torch.full((1, 1, 1000), 0.7)
    right = (torch.arange(1000) < 700).long().view(1, 1, 1000)
    assert ece(probs, right) == pytest.approx(0, abs=1e-6)
    assert ece(probs, torch.ones_like(right)) == pytest.approx(0.3, abs=1e-6)
    assert math.isnan(Reliability().ece())


def test_batches_merge_to_the_whole() -> None:
    logits, labels, onehot = sample(2.0, "softmax")
    probs, valid = torch.softmax(logits, 1), labels != 2
    whole, parts, rest = Reliability(10), Reliability(10), Reliability(10)
    whole.update(probs, onehot, valid)
    parts.update(probs[:1], onehot[:1], valid[:1])
    rest.update(probs[1:], onehot[1:], valid[1:])
    parts.merge(rest).merge(Reliability(10))
    assert parts.ece() == pytest.approx(whole.ece())
    assert torch.allclose(parts.classwise_ece(), whole.classwise_ece())
    curve = whole.curve()
    assert int(curve.pixels.sum()) == 3 * int(valid.sum())
    assert torch.equal(curve.confidence.isnan(), curve.pixels == 0)
    # By hand, one bin of one class.
    inside = (probs[:, 1] >= 0.3) & (probs[:, 1] < 0.4) & valid
    assert float(curve.confidence[1, 3]) == pytest.approx(float(probs[:, 1][inside].mean()), rel=1e-5)
    assert float(curve.frequency[1, 3]) == pytest.approx(float(onehot[:, 1][inside].double().mean()))


@pytest.mark.parametrize("classwise", [False, True])
def test_temperature_is_recovered(classwise: bool) -> None:
    logits, labels, onehot = sample(2.5, "softmax")
    labels[0, :5] = 255
    temperature = fit_temperature(logits, labels, classwise=classwise)
    assert temperature.shape == ((3,) if classwise else ())
    assert torch.allclose(temperature, torch.tensor(2.5).double(), rtol=0.08)
    if not classwise:
        before, after = (ece(torch.softmax(x, 1), onehot) for x in (logits, logits / temperature))
        assert after < 0.2 * before


def test_temperature_of_one_against_rest() -> None:
    generator = torch.Generator().manual_seed(1)
    true = 2 * torch.randn(4, 2, 50, 50, generator=generator)
    true[:, 1] = -true[:, 0]
    labels = (torch.rand(4, 50, 50, generator=generator) < torch.sigmoid(true[:, 1])).long()
    assert float(fit_temperature(3 * true, labels, link="sigmoid")) == pytest.approx(3, rel=0.08)


@pytest.mark.parametrize("scale", [1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_temperature_of_small_logits(scale: float, link: str) -> None:
    """At T = 1 their gradient is small, but the fit must not stop there: their temperature has their scale."""
    logits, labels, _ = sample(2.0, "softmax")
    expected = max(float(fit_temperature(logits, labels, link)) * scale, 1e-3)
    assert float(fit_temperature(logits.double() * scale, labels, link)) == pytest.approx(expected, rel=1e-4)
    assert float(fit_temperature(logits * 0, labels, link)) == 1


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
def test_focal_correction_inverts_the_focal_minimiser(gamma: float) -> None:
    """Minimise the expected focal loss numerically; the correction must give the true probabilities back."""
    true = torch.tensor([[0.6, 0.3, 0.1], [0.05, 0.9, 0.05], [1 / 3, 1 / 3, 1 / 3]], dtype=torch.float64)
    scores = torch.log(true).requires_grad_(True)
    optimizer = torch.optim.LBFGS([scores], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16)

    def closure() -> Tensor:
        optimizer.zero_grad()
        v = torch.softmax(scores, 1)
        loss = -(true * (1 - v) ** gamma * torch.log(v)).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
    trained = torch.softmax(scores.detach(), 1)[:, :, None]
    if gamma > 1:
        assert not torch.allclose(trained[:, :, 0], true, atol=0.02)  # focal is not calibrated by itself
    assert torch.allclose(focal_correction(trained, gamma)[:, :, 0], true, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.1, 2.0, 200.0, 1000.0])
def test_focal_correction_makes_the_weighted_gradients_equal(gamma: float) -> None:
    """At the minimum of Σ η_c loss(v_c) with Σ v = 1, all η_c ∂loss/∂v_c are equal. Decimals do not underflow."""
    v = [0.4999, 0.4995, 0.0004, 0.0002]
    found = focal_correction(torch.tensor(v, dtype=torch.float64).view(1, 4, 1), gamma).flatten().tolist()
    exponent, gradients = Decimal(gamma), []
    for x, eta in zip(map(Decimal, v), found, strict=True):
        slope = (1 - x) ** exponent / x - exponent * (1 - x) ** (exponent - 1) * x.ln()
        gradients.append(slope.ln() + Decimal(math.log(eta)))
    assert sum(found) == pytest.approx(1) and float(max(gradients) - min(gradients)) < 1e-9


def test_focal_correction_at_the_ends() -> None:
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]])[:, :, None]
    for gamma in (0.0, 0.5, 2.0, 1000.0):
        assert torch.equal(focal_correction(certain, gamma), certain)


def test_rejections() -> None:
    with pytest.raises(ValueError, match="bins"):
        Reliability(0)
    with pytest.raises(ValueError, match="one-hot"):
        Reliability().update(torch.rand(1, 2, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="merge"):
        Reliability(5).merge(Reliability(6))
    one, three = Reliability(), Reliability()
    one.update(torch.rand(1, 1, 4), torch.ones(1, 1, 4))
    three.update(torch.rand(1, 3, 4), torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match="cannot merge 3 classes into 1"):
        one.merge(three)
    with pytest.raises(ValueError, match="call update first"):
        Reliability().curve()
    with pytest.raises(ValueError, match="ignore_index"):
        fit_temperature(torch.zeros(1, 2, 3), torch.full((1, 3), 255))
    with pytest.raises(ValueError, match=r"labels 0\.\.7, but logits have 2 classes"):
        fit_temperature(torch.zeros(1, 2, 2), torch.tensor([[0, 7]]))
    with pytest.raises(ValueError, match="link"):
        fit_temperature(torch.zeros(1, 2, 3), torch.zeros(1, 3).long(), link="tanh")
    with pytest.raises(ValueError, match="gamma"):
        focal_correction(torch.rand(1, 2, 3), gamma=-1)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_calibration_of_classes_is_the_minimum_of_its_objective(link: str) -> None:
    """Against scipy's general optimiser on the same objective, written with other functions."""
    import numpy as np
    from scipy import optimize, special

    true, labels, _ = sample(1.0, "softmax", seed=3)
    logits = (true[:, :, :20, :20] - torch.tensor([1.0, 0, -1]).view(3, 1, 1)) * torch.tensor([3.0, 1, 0.5]).view(
        3, 1, 1
    )
    labels, strength = labels[:, :20, :20], 1e-2
    found = fit_calibration(logits, labels, link, strength=strength)
    scalar = float(fit_temperature(logits, labels, link))
    z = logits.movedim(1, -1).reshape(-1, 3).double().numpy()
    y = np.eye(3)[labels.flatten().numpy()]

    def objective(x: np.ndarray) -> float:
        s = z / np.exp(x[:3]) + x[3:]
        loss = -(y * special.log_softmax(s, 1)).sum() if link == "softmax" else (np.logaddexp(0, s) - y * s).mean()
        loss = loss / len(z) if link == "softmax" else loss
        return float(loss + strength / 2 * (((x[:3] - np.log(scalar)) ** 2).sum() + (x[3:] ** 2).sum()))

    start = np.concatenate([np.full(3, np.log(scalar)), np.zeros(3)])
    best = optimize.minimize(objective, start, method="BFGS", options={"gtol": 1e-7})
    ours = np.concatenate([found.temperature.log().numpy(), found.bias.numpy()])
    assert objective(ours) <= best.fun + 1e-7
    assert ours == pytest.approx(best.x, abs=0.02)


def test_calibration_of_classes_restores_each_volume() -> None:
    """A shift of a rare class hides from the pooled error and from a temperature; not from Σp / Σy."""
    true, labels, onehot = sample(1.0, "softmax", seed=4)
    logits = true + torch.tensor([0.0, 0.0, 1.2]).view(1, 3, 1, 1)

    def ratios(x: Tensor) -> Tensor:
        reliability = Reliability()
        reliability.update(torch.softmax(x, 1), onehot)
        return reliability.volume_ratio()

    scalar = ratios(logits / fit_temperature(logits, labels))
    classwise = ratios(fit_calibration(logits, labels)(logits))
    assert scalar[2] > 1.4 and torch.allclose(classwise, torch.ones(3).double(), atol=0.02)


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_calibration_leaves_a_class_without_pixels_alone(link: str) -> None:
    """Its labels are all negative: a fitted bias would remove the class from every new image."""
    logits, labels, _ = sample(2.0, "softmax", seed=5)
    labels = labels.clamp(max=1)
    found = fit_calibration(logits, labels, link)
    assert float(found.temperature[2]) == pytest.approx(float(fit_temperature(logits, labels, link)))
    assert float(found.bias[2]) == 0 and found.bias[:2].abs().min() > 0
    assert torch.isfinite(found.temperature).all() and torch.isfinite(found.bias).all()
    with pytest.raises(ValueError, match="strength=0"):
        fit_calibration(logits, labels, strength=0)


def test_reliability_under_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch) -> None:
    """No `bincount` with weights, which CUDA rejects under `torch.use_deterministic_algorithms`."""
    plain = torch.bincount
    monkeypatch.setattr(torch, "bincount", lambda x, minlength=0: plain(x, minlength=minlength))
    logits, _, onehot = sample(1.0, "softmax")
    probs = torch.softmax(logits, 1)
    reliability = Reliability(4)
    reliability.update(probs, onehot)
    total = reliability.curve().confidence.nan_to_num() * reliability.curve().pixels
    assert torch.allclose(total.sum(1), probs.sum((0, 2, 3)).double(), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda t: t[:, None], ValueError, r"targets.*\(N, \*S\)"),
        (lambda t: t.transpose(1, 2)[:, :-1], ValueError, r"targets.*\(N, \*S\)"),
        (lambda t: torch.nn.functional.one_hot(t, 3).movedim(-1, 1), ValueError, "argmax"),
        (lambda t: t + 0.7, TypeError, "float32"),
        (lambda t: torch.full_like(t, 255, dtype=torch.uint8), ValueError, r"255\.\.255"),  # -1 as uint8 is 255
    ],
)
def test_labels_of_another_form_are_rejected(change, error, words: str) -> None:
    logits, labels, _ = sample(2.0, "softmax")
    for fit in (fit_temperature, fit_calibration):
        with pytest.raises(error, match=words):
            fit(logits, change(labels), ignore_index=-1)


@pytest.mark.parametrize(
    ("targets", "valid", "error", "words"),
    [
        (lambda t: t.long() * 255, None, ValueError, "one-hot"),
        (lambda t: t * 0.7, None, ValueError, "one-hot"),
        (lambda t: t, torch.long, TypeError, "valid.*bool"),  # would be read as indices
        (lambda t: t, torch.uint8, TypeError, "valid.*bool"),
    ],
)
def test_reliability_rejects_what_is_not_one_hot_or_not_a_mask(targets, valid, error, words: str) -> None:
    logits, labels, onehot = sample(1.0, "softmax")
    with pytest.raises(error, match=words):
        Reliability().update(
            logits.softmax(1), targets(onehot), None if valid is None else torch.ones(labels.shape, dtype=valid)
        )


def test_fits_in_inference_mode() -> None:
    logits, labels, _ = sample(2.0, "softmax")
    expected = fit_calibration(logits, labels)
    with torch.inference_mode():
        found = fit_calibration(logits.clone(), labels.clone())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("gamma", [math.inf, math.nan, -1.0, 1001.0])
def test_focal_correction_rejects_an_invalid_gamma(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        focal_correction(torch.rand(1, 3, 4, 4).softmax(1), gamma)
