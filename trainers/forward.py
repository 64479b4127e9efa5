"""The forward pass that scoring, calibration, fitting and reports share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from configs.errors import ConfigError, TrainingError, UserError
from rankseg.calibration import Calibration, focal_correction
from trainers.distributed import World, gather_objects
from trainers.losses import Link, link_probs
from trainers.metrics import Rows

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteError(TrainingError):
    """The network gives NaN or infinity: its weights are not worth saving."""


@dataclass(frozen=True)
class ToProbs:
    """Turn logits (N, C, H, W) into probabilities."""

    link: Link
    calibration: float | Calibration = 1.0  # divides the logits, or has a temperature and a bias per class
    focal_gamma: float = 0.0  # exponent of the focal loss whose bias is corrected; 0: no correction
    # The end of the message if logits are not finite.
    remedy: str = "Fix: choose an earlier checkpoint, or trainer.precision=fp32 if it was trained in fp16."

    def __call__(self, logits: Tensor) -> Tensor:
        if isinstance(self.calibration, Calibration):
            logits = self.calibration(logits)
        elif self.calibration != 1:
            logits = logits / self.calibration
        probs = link_probs(logits, self.link)
        if probs.isnan().any():
            raise NonFiniteError(f"the network gives NaN or infinity in its logits. {self.remedy}")
        return focal_correction(probs, self.focal_gamma) if self.focal_gamma else probs


def probs_for(rule: Any, logits: Tensor, probs: Tensor) -> Tensor:
    """Return the probabilities that a rule gets: from its own ``to_probs``, if it has one."""
    own = getattr(rule, "to_probs", None)
    return own(logits) if own else probs


@torch.inference_mode()
def forward(
    model: nn.Module,
    batches: Iterable[Any],
    world: World,
    *,
    precision: str = "fp32",
    progress: str = "",
    unneeded: Callable[[Tensor], bool] = lambda targets: False,
) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield (batch, targets, logits) for every batch: logits float32 at the size of the targets, on the device.

    Args:
        model: images (N, 3, H, W) -> an object with ``logits`` (N, C, h, w).
        batches: with ``images``, ``targets`` (N, H, W), ``names`` and ``indices``.
        precision: fp32, bf16 or fp16, in which the network computes.
        progress: title of the progress bar; empty for none.
        unneeded: targets of a batch -> whether to leave the batch out.
    """
    model.eval()
    hidden = None if progress and world.is_main else True  # None: hidden if stderr is not a terminal
    total = getattr(batches, "num_images", None)  # this process's share
    with tqdm(total=total, unit="img", desc=progress, disable=hidden, leave=False) as bar:
        for batch in batches:
            targets = batch.targets.to(world.device, non_blocking=True)
            if not unneeded(targets):
                logits = logits_of(model, batch.images, targets.shape[-2:], world, precision)
                yield batch, targets.to(logits.device), logits
            bar.update(len(batch.names))


def measure(
    measure_batch: Callable[[Any, Tensor, Tensor], Rows],
    model: nn.Module,
    batches: Iterable[Any],
    world: World,
    *,
    state: Any = None,
    **options: Any,
) -> tuple[Rows, list[Any]]:
    """Measure every image; raise UserError if there is none.

    ``measure_batch`` turns what `forward` yields into rows, one per image. ``state`` is an object that it also updates.
    Returns the rows of all images in the order of their indices, and the states of all processes; at every rank.
    """
    measured = [
        (batch.indices[0], measure_batch(batch, targets, logits))
        for batch, targets, logits in forward(model, batches, world, **options)
    ]
    shares = gather_objects((measured, state), world)
    # A batch holds successive images, so the first index of each is enough.
    parts = [part for _, part in sorted((one for share, _ in shares for one in share), key=lambda one: one[0])]
    if not parts:
        raise UserError("images=0: there is no image to score. Fix: check split, dataset.splits and dataset.root.")
    return type(parts[0]).cat(parts), [state for _, state in shares]


@torch.inference_mode()
def logits_of(
    model: Callable[[Tensor], Any], images: Tensor, size: Sequence[int] | None, world: World, precision: str
) -> Tensor:
    """Return the logits of images (N, 3, H, W) as float32 (N, C, *size).

    With ``size=None`` they keep the size that the network returns. They are on the world's device, or on the CPU if
    that device has no float64, which rules need (MPS).
    """
    with autocast(world.device, precision):
        logits = model(images.to(world.device, non_blocking=True)).logits
    logits = logits.float() if size is None else resize_logits(logits, size)
    return logits.cpu() if world.device.type == "mps" else logits


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return the context in which a network computes in ``fp32``, ``bf16`` or ``fp16``."""
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision} is invalid: expected one of {', '.join(PRECISIONS)}")
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)


def resize_logits(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return logits (N, C, *, *) as float32 at the given (height, width), bilinear."""
    logits = logits.float()
    if logits.shape[-2:] == tuple(size):
        return logits
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
