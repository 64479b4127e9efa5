"""Drawn images whose right answer is uncertain, and whose uncertainty is known.

Soft-edged shapes are painted over a background, some clear, some faint. At each pixel, the opacity of a shape
IS the probability that the annotation counts the pixel to it; the annotation is one draw. What a network can
learn is therefore a probability, known exactly (`posterior`), and no rule is favoured: a calibrated network
is one that reads opacity through the noise. Labels of near pixels are drawn together, as annotators do, so
the draws are not independent.

Shapes: C classes, K objects, H and W pixels (here equal).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import tv_tensors

from .base import DatasetInfo, SegmentationDataset, digest

VERSION = 1  # enters the fingerprint; raise it when the drawing changes
SPLITS = ("train", "val", "test")
NUM_IMAGES = {"train": 400, "val": 100, "test": 100}
CLASSES = ("background", "disc", "box", "diamond", "ring")
PALETTE = ((0, 0, 0), (214, 69, 65), (38, 132, 204), (245, 190, 40), (46, 160, 103))
BACKGROUND = (0.42, 0.40, 0.38)

OBJECTS = (2, 6)  # how many, both included
RADIUS = (0.05, 0.28)  # half of an object's width, as a share of the image's side, uniform in its logarithm
SOFTNESS = (0.005, 0.05)  # standard deviation of where the edge is drawn, as a share of the side
FAINT = 0.3  # the share of objects that the annotation covers in parts only
FAINT_PROBABILITY = (0.25, 0.75)
CLEAR_PROBABILITY = 0.995
WIGGLE = 0.08  # correlation length of the annotation, as a share of the side
NOISE = 0.10  # of the pixels, standard deviation in [0, 1]
SHADE = 0.06  # of smooth changes of light


class Scene(NamedTuple):
    """What is painted: per object its class and, per pixel, the probit of its opacity."""

    labels: Tensor  # (K,) int64, 1..C-1
    probits: Tensor  # (K, H, W) float32


class Synthetic(SegmentationDataset):
    """Images drawn on the fly from (seed, split, index): nothing is stored and nothing is fetched.

    `num_images` is one number, or one for each split by name; `None` means 400 to train on, 100 else.
    `num_classes`, 2 to 5, counts the background. `size` is the side in pixels.
    """

    def __init__(
        self,
        split: str = "train",
        num_images: int | Mapping[str, int] | None = None,
        size: int = 96,
        num_classes: int = 5,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"Synthetic has no split {split!r}: choose one of {', '.join(SPLITS)}")
        counts = NUM_IMAGES if num_images is None else num_images
        count = int(counts[split]) if isinstance(counts, Mapping) else int(counts)
        if not 2 <= num_classes <= len(CLASSES):
            raise ValueError(f"num_classes={num_classes}: Synthetic draws 2 to {len(CLASSES)} classes")
        if count < 1 or size < 8:
            raise ValueError(f"num_images={count}, size={size}: at least 1 image of 8 pixels a side")
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
        self._basis = smooth_basis(size, WIGGLE * size)
        self._colours = torch.tensor([BACKGROUND, *PALETTE[1:num_classes]])
        self._colours[1:] /= 255

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return image (3, H, W) uint8 and one drawn annotation (H, W) uint8."""
        generator = self._generator(index)
        scene = self._scene(generator)
        mask = self._annotate(scene, generator)
        return tv_tensors.Image(self._paint(scene, generator)), tv_tensors.Mask(mask)

    def posterior(self, index: int) -> Tensor:
        """Return the probability (C, H, W) float32 of each class at each pixel, given what is painted."""
        scene = self._scene(self._generator(index))
        probs = torch.zeros(self.info.num_classes, self.size, self.size)
        probs[0] = 1
        for label, opacity in zip(scene.labels.tolist(), torch.special.ndtr(scene.probits), strict=True):
            probs *= 1 - opacity  # what is painted later covers what is there
            probs[label] += opacity
        return probs

    def fingerprint(self) -> str:
        """Return a hash of everything the images are drawn from."""
        return digest(
            ["synthetic", VERSION, self.split, len(self), self.size, self.info.num_classes, self.seed]
        )

    def _generator(self, index: int) -> torch.Generator:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}")
        key = hashlib.sha256(f"synthetic/{self.seed}/{self.split}/{index}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(key[:7], "big"))

    def _scene(self, generator: torch.Generator) -> Scene:
        """Place the objects; the first draws of the generator."""
        least, most = OBJECTS
        count = int(torch.randint(least, most + 1, (), generator=generator))
        labels = torch.randint(1, self.info.num_classes, (count,), generator=generator)
        draws = torch.rand(8, count, 1, 1, generator=generator)
        radius = self.size * RADIUS[0] * (RADIUS[1] / RADIUS[0]) ** draws[0]
        softness = self.size * between(SOFTNESS, draws[1])
        x, y = self._x - self.size * draws[2], self._y - self.size * draws[3]
        cos, sin = torch.cos(math.pi * draws[4]), torch.sin(math.pi * draws[4])
        narrow = between((0.6, 1.0), draws[5])
        u, v = (cos * x + sin * y) / radius, (cos * y - sin * x) / (radius * narrow)
        depth = (
            radius
            * narrow
            * torch.stack(
                [SHAPES[label](u_, v_) for label, u_, v_ in zip(labels.tolist(), u, v, strict=True)]
            )
        )
        seen = torch.where(draws[6] < FAINT, between(FAINT_PROBABILITY, draws[7]), CLEAR_PROBABILITY)
        return Scene(labels, torch.minimum(depth / softness, torch.special.ndtri(seen)))

    def _annotate(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Draw the mask (H, W) uint8: an object is where a smooth N(0, 1) field stays below its probit."""
        shape = len(scene.labels), self._basis.shape[1], self._basis.shape[1]
        fields = self._basis @ torch.randn(shape, generator=generator) @ self._basis.T
        mask = torch.zeros(self.size, self.size, dtype=torch.uint8)
        for label, there in zip(scene.labels.tolist(), fields < scene.probits, strict=True):
            mask[there] = label
        return mask

    def _paint(self, scene: Scene, generator: torch.Generator) -> Tensor:
        """Paint the image (3, H, W) uint8: colour over colour by opacity, then light and noise."""
        knots = self._basis.shape[1]
        image = self._colours[0].view(3, 1, 1).expand(3, self.size, self.size)
        for colour, opacity in zip(
            self._colours[scene.labels], torch.special.ndtr(scene.probits), strict=True
        ):
            image = torch.lerp(image, colour.view(3, 1, 1), opacity)
        light = self._basis @ torch.randn(knots, knots, generator=generator) @ self._basis.T
        image = image + SHADE * light + NOISE * torch.randn(image.shape, generator=generator)
        return (255 * image.clamp(0, 1)).to(torch.uint8)


# By class: how deep inside a shape of half width 1 a point is, in half widths. Positive inside, 0 at the edge.
SHAPES = {
    1: lambda u, v: 1 - torch.sqrt(u * u + v * v),
    2: lambda u, v: 1 - torch.maximum(u.abs(), v.abs()),
    3: lambda u, v: (1 - u.abs() - v.abs()) / math.sqrt(2),
    4: lambda u, v: 0.3 - (torch.sqrt(u * u + v * v) - 0.7).abs(),
}


def between(bounds: tuple[float, float], share: Tensor) -> Tensor:
    """Return the point that lies this share of the way between the bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * share


def smooth_basis(size: int, length: float) -> Tensor:
    """Return B (size, knots); for standard normal Z, B Z Bᵀ is a smooth field of variance 1."""
    knots = torch.arange(-2 * length, size + 2 * length, length)
    distance = (torch.arange(size) + 0.5)[:, None] - knots
    weights = torch.exp(-0.5 * (distance / length) ** 2)
    return weights / weights.norm(dim=1, keepdim=True)
