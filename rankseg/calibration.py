"""Whether probabilities mean what they say, and what to do where they do not.

RankDice and RankIoU are optimal for the *true* probabilities, so they are only as good as the network's are calibrated.

Letters of shapes: N images, C classes, *S spatial axes, B bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Reliability:
    """Counts of a reliability diagram, gathered over batches and mergeable between processes.

    For each class, one against the rest, and for the most probable class of a pixel ("top"), pixels fall into equal
    bins of probability; a bin knows its number of pixels, the sum of their probabilities and how many were right.

    Args:
        bins: B.
        pixels: how many pixels of an image to look at, at a regular stride (0: all). Neighbouring pixels say the same
            thing, and binning every pixel of every class would cost more than predicting.
    """

    def __init__(self, bins: int = 15, pixels: int = 1 << 14) -> None:
        if bins < 1:
            raise ValueError(f"bins={bins} is not a number of bins; use 1 or more")
        self.bins, self.pixels = bins, pixels
        self.classes: Tensor | None = None  # (C, 3, B): pixels, summed probabilities, summed truths
        self.top = torch.zeros(3, bins, dtype=torch.float64)

    def update(self, probs: Tensor, truth: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            probs: (N, C, *S) in [0, 1].
            truth: (N, C, *S) bool.
            valid: (N, *S) bool, pixels to look at; None for all.
        """
        if probs.numel() == 0:
            return
        probs, truth = probs.flatten(2), truth.flatten(2)
        stride = max(1, probs.shape[2] // self.pixels) if self.pixels else 1
        probs = probs[..., ::stride].movedim(1, 2).flatten(0, 1).double()  # (pixels, C)
        truth = truth[..., ::stride].movedim(1, 2).flatten(0, 1)
        if valid is not None:
            keep = valid.flatten(1)[:, ::stride].flatten()
            probs, truth = probs[keep], truth[keep]
        if self.classes is None:
            self.classes = torch.zeros(probs.shape[1], 3, self.bins, dtype=torch.float64)
        offset = torch.arange(probs.shape[1], device=probs.device) * self.bins
        self.classes += self._binned(probs, truth, offset, probs.shape[1])
        confidence, label = probs.max(1)
        self.top += self._binned(confidence, truth.gather(1, label[:, None])[:, 0], torch.zeros_like(label), 1)[0]

    def _binned(self, probs: Tensor, truth: Tensor, offset: Tensor, rows: int) -> Tensor:
        index = ((probs * self.bins).long().clamp(0, self.bins - 1) + offset).flatten()
        size = rows * self.bins
        sums = [torch.bincount(index, w.flatten(), size) for w in (torch.ones_like(probs), probs, truth.double())]
        return torch.stack(sums).view(3, rows, self.bins).transpose(0, 1).cpu()

    @classmethod
    def merge(cls, parts: Sequence[Reliability]) -> Reliability:
        """The reliability over everything that the parts saw."""
        merged = cls(parts[0].bins, parts[0].pixels)
        seen = [part.classes for part in parts if part.classes is not None]
        merged.classes = torch.stack(seen).sum(0) if seen else None
        merged.top = torch.stack([part.top for part in parts]).sum(0)
        return merged

    def curve(self, label: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(mean probability, observed frequency, pixels) of each bin, (B,) each; NaN where a bin is empty.

        Of one class against the rest, or (None) of the most probable class.
        """
        if label is not None and self.classes is None:
            raise ValueError("no batch has been added yet")
        number, predicted, observed = self.top if label is None else self.classes[label]  # type: ignore[index]
        return predicted / number, observed / number, number

    def ece(self) -> float:
        """The expected calibration error of the most probable class (Guo et al., ICML 2017, eq. 3)."""
        return float(_gap(self.top))

    def classwise_ece(self) -> float:
        """The mean over classes of the calibration error, one against the rest (Kull et al., NeurIPS 2019)."""
        return float("nan") if self.classes is None else float(_gap(self.classes).mean())


def _gap(bins: Tensor) -> Tensor:
    """Σ |predicted − observed| / pixels over bins, (…, 3, B) to (…)."""
    number, predicted, observed = bins.unbind(-2)
    return (predicted - observed).abs().sum(-1) / number.sum(-1)


def fit_temperature(
    logits: Tensor, targets: Tensor, link: str = "softmax", *, ignore_index: int = 255, per_class: bool = False
) -> Tensor:
    """The temperature T that makes link(logits / T) most likely on held-out data (Guo et al., ICML 2017, section 4.2).

    Args:
        logits: (N, C, *S).
        targets: (N, *S) integers.
        link: ``softmax`` or ``sigmoid``.
        per_class: fit one temperature a class ("vector scaling" without bias) instead of one in all.

    Returns:
        T > 0, a scalar or (C,). The optimum of a convex problem in 1/T, found by LBFGS.

    Raises:
        ValueError: an unknown link, or no labelled pixel.
    """
    if link not in ("softmax", "sigmoid"):
        raise ValueError(f"link={link!r} is unknown; use softmax or sigmoid")
    classes = logits.shape[1]
    flat = logits.detach().movedim(1, -1).reshape(-1, classes).double()
    labels = targets.flatten()
    keep = labels != ignore_index
    flat, labels = flat[keep], labels[keep].long()
    if not len(labels):
        raise ValueError("no labelled pixel to fit a temperature on; check ignore_index")
    inverse = torch.ones(classes if per_class else 1, dtype=torch.float64, device=flat.device, requires_grad=True)
    onehot = F.one_hot(labels, classes).double() if link == "sigmoid" else None
    search = torch.optim.LBFGS([inverse], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        scaled = flat * inverse
        loss = F.cross_entropy(scaled, labels) if onehot is None else F.binary_cross_entropy_with_logits(scaled, onehot)
        loss.backward()
        return loss

    with torch.enable_grad():
        search.step(closure)  # type: ignore[arg-type]
    temperature = 1 / inverse.detach().clamp_min(1e-3)
    return temperature if per_class else temperature[0]


@torch.no_grad()
def focal_correction(probs: Tensor, gamma: float = 2.0) -> Tensor:
    """True class probabilities from those that minimise the focal loss (Charoenphakdee et al., CVPR 2021, Theorem 11).

    The focal loss is not proper: its minimiser q is under-confident. With
    φ(v) = (1 − v)^γ − γ (1 − v)^(γ−1) v log v the true probabilities are proportional to q / φ(q).

    Args:
        probs: (N, C, *S), softmax probabilities.
        gamma: the loss's γ ≥ 0; 0 changes nothing.

    Returns:
        (N, C, *S), of the dtype of ``probs``.
    """
    if gamma < 0:
        raise ValueError(f"gamma={gamma} must not be negative")
    q = probs.double().clamp(1e-12, 1 - 1e-12)
    weight = (1 - q) ** gamma - gamma * (1 - q) ** (gamma - 1) * q * q.log()
    return torch.softmax(q.log() - weight.log(), dim=1).to(probs.dtype)
