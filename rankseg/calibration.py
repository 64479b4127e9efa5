"""Calibration of probabilities. RankDice is optimal only for correct probabilities.

`Reliability` measures the calibration, batch by batch. `fit_temperature` and `fit_calibration` calibrate the logits
on validation data. `focal_correction` removes the known bias of the focal loss.

Shapes: N images, C classes, *S spatial axes, M bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from rankseg.validation import check_choice, check_probs, check_valid


class ReliabilityCurve(NamedTuple):
    """Mean `confidence` and observed `frequency`, NaN in empty bins, and number of `pixels`: (C, M) each."""

    confidence: Tensor
    frequency: Tensor
    pixels: Tensor


class Reliability:
    """Reliability of class probabilities in bins of equal width: update with batches, merge, then read the curves.

    Every pixel counts once for every class, as a forecast p of the event "the pixel has this class". RankDice uses
    the map of every class and not only the probability of the most probable class.
    """

    def __init__(self, bins: int = 15) -> None:
        if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
            raise ValueError(f"bins must be a positive integer, got {bins!r}; 15 is usual")
        self.bins = bins
        self._sums: Tensor | None = None

    @torch.no_grad()
    def update(self, probs: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch: `probs` (N, C, *S), one-hot `targets` (N, C, *S), `valid` (N, *S) bool, default all.

        Raises:
            TypeError, ValueError: the shapes do not agree, `targets` are not 0 and 1, `valid` is not bool, or the
                number of classes changed.
        """
        probs = check_probs(probs)
        if targets.shape != probs.shape:
            raise ValueError(
                f"targets must be one-hot of shape {tuple(probs.shape)}, got {tuple(targets.shape)}; "
                "torch.nn.functional.one_hot(labels, C).movedim(-1, 1) makes it"
            )
        if targets.dtype != torch.bool and not ((targets == 0) | (targets == 1)).all():
            raise ValueError("targets must be one-hot: 0 or 1 for each class and pixel")
        check_valid(valid, probs)
        keep = slice(None) if valid is None else valid.flatten()
        sums = torch.zeros(3, probs.shape[1], self.bins, dtype=torch.float64, device=probs.device)
        for c, (count, forecast, observed) in enumerate(sums.unbind(1)):
            p = probs[:, c].flatten()[keep]
            bin_of = (p.float() * self.bins).long().clamp_(max=self.bins - 1)
            forecast.index_add_(0, bin_of, p.double())  # bincount with weights is not deterministic on CUDA
            place = bin_of + self.bins * targets[:, c].flatten()[keep].long()
            missed, hit = torch.bincount(place, minlength=2 * self.bins).view(2, -1)
            count += missed + hit
            observed += hit
        self.add(sums)

    def merge(self, other: Reliability) -> Reliability:
        """Add the statistics of `other`, for example of another process; return self.

        Raises:
            ValueError: `other` has another number of bins or classes.
        """
        if other.bins != self.bins:
            raise ValueError(f"cannot merge {other.bins} bins into {self.bins}; use the same number")
        if other._sums is not None:
            self.add(other._sums)
        return self

    def add(self, sums: Tensor) -> None:
        """Add the `sums` of other data."""
        if self._sums is None:
            self._sums = sums.clone()
            return
        if sums.shape != self._sums.shape:
            raise ValueError(
                f"cannot merge {sums.shape[1]} classes into {self._sums.shape[1]}; "
                "use one Reliability for each number of classes"
            )
        self._sums = self._sums + sums.to(self._sums.device)

    def curve(self) -> ReliabilityCurve:
        """Return the reliability curve of each class. Raises ValueError before the first `update`."""
        count, forecast, observed = self.sums
        count_or_nan = torch.where(count > 0, count, torch.nan)
        return ReliabilityCurve(forecast / count_or_nan, observed / count_or_nan, count.long())

    def classwise_ece(self) -> Tensor:
        """Return the ECE Σ_bins |observed - forecast| / pixels of each class: (C,), NaN if no pixel was valid.

        Raises ValueError before the first `update`, as `volume_ratio` does.
        """
        count, forecast, observed = self.sums
        return (observed - forecast).abs().sum(1) / count.sum(1)

    def volume_ratio(self) -> Tensor:
        """Return predicted / true volume, Σp / Σy, of each class: (C,), NaN for a class that never occurs."""
        _, forecast, observed = self.sums
        return forecast.sum(1) / torch.where(observed.sum(1) > 0, observed.sum(1), torch.nan)

    def ece(self) -> float:
        """Return the expected calibration error with all classes in one curve; NaN without data."""
        if self._sums is None:
            return float("nan")
        count, forecast, observed = self._sums.sum(1)
        return float((observed - forecast).abs().sum() / count.sum())

    @property
    def sums(self) -> Tensor:
        """(3, C, M) float64: number of forecasts, sum of their probabilities, and how often the event happened."""
        if self._sums is None:
            raise ValueError("no data yet; call update first")
        return self._sums


def ece(probs: Tensor, targets: Tensor, bins: int = 15, valid: Tensor | None = None) -> float:
    """Return the expected calibration error of one batch with all classes in one curve; see `Reliability.update`."""
    reliability = Reliability(bins)
    reliability.update(probs, targets, valid)
    return reliability.ece()


@torch.inference_mode(False)
def fit_temperature(
    logits: Tensor,
    targets: Tensor,
    link: str = "softmax",
    *,
    ignore_index: int = 255,
    classwise: bool = False,
    max_iterations: int = 100,
) -> Tensor:
    """Fit the temperature that minimises the log-loss of validation data (Guo et al., ICML 2017), by LBFGS.

    Divide logits by the result before the link: it is a scalar, or (C,) with `classwise`, from 1e-3 to 1e3.

    Args:
        logits: (N, C, *S). With more pixels than memory allows, pass a random subset.
        targets: (N, *S) integer labels; pixels of `ignore_index` do not count.
        link: "softmax" or "sigmoid" (one against rest), the function that turns logits into probabilities.
        classwise: fit one temperature for each class.
        max_iterations: of LBFGS.

    Raises:
        TypeError, ValueError: no valid pixel, labels that are not classes or have another shape, unknown link, or
            non-finite logits.
    """
    check_choice("link", link, ("softmax", "sigmoid"))
    logits_of_pixels, labels = _labelled(logits, targets, ignore_index)
    classes = logits.shape[1]
    if not labels.numel():
        raise ValueError(f"targets has no pixel other than ignore_index={ignore_index}; fit on labelled images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(
            f"targets hold labels {int(labels.min())}..{int(labels.max())}, but logits have {classes} classes; "
            f"remap them, or mark them by ignore_index={ignore_index}"
        )
    if not torch.isfinite(logits_of_pixels).all():
        raise ValueError("logits holds NaN or infinity; correct the network before fitting a temperature")
    # The loss is convex in 1/T. Optimising log(1/T) keeps it positive.
    # The fit starts at T = 1, and lower for small logits: their gradient at T = 1 is below the tolerance of LBFGS.
    differences = logits_of_pixels - logits_of_pixels[:, :1] if link == "softmax" else logits_of_pixels
    start = min(1.0, 100 * float(differences.square().mean().sqrt())) or 1.0
    shape = (classes if classwise else 1,)
    log_inverse = torch.full(shape, -math.log(start), dtype=torch.float64, device=logits.device)
    log_inverse.requires_grad_(True)
    _minimise(lambda: _log_loss(logits_of_pixels * log_inverse.exp(), labels, link), [log_inverse], max_iterations)
    temperature = (-log_inverse.detach()).exp().clamp(1e-3, 1e3)
    return temperature if classwise else temperature[0]


class Calibration(NamedTuple):
    """A temperature and a bias for each class, (C,) float64 each: logits become logits / temperature + bias."""

    temperature: Tensor
    bias: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """Return calibrated logits (N, C, *S), in the dtype of `logits`."""
        shape = [1, -1] + [1] * (logits.ndim - 2)
        temperature, bias = (x.to(logits.device, logits.dtype).view(shape) for x in self)
        return logits / temperature + bias


@torch.inference_mode(False)
def fit_calibration(
    logits: Tensor,
    targets: Tensor,
    link: str = "softmax",
    *,
    ignore_index: int = 255,
    strength: float = 1e-4,
    max_iterations: int = 200,
) -> Calibration:
    """Fit a temperature and a bias for each class by penalised log-loss, with LBFGS.

    A single temperature leaves the biases of rare classes. A pooled calibration error hardly shows them, but RankDice
    relies on the expected volume Σp of each class. The objective is the mean log-loss plus
    strength / 2 · Σ_c [(log T_c - log T)² + b_c²]. T is the scalar temperature of `fit_temperature`, the start of the
    fit. A class that occurs in no labelled pixel keeps T and 0: it has only negative examples, so the fit would push
    its probability to 0.

    Args:
        logits, targets, link, ignore_index: see `fit_temperature`.
        strength: weight of the penalty, above 0.
        max_iterations: of LBFGS.

    Raises:
        TypeError, ValueError: as `fit_temperature`; or `strength` is not positive.
    """
    if not 0 < strength < math.inf:
        raise ValueError(f"strength={strength} is invalid: expected a number above 0, such as 1e-4")
    scalar = fit_temperature(logits, targets, link, ignore_index=ignore_index)
    logits_of_pixels, labels = _labelled(logits, targets, ignore_index)
    start = -scalar.log()
    log_inverse = start.repeat(logits_of_pixels.shape[1]).requires_grad_(True)
    bias = torch.zeros_like(log_inverse).requires_grad_(True)
    occurs = torch.bincount(labels, minlength=logits_of_pixels.shape[1]) > 0

    def parameters() -> tuple[Tensor, Tensor]:
        return torch.where(occurs, log_inverse, start), bias * occurs

    def objective() -> Tensor:
        log_inverses, biases = parameters()
        penalty = ((log_inverses - start) ** 2).sum() + (biases**2).sum()
        return _log_loss(logits_of_pixels * log_inverses.exp() + biases, labels, link) + strength / 2 * penalty

    _minimise(objective, [log_inverse, bias], max_iterations)
    log_inverses, biases = (value.detach() for value in parameters())
    return Calibration((-log_inverses).exp().clamp(1e-3, 1e3), biases)


def _labelled(logits: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return logits (P, C) float64 and labels (P,) of the labelled pixels."""
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets are {targets.dtype}; pass integer labels (N, *S)")
    if logits.ndim < 2 or targets.shape != logits.shape[:1] + logits.shape[2:]:
        raise ValueError(
            f"targets must be labels (N, *S), got {tuple(targets.shape)} for logits {tuple(logits.shape)}; "
            "onehot.argmax(1) turns one-hot targets into labels"
        )
    targets = targets.long()  # comparing uint8 with a negative ignore_index would wrap
    valid = targets.flatten() != ignore_index
    logits_of_pixels = logits.detach().movedim(1, -1).reshape(-1, logits.shape[1])[valid].double()
    return logits_of_pixels, targets.flatten()[valid]


def _log_loss(logits_of_pixels: Tensor, labels: Tensor, link: str) -> Tensor:
    """Return the mean log-loss of logits (P, C) for labels (P,)."""
    if link == "softmax":
        return torch.nn.functional.cross_entropy(logits_of_pixels, labels)
    onehot = torch.nn.functional.one_hot(labels, logits_of_pixels.shape[1]).to(logits_of_pixels)
    return torch.nn.functional.binary_cross_entropy_with_logits(logits_of_pixels, onehot)


def _minimise(objective: Callable[[], Tensor], parameters: list[Tensor], max_iterations: int) -> None:
    """Minimise `objective` over `parameters`, in place, by LBFGS."""
    optimizer = torch.optim.LBFGS(parameters, max_iter=max_iterations, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)


@torch.no_grad()
def focal_correction(probs: Tensor, gamma: float = 2.0) -> Tensor:
    """Turn probabilities trained with the focal loss into class probabilities (Charoenphakdee et al., CVPR 2021).

    The minimiser v of the expected focal loss is not the class probability η but satisfies, for all classes,
    η_c ∝ v_c / ((1-v_c)^γ - γ (1-v_c)^(γ-1) v_c log v_c), which is proportional to 1 / (-∂loss/∂v). One
    normalisation over classes recovers η, up to rounding. `probs` (N, C, *S) softmax; returns the same shape and dtype.

    Raises:
        ValueError: gamma is outside [0, 1000]; see also `rankseg.validation.check_probs`.
    """
    probs = check_probs(probs)
    if not 0 <= gamma <= 1000:
        raise ValueError(f"gamma must be a number from 0 to 1000, got {gamma!r}; 2.0 is the usual focal loss")
    if gamma == 0:
        return probs.clone()
    v = probs.double()
    # 1 - v is kept above 0: at v = 1 the class is certain, and its weight has to be finite.
    rest = (1 - v).clamp(min=1e-150)
    # Logarithms of v · (-∂loss/∂v): for large gamma, powers of 1 - v underflow.
    weight = v.log() - (gamma - 1) * rest.log() - (rest - gamma * torch.special.xlogy(v, v)).log()
    return weight.softmax(1).nan_to_num(0).to(probs.dtype)  # a pixel without any probability keeps none
