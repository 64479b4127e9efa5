"""Values that are fitted for a checkpoint: the rules that use them, how they are fitted, and their file.

They are a calibration, a threshold, a gate for absent classes, the choice of a rule, and the cut-offs of pooled rules.
There are two gates. The published one empties a mask if no probability exceeds 1/2; the fitted one, if its expected
Dice is below a limit. `configs/fitting.py` decides which values a rule needs, and collects the candidates of rule auto.

Shapes: N images, C classes, H × W pixels (or any spatial axes *S), P sampled pixels, K thresholds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor, nn

import rankseg
from configs.errors import TrainingError, UserError
from configs.files import file_sha256, read_json, write_json
from rankseg import Predictor
from rankseg.expected import gate_by_score
from trainers.distributed import World, gather_objects
from trainers.forward import measure
from trainers.metrics import PerImage, Truth, mean_over_classes

FORMAT = 1
THRESHOLDS = tuple(k / 100 for k in range(1, 100))
_GATE = 0.5  # the published gate: a class is predicted if its largest probability exceeds this
_PIXELS = 4096  # at least so many of a larger image, at a regular stride: neighbours hold nearly the same information


def fitted_threshold(probs: Tensor, *, at: float | Sequence[float], gated: bool, per_class: bool = False) -> Tensor:
    """Rule T_fit: select the pixels with p >= `at`; `gated` empties a mask if no probability exceeds 1/2.

    `per_class` is used by the fit only.
    """
    masks = rankseg.threshold(probs, at=at)
    if gated:
        masks = masks & (probs.flatten(2).amax(2) > _GATE).view(*probs.shape[:2], *[1] * (probs.ndim - 2))
    return masks


def pooled_threshold(probs: Tensor, *, at: Sequence[float], score: str = "dice", pruning: bool = True) -> Tensor:
    """Rules pooled_dice and pooled_iou: select the pixels with p >= `at`, one threshold per class for all images.

    `score` and `pruning` are used by the fit only.
    """
    return rankseg.threshold(probs, at=at)


def gated_rule(probs: Tensor, *, rule: Predictor, least: float) -> Tensor:
    """A ranking rule whose gate is the expected Dice: a mask with less than `least` is emptied."""
    return gate_by_score(probs, rule(probs), least)


@dataclass(frozen=True)
class RuleWithOwnProbs:
    """A rule with its own conversion of logits to probabilities, which `evaluate` applies."""

    rule: Predictor
    to_probs: Callable[[Tensor], Tensor]

    def __call__(self, probs: Tensor) -> Tensor:
        return self.rule(probs)


# ---------------------------------------------------------------------------------------------------------------------
# Fits


@dataclass(frozen=True, eq=False)
class _Pixels(PerImage):
    """Some pixels of images: logits (C, P) and labels (P,) of each."""

    logits: list[Tensor]
    labels: list[Tensor]


def fit_calibration_on(
    fit: Callable[..., Any],
    model: nn.Module,
    batches: Iterable[Any],
    link: str,
    world: World,
    *,
    ignore_index: int = 255,
    precision: str = "fp32",
) -> Any:
    """Fit a calibration on some pixels of every image; raise UserError if no pixel is labelled.

    ``fit`` is `fit_temperature` or `fit_calibration` of `rankseg.calibration`. It gets logits (1, C, P), labels (1, P),
    the link (softmax or sigmoid) and ``ignore_index``, for P pixels in the order of the images. Every rank computes the
    same fit.
    """

    def sample(_: Any, targets: Tensor, logits: Tensor) -> _Pixels:
        stride = max(1, targets[0].numel() // _PIXELS)
        some, labels = logits.flatten(2)[..., ::stride].clone(), targets.flatten(1)[:, ::stride].clone()
        return _Pixels(list(some.cpu()), list(labels.cpu()))  # copies: views would keep all pixels

    title = "fitting the calibration"
    pixels = measure(sample, model, batches, world, precision=precision, progress=title)[0]
    if not any((labels != ignore_index).any() for labels in pixels.labels):
        raise UserError(
            f"images={len(pixels.labels)} of the validation split have no labelled pixel to fit the calibration on. "
            "Fix: check dataset.splits and dataset.root."
        )
    with torch.inference_mode(False):  # fitting needs gradients, which tensors of an inference do not have
        logits, labels = torch.cat(pixels.logits, dim=1)[None].clone(), torch.cat(pixels.labels)[None].clone()
        if not logits.isfinite().all():
            raise TrainingError(
                "the network gives NaN or infinity in its logits, so no calibration can be fitted. "
                "Fix: choose an earlier checkpoint, or trainer.precision=fp32 if it was trained in fp16."
            )
        return fit(logits, labels, link, ignore_index=ignore_index)


class ThresholdFit(NamedTuple):
    """A fitted threshold."""

    at: float | list[float]  # for all classes, or for each
    gated: bool  # whether classes whose largest probability is at most 1/2 get the empty mask
    mean_dice: float  # of the images that it was fitted on
    leave_one_out: Tensor | None  # (N,) mean Dice of each image with the fit on all others; None if one per class


@dataclass(frozen=True, eq=False)
class ThresholdTable(PerImage):
    """Counts of every image and class at every threshold, from which the mean Dice of a threshold is computed."""

    hits: Tensor  # (N, C, K) int32, true positives of {p >= threshold}
    selected: Tensor  # (N, C, K) int32, number of pixels in {p >= threshold}
    actual: Tensor  # (N, C) int64, true pixels
    likely: Tensor  # (N, C) bool, whether the largest probability exceeds 1/2
    thresholds: tuple[float, ...]

    @staticmethod
    @torch.no_grad()
    def of_batch(probs: Tensor, truth: Truth, thresholds: Sequence[float] = THRESHOLDS) -> ThresholdTable:
        """Count a batch of probabilities (N, C, *S) against its truth."""
        images, classes = probs.shape[:2]
        steps = len(thresholds) + 1
        grid = torch.tensor(thresholds, dtype=torch.float64, device="cpu").to(probs.device, probs.dtype)
        rows = torch.arange(images * classes, device=probs.device).view(-1, 1) * steps
        # Entry k of a row: the pixels that pass k thresholds and not k + 1.
        places = torch.bucketize(probs.flatten(2).flatten(0, 1), grid, right=True) + rows
        onehot = truth.onehot.flatten(2).flatten(0, 1)
        hits = torch.bincount(places[onehot], minlength=images * classes * steps)
        if truth.valid is not None:
            places = places[truth.valid.flatten(1).repeat_interleave(classes, 0)]
        selected = torch.bincount(places.flatten(), minlength=images * classes * steps)
        likely = probs.flatten(2).amax(2) > _GATE

        def passing(count: Tensor) -> Tensor:
            return count.view(images, classes, steps).flip(2).cumsum(2).flip(2)[..., 1:].int().cpu()

        return ThresholdTable(passing(hits), passing(selected), truth.actual.cpu(), likely.cpu(), tuple(thresholds))

    def dice(self, gated: bool = False) -> Tensor:
        """Return the Dice of every image and class at every threshold: (N, C, K) float64, NaN for 0/0."""
        kept = self.likely[..., None] if gated else torch.ones_like(self.likely)[..., None]
        total = self.selected * kept + self.actual[..., None]
        return torch.where(total > 0, 2 * (self.hits * kept).double() / total, torch.nan)

    def fit(self, scored: Sequence[int], per_class: bool = False) -> ThresholdFit:
        """Choose the threshold, and whether to use the gate, by the mean Dice over the `scored` classes.

        With `per_class` the thresholds are improved one class after another from the common one, as long as the mean
        rises. Ties go to the threshold nearest to 1/2, then to no gate.
        """
        by_gate = {gated: self.dice(gated)[:, list(scored)] for gated in (False, True)}
        candidates = [
            (round(float(mean), 12), -abs(cut - 0.5), not gated, k)
            for gated, dice in by_gate.items()
            for k, (cut, mean) in enumerate(zip(self.thresholds, dice.nanmean(1).nanmean(0), strict=True))
        ]
        score, _, ungated, k = max(candidates)
        if not per_class:
            return ThresholdFit(self.thresholds[k], not ungated, score, _leave_one_out(by_gate))
        chosen, score = self._ascend(by_gate[not ungated], k)
        at = [self.thresholds[k]] * self.actual.shape[1]
        for c, place in zip(scored, chosen, strict=True):
            at[c] = self.thresholds[place]
        return ThresholdFit(at, not ungated, score, None)

    def _ascend(self, dice: Tensor, start: int) -> tuple[list[int], float]:
        """Maximise the mean of `dice` (N, C, K) by coordinate ascent, starting with one threshold for all classes."""
        images, classes, _ = dice.shape
        chosen, score = [start] * classes, -1.0
        defined, value = ~dice.isnan(), dice.nan_to_num()
        while True:
            before = score
            for c in range(classes):
                others = [j for j in range(classes) if j != c]
                places = [chosen[j] for j in others]
                total = value[:, c] + value[:, others, places].view(images, -1, 1).sum(1)
                number = defined[:, c] + defined[:, others, places].view(images, -1, 1).sum(1)
                means = torch.where(number > 0, total / number.clamp(min=1), torch.nan).nanmean(0)
                if float(means.max()) > score + 1e-12:
                    chosen[c], score = int(means.argmax()), float(means.max())
            if score <= before + 1e-12:
                return chosen, score


def _leave_one_out(by_gate: Mapping[bool, Tensor]) -> Tensor:
    """Return the Dice (N,) of each image with the threshold and gate that the other images choose."""
    means = torch.cat([dice.nanmean(1) for dice in by_gate.values()], dim=1)
    defined, value = ~means.isnan(), means.nan_to_num()
    others = value.sum(0) - value
    number = (defined.sum(0) - defined.int()).clamp(min=1)
    return means.gather(1, (others / number).argmax(1, keepdim=True))[:, 0]


def fit_gate(expected: Tensor, dice: Tensor, actual: Tensor, scored: Sequence[int]) -> tuple[float, float]:
    """Choose the gate with the largest mean Dice. It empties a mask whose expected Dice is lower. Return gate and mean.

    Args:
        expected, dice: (N, C) expected and achieved Dice of the masks without a gate.
        actual: (N, C) true pixels. An empty mask scores 0 if the class is present; otherwise it has no score.
        scored: the classes in the mean. Of equal means the smallest gate is chosen.
    """
    missed = torch.where(actual > 0, 0.0, torch.nan).double()
    best = (0.0, -1.0)
    for least in (k / 100 for k in range(100)):
        gated = torch.where(expected >= least, dice, missed)
        mean = float(mean_over_classes(gated, scored).nanmean())
        if mean > best[1] + 1e-12:
            best = (least, mean)
    return best


class Choice(NamedTuple):
    """The chosen rule, the mean difference of each other rule to T with its interval, and the reason."""

    rule: str
    differences: dict[str, dict[str, float]]
    why: str


def choose(dice: Mapping[str, Tensor], resamples: int = 9999) -> Choice:
    """Choose the rule with the largest lower bound of the mean paired difference to T, if it is positive.

    The bound is the lower end of the two-sided 95 % BCa bootstrap interval. `dice` holds the mean Dice (N,) of the
    same images for each rule, NaN if undefined.
    """
    others = [name for name in dice if name != "T"]
    differences = {name: _interval((dice[name] - dice["T"]).double(), resamples) for name in others}
    best = max(differences, key=lambda name: differences[name]["low"], default="T")
    if best == "T" or differences[best]["low"] <= 0:
        return Choice("T", differences, "no rule is better than T by its lower bound")
    bound = 100 * differences[best]["low"]
    return Choice(best, differences, f"largest lower 95% bound of the mean difference to T: +{bound:.2f} points")


def _interval(difference: Tensor, resamples: int) -> dict[str, float]:
    from scipy import stats  # slow to import

    difference = difference[~difference.isnan()]
    mean = float(difference.mean()) if len(difference) else 0.0
    if len(difference) < 2 or float(difference.std()) == 0:
        return {"mean": mean, "low": mean, "high": mean}
    options = {"method": "BCa", "confidence_level": 0.95, "rng": 0, "n_resamples": resamples}
    found: Any = stats.bootstrap((difference.numpy(),), numpy.mean, **options)
    low, high = (float(end) for end in found.confidence_interval)
    return {"mean": mean, "low": low, "high": high}


# ---------------------------------------------------------------------------------------------------------------------
# The file


class FittedFile:
    """Values fitted for a checkpoint, stored next to it in `<name>.fitted.json`.

    Every entry holds a `kind` (calibration or rule), the `settings` that its probabilities depend on, its `values`, and
    the images that it was `fitted_on`. All ranks use the entries that rank 0 reads; call `save` at rank 0 only. A
    damaged file raises UserError. So does one of another checkpoint; with `replace` it is ignored. decode.py has no
    checkpoint: its entries are identified by settings and images.
    """

    def __init__(self, checkpoint: Path, world: World | None = None, *, replace: bool = False) -> None:
        self.path = checkpoint.with_name(f"{checkpoint.stem}.fitted.json")
        self.sha256 = file_sha256(checkpoint) if checkpoint.is_file() else ""
        content = self._read(replace)
        self.entries: list[dict[str, Any]] = gather_objects(content, world)[0] if world else content
        self.changed = False

    def _read(self, replace: bool) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        content = read_json(self.path)
        entries = content.get("entries") if isinstance(content, dict) else None
        kinds = {"kind": str, "settings": dict, "values": dict, "fitted_on": dict}
        if not isinstance(entries, list) or not all(
            isinstance(entry, dict) and all(isinstance(entry.get(key), kind) for key, kind in kinds.items())
            for entry in entries
        ):
            raise UserError(
                f"{self.path} does not hold fitted values. Fix: delete it, and fit again with test.py or decode.py."
            )
        if content.get("checkpoint") != self.sha256:
            if replace:
                return []
            raise UserError(
                f"{self.path} was fitted for another checkpoint: sha256 {str(content.get('checkpoint'))[:12]}, "
                f"this one has {self.sha256[:12]}. Fix: delete it, and fit again with test.py."
            )
        return entries

    def find(
        self, kind: str, settings: Mapping[str, Any], fitted_on: Mapping[str, Any] | None = None
    ) -> dict[str, Any] | None:
        """Return the values of the newest entry with these settings and, if given, these images, or None."""
        for entry in reversed(self.entries):
            same_images = fitted_on is None or entry["fitted_on"] == dict(fitted_on)
            if entry["kind"] == kind and entry["settings"] == dict(settings) and same_images:
                values: dict[str, Any] = entry["values"]
                return values
        return None

    def put(
        self, kind: str, settings: Mapping[str, Any], values: Mapping[str, Any], fitted_on: Mapping[str, Any]
    ) -> None:
        """Add an entry; it replaces one with the same kind, settings and images."""
        entry = {"kind": kind, "settings": dict(settings), "values": dict(values), "fitted_on": dict(fitted_on)}
        others = [old for old in self.entries if {**old, "values": None} != {**entry, "values": None}]
        self.entries = [*others, entry]
        self.changed = True

    def save(self) -> None:
        """Write the file if an entry was added."""
        if self.changed:
            write_json(self.path, {"format": FORMAT, "checkpoint": self.sha256, "entries": self.entries})
