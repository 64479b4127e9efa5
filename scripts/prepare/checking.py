"""Find every fault of a data set, each with its path, and count its pixels. Both read files in parallel.

The `check` of the data set finds the faults of single pairs. Faults that show only in several files (duplicates, images
in two splits) are found here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import one_line
from configs.files import file_sha256
from datasets import SegmentationDataset
from datasets.decode import list_images
from datasets.paired import PairedDataset, file_size
from scripts.common import map_in_threads

Item = TypeVar("Item")
Result = TypeVar("Result")
Splits = Mapping[str, PairedDataset]


class Fault(NamedTuple):
    """One fault."""

    kind: str  # pair; partner: a mask without an image; duplicate; leak: in two splits; set: of the whole split
    split: str
    path: str
    message: str


def check(name: str, root: Path, splits: Splits, workers: int, progress: bool) -> dict[str, Any]:
    """Check every file of the splits; return faults, the number of images of each split, and notes."""
    faults = [
        *pair_faults(splits, workers, progress),
        *file_faults(splits),
        *shared_images(splits, workers),
        *(Fault("set", split, str(root), text) for split, data in splits.items() for text in data.faults_as_a_whole()),
    ]
    unused = unused_images(splits)
    notes = [f"images in none of these splits: {len(unused)}, such as {unused[0]}"] if unused else []
    notes += dict.fromkeys(note for data in splits.values() for note in data.notes())
    return {
        "ok": not faults,
        "dataset": name,
        "root": str(root),
        "splits": {split: len(data) for split, data in splits.items()},
        "faults": [fault._asdict() for fault in faults],
        "notes": notes,
    }


def pair_faults(splits: Splits, workers: int, progress: bool) -> list[Fault]:
    """Return the faults of single pairs: unreadable, missing, different sizes, labels that are not in the table."""

    def examine(item: tuple[str, PairedDataset, int]) -> list[Fault]:
        split, data, index = item
        image, mask = map(str, data.pairs[index][1:])
        of_mask = one_line(mask)
        return [Fault("pair", split, mask if text.startswith(of_mask) else image, text) for text in data.check(index)]

    work = [(split, data, index) for split, data in splits.items() for index in range(len(data))]
    return [fault for faults in _with_bar(examine, work, workers, "checking", progress) for fault in faults]


def _with_bar(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, title: str, shown: bool
) -> Iterable[Result]:
    """Yield ``function(item)`` of each item from threads, with a progress bar if ``shown`` and on a terminal."""
    hidden = None if shown else True
    results = map_in_threads(function, items, workers)
    return tqdm(results, desc=title, total=len(items), unit="image", disable=hidden, leave=False)


def file_faults(splits: Splits) -> list[Fault]:
    """Return masks without an image, and files of the same name, of which only one is read. Each is listed once."""
    orphans = {text: split for split, data in splits.items() for text in data.orphans}
    clashes = {text: split for split, data in splits.items() for text in data.clashes}
    return [
        *(Fault("partner", split, text.split(" is a mask ")[0], text) for text, split in orphans.items()),
        *(Fault("duplicate", split, text.split(" and ")[0], text) for text, split in clashes.items()),
    ]


def shared_images(splits: Splits, workers: int) -> list[Fault]:
    """Return images that are listed twice or in two splits, and images whose files are equal byte by byte."""
    listed: dict[Path, list[str]] = defaultdict(list)
    for split, data in splits.items():
        for pair in data.pairs:
            listed[pair.image].append(split)
    found = []
    sizes: dict[int, list[Path]] = defaultdict(list)
    for path, in_splits in listed.items():
        sizes[file_size(path)].append(path)
        if len(set(in_splits)) > 1:
            text = f"{path} is in {' and '.join(dict.fromkeys(in_splits))}. Fix: keep it in one split"
            found.append(Fault("leak", in_splits[-1], str(path), text))
        elif len(in_splits) > 1:
            text = f"{path} is listed {len(in_splits)} times in {in_splits[0]}. Fix: list it once"
            found.append(Fault("duplicate", in_splits[0], str(path), text))
    first_of: dict[str, Path] = {}
    candidates = [path for size, group in sizes.items() if size > 0 and len(group) > 1 for path in group]
    for path, digest in zip(candidates, map_in_threads(_digest, candidates, workers), strict=True):
        first = first_of.setdefault(digest, path)
        split, other = listed[path][0], listed[first][0]
        if first != path and split == other:
            text = f"{path} is the same picture as {first}. Fix: keep one"
            found.append(Fault("duplicate", split, str(path), text))
        elif first != path:
            text = f"{path} ({split}) is the same picture as {first} ({other}). Fix: keep it in one split"
            found.append(Fault("leak", split, str(path), text))
    return found


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return str(path)  # equals no other digest; `pair_faults` reports that the file cannot be read


def unused_images(splits: Splits) -> list[Path]:
    """Return the images that belong to no split, of the folders that hold the images of the splits."""
    used = {pair.image for data in splits.values() for pair in data.pairs}
    folders = {path.parent for path in used if path.parent.is_dir()}
    return sorted(path for folder in folders for path in set(list_images(folder).images.values()) - used)


def count(data: SegmentationDataset, workers: int, progress: bool) -> dict[str, Any]:
    """Read every pair once; return image sizes, mean and std of the colours in [0, 1], and class frequencies.

    Mean and std are exact: they are computed from histograms. The share of a class is that of the labelled pixels, the
    share of void that of all pixels.

    Raises DatasetError for the first pair that cannot be read.
    """

    def read(index: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
        image, mask = (part.as_subclass(Tensor) for part in data.read(index))
        histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in (*image, mask)]
        return torch.stack(histograms[:3]), histograms[3], (image.shape[-2], image.shape[-1])

    pixels, labels, present = (torch.zeros(shape, dtype=torch.int64) for shape in ((3, 256), 256, 256))
    sizes = []
    for colours, of_mask, size in _with_bar(read, range(len(data)), workers, "counting", progress):
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
