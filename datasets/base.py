"""The interface of data sets: a table of classes, named pairs of image and mask, and a check before use.

Shapes: C classes, H and W pixels. Images are RGB.
"""

from __future__ import annotations

import hashlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from configs.errors import UserError, one_line

if TYPE_CHECKING:
    from torchvision import tv_tensors

MAX_CLASSES = 254  # masks are uint8: one value is void, and one marks labels that are not in the table


class DatasetError(UserError):
    """A fault in a data set. The message names the path and the fix."""


@dataclass(frozen=True)
class DatasetInfo:
    """Name, classes, colours and normalisation of a data set."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    scored: tuple[int, ...]  # classes that enter the mean scores
    ignore_index: int = 255
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in [0, 1]; ImageNet unless stated
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"{self.name} has {len(self.classes)} classes: expected 1 to {MAX_CLASSES}")
        if bad := [name for name in self.classes if not (name.isprintable() and len(name) <= 200)]:
            raise ValueError(
                f"{self.name}: the class name {bad[0][:200]!r} is invalid: expected at most 200 printable characters"
            )
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"{self.name} has {len(self.classes)} classes but {len(self.palette)} colours: expected one per class"
            )
        if not set(self.scored) <= set(range(len(self.classes))):
            raise ValueError(f"{self.name}: scored={self.scored} is invalid: expected 0..{len(self.classes) - 1}")
        if not len(self.classes) <= self.ignore_index <= 255:
            raise ValueError(
                f"{self.name}: ignore_index={self.ignore_index} is invalid: expected {len(self.classes)}..255"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class SegmentationDataset(ABC):
    """Named pairs of raw image and mask. The loaders augment and normalise them.

    A subclass sets `info`, `names` and `split` and implements `read`.
    """

    info: DatasetInfo
    names: list[str]
    split: str
    help_tree: str = ""  # the expected files, where they come from, and their terms

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return the raw image (3, H, W) uint8 and the mask (H, W) uint8 of class indices.

        Raises DatasetError, which names the path and the fix, if the pair cannot be used.
        """

    def check(self, index: int, decode: bool = True) -> list[str]:
        """Return the faults of one pair, one line each; without `decode`, only those that show without decoding."""
        try:
            if decode:
                self.read(index)
        except DatasetError as error:
            return [str(error)]
        return []

    def verify(self, progress: bool = True, sample: int | None = 32, on_error: str = "raise") -> None:
        """Check every pair without decoding, and decode `sample` pairs, evenly spread; None decodes all.

        A fault that is missed here is raised when its file is read. Raises DatasetError that lists up to ten faults.
        With on_error="skip", faults of single pairs are only printed to stderr. Notes are printed if nothing is raised.
        """
        faults = self.faults(progress, sample)
        if on_error == "skip":
            for fault in faults:
                print(one_line(fault), file=sys.stderr)
            faults = []
        faults += self.faults_as_a_whole()
        if faults:
            count = f"{len(faults)} fault" + "s" * (len(faults) > 1)
            rest = [f"  ... and {len(faults) - 10} more"] if len(faults) > 10 else []
            lines = [f"  {fault}" for fault in faults[:10]]
            raise DatasetError(f"{self.info.name} {self.split} has {count}:", *lines, *rest)
        for note in self.notes():
            print(one_line(f"note: {note}"), file=sys.stderr)

    def faults(self, progress: bool = True, sample: int | None = 32) -> list[str]:
        """Return the faults of single pairs, one line each."""
        from tqdm import tqdm

        chosen, hidden = set(spread(len(self), sample)), None if progress else True
        bar = tqdm(range(len(self)), desc=f"verify {self.info.name} {self.split}", disable=hidden, leave=False)
        return [fault for index in bar for fault in self.check(index, decode=index in chosen)]

    def faults_as_a_whole(self) -> list[str]:
        """Return the faults of the split that no single pair shows."""
        return []

    def notes(self) -> list[str]:
        """Return remarks for the user that are not faults."""
        return []

    def fingerprint(self) -> str:
        """Return a short hash of the names of the data set and its images, to recognise the data set."""
        return digest([self.info.name, *self.names])

    def checksum(self) -> str:
        """Return a short hash that must change with any label, even if names and sizes stay the same.

        This default reads no contents. It suits data that are computed from settings in the fingerprint.
        """
        return digest([self.fingerprint(), self.info])


def spread(total: int, sample: int | None) -> list[int]:
    """Return `sample` indices spread evenly over range(total); all of them if `sample` is None or not smaller."""
    if sample is None or sample >= total:
        return list(range(total))
    return sorted({(2 * k + 1) * total // (2 * sample) for k in range(sample)})


def digest(parts: Iterable[object]) -> str:
    """Return a short hexadecimal hash of the text of the parts, one per line."""
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{part}\n".encode("utf-8", "surrogateescape"))
    return state.hexdigest()[:16]
