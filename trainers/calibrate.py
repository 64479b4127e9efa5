"""Fitting a network's temperature on held-out images.

Letters of shapes: N images, C classes, H × W pixels, P pixels in all.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from rankseg.calibration import fit_temperature
from trainers.distributed import World, gather
from trainers.evaluator import at_size


@torch.inference_mode()
def held_out_temperature(
    model: nn.Module,
    batches: Iterable[Any],
    link: str,
    where: World,
    *,
    ignore_index: int = 255,
    pixels: int = 4096,
) -> float:
    """The temperature that makes the network's probabilities most likely on the images of ``batches``.

    Looks at ``pixels`` of each image at a regular stride: neighbouring pixels say the same thing.

    Raises:
        ValueError: no labelled pixel.
    """
    model.eval()
    kept: list[tuple[int, Tensor, Tensor]] = []
    for batch in tqdm(
        batches, desc="fitting the temperature", disable=None if where.is_main else True, leave=False
    ):
        logits = at_size(model(batch.images.to(where.device)).logits, batch.targets.shape[-2:])
        stride = max(1, batch.targets[0].numel() // pixels)
        some, labels = logits.flatten(2)[..., ::stride].cpu(), batch.targets.flatten(1)[:, ::stride].cpu()
        kept += zip(batch.indices, some, labels, strict=True)
    shares = sorted((row for share in gather(kept, where) for row in share), key=lambda row: row[0])
    if not shares:
        raise ValueError("there is no image to fit a temperature on; check the split and dataset.root")
    logits = torch.cat([row[1] for row in shares], dim=1)[None]
    targets = torch.cat([row[2] for row in shares])[None]
    with torch.inference_mode(False):
        return float(fit_temperature(logits.clone(), targets.clone(), link, ignore_index=ignore_index))
