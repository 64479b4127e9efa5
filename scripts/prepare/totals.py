"""Mean, standard deviation and class frequencies of a data set, in one pass, exact.

Histograms are sufficient statistics: 3 x 256 counts of pixel values and 256 of labels, however many images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from datasets import SegmentationDataset
from datasets.base import DatasetInfo
from scripts.parallel import ahead


@dataclass
class Totals:
    """Counts over images.

    pixels: (3, 256) int64, how often each value occurs in R, G and B. labels: (256,) int64, pixels of each
    label. present: (256,) int64, images that show it. sizes: (height, width) -> images.
    """

    pixels: Tensor = field(default_factory=lambda: torch.zeros(3, 256, dtype=torch.int64))
    labels: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    present: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    sizes: dict[tuple[int, int], int] = field(default_factory=dict)

    @classmethod
    def of(cls, image: Tensor, mask: Tensor) -> Totals:
        """The totals of one pair: image (3, H, W) uint8, mask (H, W) uint8."""
        pixels = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in image])
        labels = torch.bincount(mask.flatten(), minlength=256)
        return cls(pixels, labels, (labels > 0).long(), {(image.shape[-2], image.shape[-1]): 1})

    def add(self, other: Totals) -> None:
        """Count the other's images too."""
        self.pixels += other.pixels
        self.labels += other.labels
        self.present += other.present
        for size, count in other.sizes.items():
            self.sizes[size] = self.sizes.get(size, 0) + count

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of R, G and B over all pixels, in [0, 1]."""
        values = torch.arange(256, dtype=torch.float64)
        count = self.pixels.sum(1)
        mean = (self.pixels * values).sum(1) / count
        square = (self.pixels * (values - mean[:, None]) ** 2).sum(1) / count
        return (mean / 255).tolist(), (square.sqrt() / 255).tolist()

    def as_json(self, info: DatasetInfo) -> dict[str, Any]:
        """Return the summary as plain containers; shares are of the pixels that are not void."""
        mean, std = self.mean_std()
        labelled = int(self.labels[: info.num_classes].sum())
        images = sum(self.sizes.values())
        heights, widths = zip(*self.sizes, strict=True)
        return {
            "images": images,
            "height": [min(heights), max(heights)],
            "width": [min(widths), max(widths)],
            "mean": [round(value, 8) for value in mean],
            "std": [round(value, 8) for value in std],
            "void": int(self.labels[info.ignore_index]) / int(self.labels.sum()),
            "classes": [
                {
                    "index": index,
                    "name": name,
                    "pixels": int(self.labels[index]),
                    "share": int(self.labels[index]) / labelled if labelled else None,
                    "images": int(self.present[index]),
                }
                for index, name in enumerate(info.classes)
            ],
        }


def count(data: SegmentationDataset, workers: int, progress: bool) -> Totals:
    """Read every pair once.

    Raises DatasetError at the first that cannot be read.
    """
    totals = Totals()
    bar = tqdm(
        total=len(data), desc="counting", unit="image", disable=None if progress else True, leave=False
    )
    with bar:
        for one in ahead(lambda index: _of(data, index), range(len(data)), workers):
            totals.add(one)
            bar.update()
    return totals


def _of(data: SegmentationDataset, index: int) -> Totals:
    image, mask = (part.as_subclass(Tensor) for part in data.read(index))
    return Totals.of(image, mask)
