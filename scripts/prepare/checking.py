"""Find every fault of a data set, each with its path, and count its pixels; both read files in parallel.

The data set's own `check` decodes single pairs. Faults that show only in several files (duplicates, images in two
splits) are found here.
"""

from __future__ import annotations

from collections import defaultdict
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


def count(data: SegmentationDataset, workers: int, progress: bool) -> dict[str, Any]:
    """Read every pair once; return image sizes, mean and std of the colours in [0, 1], and class frequencies.

    Histograms of all values suffice for exact numbers. Shares are of the pixels that are not void.

    Raises DatasetError for the first pair that cannot be read.
    """

    def read(index: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        image, mask = (part.as_subclass(Tensor) for part in data.read(index))
        histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in (*image, mask)]
        return torch.stack(histograms[:3]), histograms[3], (image.shape[-2], image.shape[-1])

    pixels, labels, present = (torch.zeros(shape, dtype=torch.int64) for shape in ((3, 256), 256, 256))
    sizes = []
    for colours, of_mask, size in _bar(ahead(read, range(len(data)), workers), len(data), "counting", progress):
        pixels += colours
        labels += of_mask
        present += of_mask > 0
        sizes.append(size)
    heights, widths = zip(*sizes, strict=True)
    values, number = torch.arange(256, dtype=torch.float64), pixels.sum(1)
    mean = (pixels * values).sum(1) / number
    std = ((pixels * (values - mean[:, None]) ** 2).sum(1) / number).sqrt()
    labelled = int(labels[: data.info.num_classes].sum())
    return {
        "images": len(sizes),
        "height": [min(heights), max(heights)],
        "width": [min(widths), max(widths)],
        "mean": [round(value, 8) for value in (mean / 255).tolist()],
        "std": [round(value, 8) for value in (std / 255).tolist()],
        "void": int(labels[data.info.ignore_index]) / int(labels.sum()),
        "classes": [
            {
                "index": index,
                "name": name,
                "pixels": int(labels[index]),
                "share": int(labels[index]) / labelled if labelled else None,
                "images": int(present[index]),
            }
            for index, name in enumerate(data.info.classes)
        ],
    }
