"""Data sets that are pairs of files: pairing, reading, checking.

Masks are translated by a table of 256 bytes; `INVALID` in it marks labels that must not occur.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision import tv_tensors

from .base import DatasetError, SegmentationDataset, digest
from .decode import EXIF_ORIENTATION, decode_image, decode_mask, is_deep, open_image

INVALID = 254


class Pair(NamedTuple):
    """An image and its mask on disk."""

    name: str
    image: Path
    mask: Path


def label_table(mapping: Mapping[int, int]) -> bytes:
    """Return the 256-byte table that sends raw label `k` to `mapping[k]`, and any other to INVALID."""
    return bytes(mapping.get(raw, INVALID) for raw in range(256))


def index_table(num_classes: int, ignore_index: int = 255) -> bytes:
    """Return the table of masks that already hold class indices."""
    return label_table({**{k: k for k in range(num_classes)}, ignore_index: ignore_index})


class PairedDataset(SegmentationDataset):
    """Pairs of files; a subclass finds them and says how raw labels become class indices."""

    table: bytes  # raw label -> class

    def __init__(self, root: str | Path, split: str) -> None:
        self.root = Path(root).expanduser()
        self.split = split
        if not self.root.is_dir():
            raise self.missing(f"the folder {self.root} does not exist")
        self.orphans: list[str] = []
        self.pairs = self.find_pairs()
        if not self.pairs:
            raise self.missing(f"no image of split {split!r} was found under {self.root}")
        self.names = [pair.name for pair in self.pairs]

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of this split in a fixed order; note files without a partner in `orphans`."""
        raise NotImplementedError(f"{type(self).__name__} must implement find_pairs()")

    def missing(self, reason: str) -> DatasetError:
        """Return the error for a data set that is not there, with the tree that is expected."""
        return DatasetError(
            f"{type(self).__name__}: {reason}; dataset.root or --root is a folder like\n{self.help_tree}"
        )

    def match(
        self, images: Mapping[str, Path], masks: Mapping[str, Path], masks_at: Path, ending: str = ""
    ) -> list[Pair]:
        """Pair files by name; an image without a mask stays, so that reading it names the fault.

        `ending` is what the names of masks have besides, and `masks` lacks.
        """
        self.orphans += [
            f"{path} is a mask without an image: add the image, or remove the mask"
            for name, path in masks.items()
            if name not in images
        ]
        suffix = next(iter(masks.values())).suffix if masks else ".png"
        return [Pair(n, path, masks.get(n, masks_at / f"{n}{ending}{suffix}")) for n, path in images.items()]

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return the raw image (3, H, W) uint8 and the mask (H, W) uint8 of class indices.

        Raises DatasetError, naming the path and the remedy, where the pair cannot be used.
        """
        pair = self.pairs[index]
        mask = self.read_mask(pair.mask)
        height, width = mask.shape
        image = decode_image(pair.image, mask_size=(width, height))
        if image.shape[:2] != mask.shape:
            raise DatasetError(unlike_sizes(pair, image.shape[1::-1], (width, height)))
        # A view of the decoder's memory, channels last: a crop of it is copied later, never the whole frame.
        return tv_tensors.Image(torch.from_numpy(image).permute(2, 0, 1)), tv_tensors.Mask(
            torch.from_numpy(mask)
        )

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8 as class indices.

        Raises DatasetError naming the labels that are not in the table.
        """
        return self.encode(decode_mask(path), path)

    def encode(self, raw: np.ndarray, path: Path) -> np.ndarray:
        """Translate raw labels (H, W) uint8 to class indices."""
        encoded = bytearray(raw.tobytes().translate(self.table))
        if INVALID in encoded:
            unknown = [int(k) for k in np.unique(raw) if self.table[k] == INVALID]
            raise DatasetError(
                f"{path} holds labels {preview(unknown)} outside the table: {self.remedy(unknown)}"
            )
        return np.frombuffer(encoded, dtype=np.uint8).reshape(raw.shape)

    def remedy(self, unknown: list[int]) -> str:
        """Return what to do about labels outside the table."""
        last, void = self.info.num_classes - 1, self.info.ignore_index
        return f"expected 0..{last} and {void} for void; mend the mask or the table of classes"

    def check(self, index: int, decode: bool = True) -> list[str]:
        """Return the faults of one pair: by its headers, or by decoding it in full."""
        if decode:
            return super().check(index)
        pair = self.pairs[index]
        try:
            with open_image(pair.image) as image, open_image(pair.mask) as mask:
                size, mask_size, mode = image.size, mask.size, image.mode
                # Only JPEG: asking a PNG for EXIF may decode it.
                orientation = image.getexif().get(EXIF_ORIENTATION, 1) if image.format == "JPEG" else 1
        except DatasetError as error:
            return [str(error)]
        if orientation not in (0, 1) or is_deep(mode):
            return super().check(index)
        return [] if size == mask_size else [unlike_sizes(pair, size, mask_size)]

    def faults(self, progress: bool = True, sample: int | None = 32) -> list[str]:
        """Return what `verify` would complain about, files without a partner included."""
        return self.orphans + super().faults(progress, sample) + self.faults_as_a_whole()

    def faults_as_a_whole(self) -> list[str]:
        """Return what shows in no single pair; masks that cannot be read are passed over."""
        return []

    def fingerprint(self) -> str:
        """Return a hash of the names and file sizes of every pair."""
        parts: list[object] = [self.info.name]
        for pair in self.pairs:
            parts += [pair.name, file_size(pair.image), file_size(pair.mask)]
        return digest(parts)


def readable(paths: Iterable[Path], read: Callable[[Path], np.ndarray]) -> Iterator[np.ndarray]:
    """Yield what is read from the files, but for those with faults of their own."""
    for path in paths:
        with contextlib.suppress(DatasetError):
            yield read(path)


def unlike_sizes(pair: Pair, image_size: Iterable[int], mask_size: Iterable[int]) -> str:
    """Return the message for an image and a mask of different (width, height)."""
    sizes = ["x".join(map(str, size)) for size in (image_size, mask_size)]
    return f"{pair.image} is {sizes[0]} but its mask {pair.mask} is {sizes[1]}: bring both to one size"


def file_size(path: Path) -> int:
    """Return a file's size in bytes, -1 where it is missing."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def preview(values: list[int], shown: int = 8) -> str:
    """Return a few of the values as text."""
    rest = ", ..." if len(values) > shown else ""
    return ", ".join(map(str, values[:shown])) + rest
