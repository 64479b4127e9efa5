"""Rules and calibrations with values that are fitted for one checkpoint, and the file that stores them next to it.

Shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankseg
from configs.errors import TrainingError, UserError
from configs.files import file_sha256, read_json, write_json
from rankseg import Predictor
from rankseg.confidence import gate_by_score
from trainers.distributed import World, gather_objects
from trainers.forward import measure
from trainers.metrics import PerImage

FORMAT = 1
_PIXELS = 4096  # of an image, at a regular stride: neighbouring pixels hold nearly the same information


def fitted_threshold(probs: Tensor, *, at: float | Sequence[float], gated: bool, per_class: bool = False) -> Tensor:
    """Rule T_fit: select the pixels with p >= `at`; `gated` empties a mask if no probability exceeds 1/2."""
    masks = rankseg.threshold(probs, at=at)
    if gated:
        masks = masks & (probs.flatten(2).amax(2) > 0.5).view(*probs.shape[:2], *[1] * (probs.ndim - 2))
    return masks


def pooled_threshold(probs: Tensor, *, at: Sequence[float], score: str = "dice", pruning: bool = True) -> Tensor:
    """Rules pooled_dice and pooled_iou: select the pixels with p >= the cut-off of the class for the whole split."""
    return rankseg.threshold(probs, at=at)


@dataclass(frozen=True)
class GatedRule:
    """A ranking rule whose gate is the expected Dice: a mask with less than `least` is emptied."""

    rule: Predictor
    least: float

    def __call__(self, probs: Tensor) -> Tensor:
        return gate_by_score(probs, self.rule(probs), self.least)


@dataclass(frozen=True)
class OtherProbs:
    """A rule with its own conversion of logits to probabilities, which `evaluate` applies."""

    rule: Predictor
    to_probs: Callable[[Tensor], Tensor]

    def __call__(self, probs: Tensor) -> Tensor:
        return self.rule(probs)


@dataclass(frozen=True, eq=False)
class _Pixels(PerImage):
    """Some pixels of images: logits (C, P) and labels (P,) of each."""

    logits: list[Tensor]
    labels: list[Tensor]


def held_out_fit(
    fit: Callable[..., Any],
    model: nn.Module,
    batches: Iterable[Any],
    link: str,
    world: World,
    *,
    ignore_index: int = 255,
    precision: str = "fp32",
) -> Any:
    """Fit a calibration to some pixels of every labelled image, at every rank; raise UserError if there is none.

    ``fit`` is `fit_temperature` or `fit_calibration` of `rankseg.calibration`. It gets logits (1, C, P), labels (1, P),
    the link and ``ignore_index``, for P pixels in the order of the images.
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
                "the network gives NaN or infinity in place of scores, so no calibration can be fitted. "
                "Fix: choose an earlier checkpoint, or trainer.precision=fp32 if it was trained in fp16."
            )
        return fit(logits, labels, link, ignore_index=ignore_index)


class FittedFile:
    """Values fitted for a checkpoint, stored next to it in `<name>.fitted.json`.

    Every entry holds a `kind` (calibration or rule), the `settings` that its probabilities depend on, its `values`, and
    the images that it was `fitted_on`. All ranks read the file of rank 0, which alone writes. A damaged file raises
    UserError; so does one of another checkpoint, unless `replace` ignores it. Without a checkpoint the values belong to
    their images alone.
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
            raise UserError(f"{self.path} does not hold fitted values. Fix: delete it and run test.py again.")
        if content.get("checkpoint") != self.sha256:
            if replace:
                return []
            raise UserError(
                f"{self.path} was fitted for another checkpoint: sha256 {str(content.get('checkpoint'))[:12]}, "
                f"this one has {self.sha256[:12]}. Fix: delete it and run test.py again."
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
