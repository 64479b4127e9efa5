"""What a loader's process does for a key: read, transform with the key's own random numbers, and batch.

Shapes: N images of a batch, H and W pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .base import DatasetError, Sample, SegmentationDataset

Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """Images of one size, with their targets."""

    images: Tensor  # (N, 3, H, W) float32, normalised
    targets: Tensor  # (N, H', W') int64; H', W' differ from H, W only in evaluation
    names: list[str]
    indices: list[int]


@dataclass(frozen=True)
class Key:
    """Which image, in which epoch: all that a worker needs to know."""

    epoch: int
    index: int


@dataclass(frozen=True)
class Loaded:
    """What a worker sends back for a key: a sample, or why there is none."""

    index: int
    sample: Sample | None
    faults: list[tuple[str, str]]  # (name, message) of images that could not be read


def seed_of(*parts: int) -> int:
    """Return a seed, the same on every machine, from a few integers."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


class Reader(Dataset):
    """Reads and transforms one image a key, each with its own random numbers."""

    def __init__(
        self, dataset: SegmentationDataset, transform: Transform, seed: int, substitute: bool
    ) -> None:
        self.dataset, self.transform, self.seed, self.substitute = dataset, transform, seed, substitute

    def __getitem__(self, key: Key) -> Loaded:
        """Return the sample of a key; a DatasetError is sent back as text, anything else is a bug and raised.

        With `substitute`, the next readable image takes the place of one that is not.
        """
        total, faults = len(self.dataset), list[tuple[str, str]]()
        for step in range(total if self.substitute else 1):
            index = (key.index + step) % total
            name = self.dataset.names[index]
            try:
                return Loaded(index, self.sample(key.epoch, index, name), faults)
            except DatasetError as error:
                faults.append((name, str(error)))
        return Loaded(key.index, None, faults)

    def sample(self, epoch: int, index: int, name: str) -> Sample:
        image, mask = self.dataset.read(index)
        # torch.manual_seed would seed the accelerators too, and with them the network's dropout.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return Sample(*self.transform(image, mask), name)


def collate(loaded: list[Loaded]) -> tuple[list[Batch], list[tuple[str, str]]]:
    """Return the samples as batches of one size each, in order, and the faults."""
    faults = [fault for item in loaded for fault in item.faults]
    runs: list[list[tuple[int, Sample]]] = []
    for item in loaded:
        if item.sample is None:
            continue
        if not runs or shapes(runs[-1][0][1]) != shapes(item.sample):
            runs.append([])
        runs[-1].append((item.index, item.sample))
    return [stack(run) for run in runs], faults


def shapes(sample: Sample) -> tuple[torch.Size, torch.Size]:
    """Return the shapes that must agree within a batch."""
    return sample.image.shape, sample.target.shape


def stack(run: list[tuple[int, Sample]]) -> Batch:
    """Return samples of one size as a batch."""
    samples = [sample for _, sample in run]
    return Batch(
        torch.stack([sample.image for sample in samples]),
        torch.stack([sample.target for sample in samples]),
        [sample.name for sample in samples],
        [index for index, _ in run],
    )
