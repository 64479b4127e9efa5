"""Synthetic images with uncertain labels, whose class probabilities are known.

Shapes with soft edges are painted over a background; some are clear, some are faint. The opacity of a shape at a pixel
is the probability that it covers the pixel; later shapes cover earlier ones. One annotation is drawn from these
probabilities, which `posterior` returns. So the true probabilities are known, and the data favour no rule. The labels
of neighbouring pixels are drawn together, as a human draws them: they are not independent.

Shapes: C classes, K objects, H and W pixels (here equal).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from configs.errors import UserError

from .base import DatasetInfo, SegmentationDataset, digest
from .loaders import derive_seed

VERSION = 1  # a part of the fingerprint; increase it when the images change
SPLITS = ("train", "val", "test")
NUM_IMAGES = {"train": 400, "val": 100, "test": 100}
CLASSES = ("background", "disc", "box", "diamond", "ring")
PALETTE = ((0, 0, 0), (214, 69, 65), (38, 132, 204), (245, 190, 40), (46, 160, 103))
BACKGROUND = (0.42, 0.40, 0.38)

OBJECTS = (2, 6)  # smallest and largest number of objects
RADIUS = (0.05, 0.28)  # half the width of an object, as a share of the side; log-uniform
SOFTNESS = (0.005, 0.05)  # standard deviation of the position of the edge, as a share of the side
FAINT = 0.3  # share of objects with a probability far below 1
FAINT_PROBABILITY = (0.25, 0.75)
CLEAR_PROBABILITY = 0.995
SMOOTHNESS = 0.08  # length scale of the random fields of annotation and light, as a share of the side
NOISE = 0.10  # standard deviation of the pixel noise, on [0, 1]
SHADE = 0.06  # standard deviation of the smooth changes of light


class Scene(NamedTuple):
    """The class of each object, and the probit (inverse normal distribution function) of its opacity at each pixel."""

    labels: Tensor  # (K,) int64, 1..C-1
    probits: Tensor  # (K, H, W) float32


class Synthetic(SegmentationDataset):
    """Images that are made from the seed, the split and the index when they are read."""

    def __init__(
        self,
        split: str = "train",
        num_images: int | Mapping[str, int] | None = None,  # one number, or one per split; None: NUM_IMAGES
        size: int = 96,  # side of the image in pixels
        num_classes: int = 5,  # 2 to 5, with the background
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise UserError(f"split={split!r} is invalid: expected one of {', '.join(SPLITS)}")
        counts = NUM_IMAGES if num_images is None else num_images
        count = counts.get(split, 0) if isinstance(counts, Mapping) else counts
        if not 2 <= num_classes <= len(CLASSES):
            raise UserError(f"num_classes={num_classes} is invalid: expected 2 to {len(CLASSES)}")
        for name, value, least in (("num_images", count, 1), ("size", size, 8)):
            if not isinstance(value, int) or value < least:
                raise UserError(f"{name}={value} is invalid: expected an integer >= {least}")
        self.split, self.size, self.seed = split, size, seed
        self.names = [f"{split}_{index:05d}" for index in range(count)]
        self.info = DatasetInfo(
            name="synthetic",
            classes=CLASSES[:num_classes],
            palette=PALETTE[:num_classes],
            scored=tuple(range(1, num_classes)),
            mean=(0.44, 0.41, 0.37),
            std=(0.17, 0.15, 0.17),
        )
        axis = torch.arange(size, dtype=torch.float32) + 0.5
        self._y, self._x = torch.meshgrid(axis, axis, indexing="ij")
        self._basis = smooth_basis(size, SMOOTHNESS * size)
        self._colours = torch.tensor([BACKGROUND, *PALETTE[1:num_classes]])
        self._colours[1:] /= 255

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return image (3, H, W) uint8 and one drawn annotation (H, W) uint8."""
        generator = self._generator(index)
        scene = self._scene(generator)
        mask = self._annotate(scene, generator)
        return tv_tensors.Image(self._paint(scene, generator)), tv_tensors.Mask(mask)

    def posterior(self, index: int) -> Tensor:
        """Return the probability (C, H, W) float32 of each class at each pixel, given the painted objects."""
        scene = self._scene(self._generator(index))
        probs = torch.zeros(self.info.num_classes, self.size, self.size)
        probs[0] = 1
        for label, opacity in zip(scene.labels.tolist(), torch.special.ndtr(scene.probits), strict=True):
            probs *= 1 - opacity  # later objects cover earlier ones
            probs[label] += opacity
        return probs

    def fingerprint(self) -> str:
        return digest(["synthetic", VERSION, self.split, len(self), self.size, self.info.num_classes, self.seed])

    def _generator(self, index: int) -> torch.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        return torch.Generator().manual_seed(derive_seed("synthetic", self.seed, self.split, index))

    def _scene(self, generator: torch.Generator) -> Scene:
        """Draw the objects. They are the first draws of the generator, so `posterior` can repeat them."""
        least, most = OBJECTS
        count = int(torch.randint(least, most + 1, (), generator=generator))
        labels = torch.randint(1, self.info.num_classes, (count,), generator=generator)
        draws = torch.rand(8, count, 1, 1, generator=generator)
        radius = self.size * RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** draws[0]
        softness = self.size * interpolate(SOFTNESS, draws[1])
        x, y = self._x - self.size * draws[2], self._y - self.size * draws[3]
        cos, sin = torch.cos(math.pi * draws[4]), torch.sin(math.pi * draws[4])
        aspect = interpolate((0.6, 1.0), draws[5])
        u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / (radius * aspect)
        inside = [SHAPES[label](u_, v_) for label, u_, v_ in zip(labels.tolist(), u, v, strict=True)]
        depth = radius * aspect * torch.stack(inside)
        opacity = torch.where(draws[6] < FAINT, interpolate(FAINT_PROBABILITY, draws[7]), CLEAR_PROBABILITY)
        return Scene(labels, torch.minimum(depth / softness, torch.special.ndtri(opacity)))

    def _annotate(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Draw the mask (H, W) uint8. An object covers a pixel if a smooth N(0, 1) field is below its probit there."""
        shape = len(scene.labels), self._basis.shape[1], self._basis.shape[1]
        fields = self._basis @ torch.randn(shape, generator=generator) @ self._basis.T
        mask = torch.zeros(self.size, self.size, dtype=torch.uint8)
        for label, there in zip(scene.labels.tolist(), fields < scene.probits, strict=True):
            mask[there] = label
        return mask

    def _paint(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Paint the image (3, H, W) uint8: blend the colours by opacity, then add light and noise."""
        knots = self._basis.shape[1]
        image = self._colours[0].view(3, 1, 1).expand(3, self.size, self.size)
        for colour, opacity in zip(self._colours[scene.labels], torch.special.ndtr(scene.probits), strict=True):
            image = torch.lerp(image, colour.view(3, 1, 1), opacity)
        light = self._basis @ torch.randn(knots, knots, generator=generator) @ self._basis.T
        image = image + SHADE * light + NOISE * torch.randn(image.shape, generator=generator)
        return (255 * image.clamp(0, 1)).to(torch.uint8)


# For each class, the signed distance of a point to the edge of a shape of half width 1; positive inside.
SHAPES = {
    1: lambda u, v: 1 - torch.sqrt(u * u + v * v),
    2: lambda u, v: 1 - torch.maximum(u.abs(), v.abs()),
    3: lambda u, v: (1 - u.abs() - v.abs()) / math.sqrt(2),
    4: lambda u, v: 0.3 - (torch.sqrt(u * u + v * v) - 0.7).abs(),
}


def interpolate(bounds: tuple[float, float], share: Tensor) -> Tensor:
    """Interpolate between the bounds: `share` 0 gives the first bound, 1 the second."""
    return bounds[0] + (bounds[1] - bounds[0]) * share


def smooth_basis(size: int, length: float) -> Tensor:
    """Return B (size, knots); for standard normal Z, B Z Bᵀ is a smooth field of variance 1."""
    knots = torch.arange(-2 * length, size + 2 * length, length)
    distance = (torch.arange(size) + 0.5)[:, None] - knots
    weights = torch.exp(-0.5 * (distance / length) ** 2)
    return weights / weights.norm(dim=1, keepdim=True)
