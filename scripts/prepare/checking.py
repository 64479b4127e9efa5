"""Every fault of a data set, found in parallel, each with its path.

Pairs are checked by the data set's own `check`, which decodes image and mask; what can only be seen by
looking at several files (duplicates, images in two splits) is checked here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from datasets.files import PairedDataset, file_size
from datasets.listing import image_files
from scripts.parallel import ahead
from trainers.results import file_sha256


@dataclass(frozen=True)
class Fault:
    """One thing to mend. ``kind`` is pair, partner, duplicate, leak or set."""

    kind: str
    split: str
    path: str
    message: str


@dataclass
class Report:
    """What a check found: ``splits`` holds the number of images of each split; ``notes`` are no faults."""

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
        *partner_faults(splits),
        *shared_names(splits),
        *shared_stems(splits),
        *shared_content(splits, workers),
        *(
            Fault("set", split, str(root), text)
            for split, data in splits.items()
            for text in data.faults_as_a_whole()
        ),
    ]
    unused = unused_images(splits)
    if unused:
        report.notes.append(f"images in none of these splits: {len(unused)}, such as {unused[0]}")
    return report


def pair_faults(splits: Mapping[str, PairedDataset], workers: int, progress: bool) -> list[Fault]:
    """Return what is wrong with single pairs: unreadable, missing, unlike sizes, labels outside the table."""
    work = [(split, data, index) for split, data in splits.items() for index in range(len(data))]

    def examine(item: tuple[str, PairedDataset, int]) -> list[Fault]:
        split, data, index = item
        pair = data.pairs[index]
        return [
            Fault("pair", split, str(pair.mask if text.startswith(str(pair.mask)) else pair.image), text)
            for text in data.check(index)
        ]

    bar = tqdm(
        total=len(work), desc="checking", unit="image", disable=None if progress else True, leave=False
    )
    found: list[Fault] = []
    with bar:
        for faults in ahead(examine, work, workers):
            found += faults
            bar.update()
            bar.set_postfix(faults=len(found), refresh=False)
    return found


def partner_faults(splits: Mapping[str, PairedDataset]) -> list[Fault]:
    """Return the masks without an image, each once."""
    texts = {text: split for split, data in splits.items() for text in data.orphans}
    return [Fault("partner", split, text.split(" is a mask ")[0], text) for text, split in texts.items()]


def shared_names(splits: Mapping[str, PairedDataset]) -> list[Fault]:
    """Return images that are listed twice, or in two splits."""
    listed: dict[Path, list[str]] = defaultdict(list)
    for split, data in splits.items():
        for pair in data.pairs:
            listed[pair.image].append(split)
    found = []
    for path, where in listed.items():
        if len(set(where)) > 1:
            text = f"{path} is in {' and '.join(dict.fromkeys(where))}: keep it in one split"
            found.append(Fault("leak", where[-1], str(path), text))
        elif len(where) > 1:
            text = f"{path} is listed {len(where)} times in {where[0]}: list it once"
            found.append(Fault("duplicate", where[0], str(path), text))
    return found


def shared_stems(splits: Mapping[str, PairedDataset]) -> list[Fault]:
    """Return images that share a name but for the suffix: only one of them would be read."""
    found = []
    for split, folder in _folders(splits):
        stems: dict[str, list[Path]] = defaultdict(list)
        for path in image_files(folder):
            stems[path.stem].append(path)
        for paths in stems.values():
            if len(paths) > 1:
                names = " and ".join(path.name for path in paths)
                text = f"{paths[0]}: {names} share a name, and one mask: rename or remove one"
                found.append(Fault("duplicate", split, str(paths[0]), text))
    return found


def shared_content(splits: Mapping[str, PairedDataset], workers: int) -> list[Fault]:
    """Return images whose files are equal byte for byte; only files of equal size are read."""
    sizes: dict[int, dict[Path, str]] = defaultdict(dict)
    for split, data in splits.items():
        for pair in data.pairs:
            size = file_size(pair.image)
            if size > 0:
                sizes[size].setdefault(pair.image, split)
    candidates = [item for group in sizes.values() if len(group) > 1 for item in group.items()]
    same: dict[str, tuple[Path, str]] = {}
    found = []
    for (path, split), digest in zip(
        candidates, ahead(lambda item: _digest(item[0]), candidates, workers), strict=True
    ):
        if not digest:
            continue  # unreadable, and named already
        first, first_split = same.setdefault(digest, (path, split))
        if first == path:
            continue
        if split == first_split:
            text = f"{path} is the same picture as {first}: keep one"
        else:
            text = f"{path} ({split}) is the same picture as {first} ({first_split}): keep it in one split"
        found.append(Fault("duplicate" if split == first_split else "leak", split, str(path), text))
    return found


def unused_images(splits: Mapping[str, PairedDataset]) -> list[Path]:
    """Return images that lie in the folders of the splits but belong to none."""
    used = {pair.image for data in splits.values() for pair in data.pairs}
    return [path for _, folder in _folders(splits) for path in image_files(folder) if path not in used]


def _folders(splits: Mapping[str, PairedDataset]) -> Iterable[tuple[str, Path]]:
    seen = {pair.image.parent: split for split, data in splits.items() for pair in data.pairs}
    return [(split, folder) for folder, split in seen.items() if folder.is_dir()]


def _digest(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return ""
