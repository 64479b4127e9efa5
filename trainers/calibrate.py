"""Fit the calibration of a network's logits on held-out images.

Shapes: N images, C classes, H × W pixels, P pixels in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from rankseg.calibration import Calibration, fit_calibration, fit_temperature
from trainers.distributed import World, gather_objects
from trainers.forward import forward

_PIXELS = 4096  # of an image, at a regular stride: neighbouring pixels hold nearly the same information


def held_out_temperature(
    model: nn.Module,
    batches: Iterable[Any],
    link: str,
    world: World,
    *,
    ignore_index: int = 255,
    precision: str = "fp32",
) -> float:
    """Return the temperature that makes the labels of ``batches`` most likely.

    Raises:
        UserError: there is no image, or no labelled pixel.
    """
    logits, targets = _held_out_pixels(model, batches, world, ignore_index, precision)
    return float(fit_temperature(logits, targets, link, ignore_index=ignore_index))


def held_out_calibration(
    model: nn.Module,
    batches: Iterable[Any],
    link: str,
    world: World,
    *,
    ignore_index: int = 255,
    precision: str = "fp32",
) -> Calibration:
    """Return the temperature and bias of each class that make the labels of ``batches`` most likely.

    Raises:
        UserError: there is no image, or no labelled pixel.
    """
    logits, targets = _held_out_pixels(model, batches, world, ignore_index, precision)
    return fit_calibration(logits, targets, link, ignore_index=ignore_index)


def _held_out_pixels(
    model: nn.Module, batches: Iterable[Any], world: World, ignore_index: int, precision: str
) -> tuple[Tensor, Tensor]:
    """Logits (1, C, P) and labels (1, P) of some pixels of every image, at every rank, in the order of the images."""
    kept: list[tuple[int, Tensor, Tensor]] = []
    title = "fitting the calibration"
    for batch, targets, logits in forward(model, batches, world, precision=precision, progress=title):
        stride = max(1, targets[0].numel() // _PIXELS)
        some, labels = logits.flatten(2)[..., ::stride].cpu(), targets.flatten(1)[:, ::stride].cpu()
        kept += zip(batch.indices, some, labels, strict=True)
    shares = sorted((row for share in gather_objects(kept, world) for row in share), key=lambda row: row[0])
    if not any((row[2] != ignore_index).any() for row in shares):
        raise UserError(
            f"images={len(shares)} of the validation split have no labelled pixel to fit the calibration on. "
            "Fix: check dataset.splits and dataset.root."
        )
    with torch.inference_mode(False):
        logits = torch.cat([row[1] for row in shares], dim=1)[None].clone()
        return logits, torch.cat([row[2] for row in shares])[None].clone()
