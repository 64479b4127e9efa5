"""Data sets that consist of pairs of files: pairing, reading and checking them."""

from __future__ import annotations

import contextlib
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors

from .base import DatasetError, SegmentationDataset, digest, spread
from .decode import ImageFolder, decode_image, decode_mask, is_deep, open_image, orientation_of

END_BYTES = 32 << 10  # bytes read at each end of a large PNG image for its checksum


class Pair(NamedTuple):
    """An image and its mask on disk."""

    name: str
    image: Path
    mask: Path


class LabelTable:
    """The class index of each raw label in a mask file; other labels are invalid."""

    def __init__(self, mapping: Mapping[int, int]) -> None:
        self.mapping = dict(mapping)
        self.invalid = next(k for k in range(255, -1, -1) if k not in self.mapping.values())
        self._bytes = bytes(self.mapping.get(raw, self.invalid) for raw in range(256))

    def encode(self, raw: np.ndarray) -> tuple[np.ndarray, list[int]]:
        """Return the class indices (H, W) uint8 of raw labels, and the labels that are not in the table."""
        encoded = bytearray(raw.tobytes().translate(self._bytes))
        unknown = [] if self.invalid not in encoded else np.setdiff1d(raw, list(self.mapping)).tolist()
        return np.frombuffer(encoded, dtype=np.uint8).reshape(raw.shape), unknown


class PairedDataset(SegmentationDataset):
    """Pairs of files. A subclass finds them and defines how raw labels become class indices.

    Attributes:
        orphans, clashes, ignored: messages about masks without an image, files of the same name, and files not read.
    """

    table: LabelTable

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = Path(root).expanduser()
        self.split = split
        if not self.root.is_dir():
            raise self.missing_error(f"the folder {self.root} does not exist")
        self.orphans: list[str] = []
        self.clashes: list[str] = []
        self.ignored: list[str] = []
        self.pairs = self.find_pairs()
        if not self.pairs:
            more = f" ({self.ignored[0]})" if self.ignored else ""
            raise self.missing_error(f"no image of split {split!r} was found under {self.root}{more}")
        self.names = [pair.name for pair in self.pairs]
        self._labels_seen: set[int] | None = None
        self._checksum: str | None = None

    @abstractmethod
    def find_pairs(self) -> list[Pair]:
        """Return the pairs of this split in a fixed order, by `match_folders` or `match`."""

    def missing_error(self, reason: str) -> DatasetError:
        """Return the error for missing files of a data set, with the expected tree."""
        return DatasetError(
            f"{type(self).__name__}: {reason}. Fix: dataset.root or --root must be a folder like",
            *self.help_tree.splitlines(),
        )

    def match_folders(
        self, images: ImageFolder, masks: ImageFolder, mask_folder: Path, mask_suffix: str = ""
    ) -> list[Pair]:
        """Pair the files of two folders by name; mask names have `mask_suffix` at their end."""
        for folder in (images, masks):
            self.clashes += [
                f"{path} and {other.name} have the same name, so only {path.name} is used. Fix: rename or remove one"
                for path, other in folder.clashes
            ]
            if folder.ignored:
                self.ignored.append(f"files that are not read: {folder.ignored_text}, such as {folder.ignored[0]}")
        by_image = {name.removesuffix(mask_suffix): path for name, path in masks.images.items()}
        return self.match(images.images, by_image, mask_folder, mask_suffix)

    def match(
        self, images: Mapping[str, Path], masks: Mapping[str, Path], mask_folder: Path, mask_suffix: str = ""
    ) -> list[Pair]:
        """Pair files by name. An image without a mask is kept, so that reading it names the fault."""
        self.orphans += [
            f"{path} is a mask without an image. Fix: add the image, or remove the mask"
            for name, path in masks.items()
            if name not in images
        ]
        suffix = next(iter(masks.values())).suffix if masks else ".png"
        return [Pair(n, path, masks.get(n, mask_folder / f"{n}{mask_suffix}{suffix}")) for n, path in images.items()]

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        pair = self.pairs[index]
        mask = self.read_mask(pair.mask)
        height, width = mask.shape
        image = decode_image(pair.image, (width, height), pair.mask)
        if image.shape[:2] != mask.shape:
            sizes = [f"{w}x{h}" for h, w in (image.shape[:2], mask.shape)]
            raise DatasetError(
                f"{pair.image} is {sizes[0]} but its mask {pair.mask} is {sizes[1]}. Fix: bring both to one size"
            )
        # `permute` returns a view of the decoded array, so only a later crop is copied.
        return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(torch.from_numpy(mask))

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8 as class indices."""
        return self.encode(decode_mask(path), path)

    def encode(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Translate raw labels (H, W) uint8 to class indices; raise DatasetError that names labels not in the table."""
        encoded, unknown = self.table.encode(raw)
        if unknown:
            raise DatasetError(
                f"{path} holds labels {preview(unknown)}, which are not in the class table of {self.info.name}. "
                f"Fix: {self.remedy(unknown)}"
            )
        return encoded

    def label_meaning(self) -> list[object]:
        """Return the settings that decide the class of each raw label; they are part of the checksum."""
        table: LabelTable | None = getattr(self, "table", None)  # none if a subclass replaces `read_mask`
        return [*sorted(table.mapping.items())] if table else []

    def remedy(self, unknown: list[int]) -> str:
        """Return how to fix labels that are not in the table."""
        return f"use 0..{self.info.num_classes - 1}, and {self.info.ignore_index} for void"

    def check(self, index: int, decode: bool = True) -> list[str]:
        """Return the faults of one pair. Without `decode`, files are decoded only if their headers show a fault."""
        if not decode:
            pair = self.pairs[index]
            with contextlib.suppress(DatasetError), open_image(pair.image) as image, open_image(pair.mask) as mask:
                upright = orientation_of(image) == orientation_of(mask) == 1
                if upright and not is_deep(image.mode) and image.size == mask.size:
                    return []
        return super().check(index)

    def faults(self, progress: bool = True, sample: int | None = 32) -> list[str]:
        """Return the faults of single pairs, and of files that belong to no pair."""
        return self.orphans + self.clashes + super().faults(progress, sample)

    def faults_as_a_whole(self) -> list[str]:
        """Return a fault if all masks together hold only void, no scored class, or (training split) only one class."""
        if not self.labels_seen():  # no mask can be read
            return []
        seen = self.labels_seen() - {self.info.ignore_index}
        needed = min(2, self.info.num_classes) if self.split.startswith("train") else 1
        if len(seen) >= needed and seen & set(self.info.scored):
            return []
        shown = " and ".join(self.info.classes[k] for k in sorted(seen)) or "void"
        return [
            f"the {len(self)} masks of split {self.split} hold only {shown}, such as {self.pairs[0].mask}: there is "
            "nothing to learn or to score. Fix: check the masks and the table of classes"
        ]

    def notes(self) -> list[str]:
        """Return the classes that occur in no mask, and the files that were ignored."""
        seen = self.labels_seen()
        absent = [name for k, name in enumerate(self.info.classes) if k not in seen]
        text = f"classes that occur in no mask of split {self.split}: {', '.join(absent)}"
        return [text] * bool(seen and absent) + self.ignored

    def labels_seen(self) -> set[int]:
        """Return the class indices in the masks that can be read, void included. Stops when all classes were seen."""
        if self._labels_seen is None:
            self._labels_seen = set()
            classes = set(range(self.info.num_classes))
            first = spread(len(self), 16)  # one patient's images often follow each other
            order = dict.fromkeys([*first, *range(len(self))])
            for mask in read_valid((self.pairs[k].mask for k in order), self.read_mask):
                self._labels_seen |= set(np.flatnonzero(np.bincount(mask.ravel(), minlength=256)).tolist())
                if classes <= self._labels_seen:
                    break
        return self._labels_seen

    def fingerprint(self) -> str:
        """Return a hash of the names and file sizes of every pair."""
        parts: list[object] = [self.info.name]
        for pair in self.pairs:
            parts += [pair.name, file_size(pair.image), file_size(pair.mask)]
        return digest(parts)

    def checksum(self) -> str:
        """Return a hash of the contents of every mask and image, the class table, and the normalisation.

        Only both ends of a large PNG image are read, so 3 000 images of Cityscapes take seconds. A PNG file ends with a
        checksum of its pixels (Adler-32), so any changed pixel changes the hash.
        """
        if self._checksum is None:
            parts = [self.fingerprint(), self.info, *self.label_meaning()]
            for pair in self.pairs:
                end = END_BYTES if pair.image.suffix.lower() == ".png" else None
                parts += [file_checksum(pair.image, end), file_checksum(pair.mask)]
            self._checksum = digest(parts)
        return self._checksum


def file_checksum(path: Path, end: int | None = None) -> int:
    """Return the CRC-32 of a file, or of its first and last `end` bytes; -1 if it cannot be read."""
    try:
        if not path.is_file():  # opening a pipe could wait for ever
            return -1
        with path.open("rb") as file:
            if end is None or path.stat().st_size <= 2 * end:
                return zlib.crc32(file.read())
            start = zlib.crc32(file.read(end))
            file.seek(-end, 2)
            return zlib.crc32(file.read(end), start)
    except OSError:
        return -1


def read_valid(paths: Iterable[Path], read: Callable[[Path], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield the arrays read from the files; files with faults are skipped."""
    for path in paths:
        with contextlib.suppress(DatasetError):
            yield read(path)


def file_size(path: Path) -> int:
    """Return a file's size in bytes, or -1 if it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def preview(values: list[int]) -> str:
    """Return the first few values as text."""
    return ", ".join(map(str, values[:8])) + (", ..." if len(values) > 8 else "")
