"""Find every fault of a data set, each with its path, and count its pixels; both read files in parallel.

The data set's own `check` decodes single pairs. Faults that show only in several files (duplicates, images in two
splits) are found here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import one_line
from configs.files import file_sha256
from datasets import SegmentationDataset
from datasets.base import DatasetInfo
from datasets.decode import list_images
from datasets.paired import PairedDataset, file_size
from scripts.common import ahead

Item = TypeVar("Item")


@dataclass(frozen=True)
class Fault:
    """One fault. ``kind`` is pair, partner, duplicate, leak or set."""

    kind: str
    split: str
    path: str
    message: str


@dataclass
class Report:
    """The result of a check. ``splits`` has the number of images of each split; ``notes`` are not faults."""

    dataset: str
    root: str
    splits: dict[str, int]
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Return the report as plain containers."""
        return {"ok": not self.faults, **asdict(self)}


def check(name: str, root: Path, splits: Mapping[str, PairedDataset], workers: int, progress: bool) -> Report:
    """Check every file of the splits."""
    report = Report(name, str(root), {split: len(data) for split, data in splits.items()})
    report.faults = [
        *pair_faults(splits, workers, progress),
        *file_faults(splits),
        *shared_names(splits),
        *shared_content(splits, workers),
        *(Fault("set", split, str(root), text) for split, data in splits.items() for text in data.faults_as_a_whole()),
    ]
    unused = unused_images(splits)
    if unused:
        report.notes.append(f"images in none of these splits: {len(unused)}, such as {unused[0]}")
    report.notes += dict.fromkeys(note for data in splits.values() for note in data.notes())
    return report


def pair_faults(splits: Mapping[str, PairedDataset], workers: int, progress: bool) -> list[Fault]:
    """Return the faults of single pairs: unreadable, missing, different sizes, labels that are not in the table."""
    work = [(split, data, index) for split, data in splits.items() for index in range(len(data))]

    def examine(item: tuple[str, PairedDataset, int]) -> list[Fault]:
        split, data, index = item
        pair = data.pairs[index]
        of_mask = one_line(pair.mask)
        return [
            Fault("pair", split, str(pair.mask if text.startswith(of_mask) else pair.image), text)
            for text in data.check(index)
        ]

    found: list[Fault] = []
    for faults in _bar(ahead(examine, work, workers), len(work), "checking", progress):
        found += faults
    return found


def _bar(items: Iterable[Item], total: int, title: str, shown: bool) -> Iterable[Item]:
    """Return the items with a progress bar over images; without a terminal there is none."""
    hidden = None if shown else True
    return tqdm(items, desc=title, total=total, unit="image", disable=hidden, leave=False)


def file_faults(splits: Mapping[str, PairedDataset]) -> list[Fault]:
    """Return masks without an image, and files that share a name so that only one is read; each once."""
    orphans = {text: split for split, data in splits.items() for text in data.orphans}
    clashes = {text: split for split, data in splits.items() for text in data.clashes}
    return [
        *(Fault("partner", split, text.split(" is a mask ")[0], text) for text, split in orphans.items()),
        *(Fault("duplicate", split, text.split(" and ")[0], text) for text, split in clashes.items()),
    ]


def shared_names(splits: Mapping[str, PairedDataset]) -> list[Fault]:
    """Return images that are listed twice or in two splits."""
    listed: dict[Path, list[str]] = defaultdict(list)
    for split, data in splits.items():
        for pair in data.pairs:
            listed[pair.image].append(split)
    found = []
    for path, where in listed.items():
        if len(set(where)) > 1:
            text = f"{path} is in {' and '.join(dict.fromkeys(where))}. Fix: keep it in one split"
            found.append(Fault("leak", where[-1], str(path), text))
        elif len(where) > 1:
            text = f"{path} is listed {len(where)} times in {where[0]}. Fix: list it once"
            found.append(Fault("duplicate", where[0], str(path), text))
    return found


def shared_content(splits: Mapping[str, PairedDataset], workers: int) -> list[Fault]:
    """Return images whose files are equal byte by byte; only files of equal size are read."""
    sizes: dict[int, dict[Path, str]] = defaultdict(dict)
    for split, data in splits.items():
        for pair in data.pairs:
            size = file_size(pair.image)
            if size > 0:
                sizes[size].setdefault(pair.image, split)
    candidates = [item for group in sizes.values() if len(group) > 1 for item in group.items()]
    digests = ahead(lambda item: _digest(item[0]), candidates, workers)
    first_of: dict[str, tuple[Path, str]] = {}
    found = []
    for (path, split), digest in zip(candidates, digests, strict=True):
        if not digest:
            continue  # unreadable; pair_faults names it
        first, other = first_of.setdefault(digest, (path, split))
        if first == path:
            continue
        if split == other:
            kind, text = "duplicate", f"{path} is the same picture as {first}. Fix: keep one"
        else:
            kind = "leak"
            text = f"{path} ({split}) is the same picture as {first} ({other}). Fix: keep it in one split"
        found.append(Fault(kind, split, str(path), text))
    return found


def unused_images(splits: Mapping[str, PairedDataset]) -> list[Path]:
    """Return images in the folders of the splits that belong to no split."""
    used = {pair.image for data in splits.values() for pair in data.pairs}
    folders = {path.parent for path in used if path.parent.is_dir()}
    return sorted(path for folder in folders for path in set(list_images(folder).images.values()) - used)


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""


@dataclass
class Totals:
    """Histograms over images; they suffice for exact means, standard deviations and class frequencies.

    pixels: (3, 256) int64, how often each value occurs in R, G and B. labels: (256,) int64, pixels of each
    label. present: (256,) int64, images that have it. sizes: (height, width) -> images.
    """

    pixels: Tensor = field(default_factory=lambda: torch.zeros(3, 256, dtype=torch.int64))
    labels: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    present: Tensor = field(default_factory=lambda: torch.zeros(256, dtype=torch.int64))
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @classmethod
    def of(cls, image: Tensor, mask: Tensor) -> Totals:
        """Return the totals of one pair: image (3, H, W) uint8, mask (H, W) uint8."""
        pixels = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in image])
        labels = torch.bincount(mask.flatten(), minlength=256)
        return cls(pixels, labels, (labels > 0).long(), Counter([(image.shape[-2], image.shape[-1])]))

    def add(self, other: Totals) -> None:
        """Add the counts of other images."""
        self.pixels += other.pixels
        self.labels += other.labels
        self.present += other.present
        self.sizes.update(other.sizes)

    def mean_std(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of R, G and B over all pixels, in [0, 1]."""
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

    Raises DatasetError for the first that cannot be read.
    """

    def read(index: int) -> Totals:
        image, mask = (part.as_subclass(Tensor) for part in data.read(index))
        return Totals.of(image, mask)

    totals = Totals()
    for one in _bar(ahead(read, range(len(data)), workers), len(data), "counting", progress):
        totals.add(one)
    return totals
