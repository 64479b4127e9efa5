"""Draw an image, its truth, its probabilities and the mask of each rule side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_segmentation_masks

from rankseg import Predictor
from trainers.distributed import World
from trainers.forward import logits_of, probs_for
from trainers.metrics import Scoring, count, mean_over_classes

Transform = Callable[[Any, Any], tuple[Tensor, Tensor]]


class Panel(NamedTuple):
    """The data to draw of one image."""

    image: Tensor  # (3, H, W) uint8
    target: Tensor  # (H, W) integers
    probs: Tensor  # (C, H, W)
    masks: Mapping[str, Tensor]  # (C, H, W) bool of each rule
    info: Any  # has num_classes, scored, ignore_index and palette


@torch.inference_mode()
def panels(
    model: nn.Module,
    data: Any,
    transform: Transform,
    rules: Mapping[str, Predictor],
    to_probs: Callable[[Tensor], Tensor],
    world: World,
    indices: Iterable[int],
    precision: str = "fp32",
) -> Iterator[tuple[str, Panel]]:
    """Yield the name of each image and its panel; a rule with an attribute ``to_probs`` uses it instead."""
    for index in indices:
        image, mask = data.read(index)
        pixels, target = transform(image, mask)
        logits = logits_of(model, pixels[None], target.shape[-2:], world, precision)
        probs = to_probs(logits)
        masks = {name: rule(probs_for(rule, logits, probs))[0].cpu() for name, rule in rules.items()}
        image = denormalise(pixels, data.info, target.shape)
        yield data.names[index], Panel(image, target, probs[0].cpu(), masks, data.info)


def denormalise(pixels: Tensor, info: Any, size: Sequence[int]) -> Tensor:
    """Return a normalised image (3, H, W) as uint8, resized to ``size`` (height, width)."""
    mean, std = torch.tensor(info.mean)[:, None, None], torch.tensor(info.std)[:, None, None]
    image = (pixels.cpu() * std + mean).clamp(0, 1)
    image = F.interpolate(image[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return (image * 255).round().to(torch.uint8)


def sheet(panel: Panel, columns: int = 3, width: int = 320, font_size: int = 32) -> Tensor:
    """Return the tiles of a panel, each ``width`` pixels wide, in rows of ``columns``: (3, *, *) uint8.

    The large titles can be read in a thumbnail.
    """
    _, height, stored = panel.image.shape
    size = [max(1, round(width * height / stored)), width]
    mode = InterpolationMode.NEAREST if stored < width else InterpolationMode.BILINEAR
    cells = [
        add_title(resize(tile, size, interpolation=mode, antialias=True), title, font_size)
        for title, tile in tiles(panel).items()
    ]
    cells += [torch.full_like(cells[0], 255)] * (-len(cells) % columns)
    rows = [torch.cat(cells[k : k + columns], dim=2) for k in range(0, len(cells), columns)]
    return torch.cat(rows, dim=1)


def tiles(panel: Panel) -> dict[str, Tensor]:
    """Return the tiles (3, H, W) uint8 of a panel by title: image, truth, probability, and the mask of each rule."""
    image, target, probs, masks, info = panel
    truth = Scoring(info.num_classes, info.scored, info.ignore_index).encode(target[None])
    drawn = {
        "image": image,
        "truth": overlay(image, truth.onehot[0], info),
        "probability": heat(probs[list(info.scored)].amax(0)),
    }
    for name, mask in masks.items():
        dice = mean_over_classes(count(mask[None], truth).dice(), info.scored)
        drawn[f"{name}  Dice {float(dice):.3f}"] = overlay(image, mask, info)
    return drawn


def overlay(image: Tensor, masks: Tensor, info: Any) -> Tensor:
    """Return a darkened image (3, H, W) uint8 with the masks (C, H, W) of the scored classes in their colours."""
    scored = list(info.scored)
    colours = [tuple(info.palette[c]) for c in scored]
    return draw_segmentation_masks((image * 0.6).to(torch.uint8), masks[scored], alpha=0.65, colors=colours)


def heat(probs: Tensor) -> Tensor:
    """Return probabilities (H, W) as colours, (3, H, W) uint8: black 0, red ⅓, yellow ⅔, white 1."""
    scaled = (probs.float() * 3).clamp(0, 3)
    return (torch.stack([scaled, scaled - 1, scaled - 2]).clamp(0, 1) * 255).to(torch.uint8)


def add_title(tile: Tensor, title: str, font_size: int = 11) -> Tensor:
    """Return a tile (3, H, W) uint8 with a title above and a thin white frame."""
    picture, size, height = to_pil_image(tile), font_size, round(1.3 * font_size) + 2
    canvas = Image.new("RGB", (picture.width + 2, picture.height + height + 2), "white")
    canvas.paste(picture, (1, height))
    font = ImageFont.load_default(size)
    while size > 6 and font.getlength(title) > picture.width:
        size -= 1
        font = ImageFont.load_default(size)
    ImageDraw.Draw(canvas).text((2, 1), title, fill="black", font=font)
    return pil_to_tensor(canvas)
