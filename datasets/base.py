"""What every data set offers: a table of classes, named pairs of image and mask, and a check before use.

Shapes: C classes, H and W pixels. Images are RGB.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor
from torch.utils.data import Dataset

from .errors import DatasetError

if TYPE_CHECKING:
    from torchvision import tv_tensors

MAX_CLASSES = 254  # masks are uint8: 255 is void, 254 marks a label outside the table


class Sample(NamedTuple):
    """One image as a network takes it."""

    image: Tensor  # (3, H, W) float32, normalised
    target: Tensor  # (H, W) int64, class or ignore_index
    name: str


@dataclass(frozen=True)
class DatasetInfo:
    """The facts about a data set that other code needs, in one typed table."""

    name: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, int, int], ...]
    scored: tuple[int, ...]  # classes that enter the mean scores
    ignore_index: int = 255
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # RGB in [0, 1]; ImageNet unless stated
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)

    def __post_init__(self) -> None:
        if not 1 <= len(self.classes) <= MAX_CLASSES:
            raise ValueError(f"{self.name} has {len(self.classes)} classes: 1 to {MAX_CLASSES} are possible")
        if len(self.palette) != len(self.classes):
            raise ValueError(
                f"{self.name} has {len(self.classes)} classes but {len(self.palette)} colours: one a class"
            )
        if not set(self.scored) <= set(range(len(self.classes))):
            raise ValueError(
                f"{self.name}: scored classes {self.scored} go beyond 0..{len(self.classes) - 1}"
            )

    @property
    def num_classes(self) -> int:
        return len(self.classes)


class SegmentationDataset(Dataset):
    """Named pairs of image and mask, read raw; augmentation and normalisation are the loader's.

    A subclass sets `info`, `names` and `split` and implements `read`.
    """

    info: DatasetInfo
    names: list[str]
    split: str
    help_tree: str = ""  # the expected files, where they come from, and their terms

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Return the raw image (3, H, W) uint8 and the mask (H, W) uint8 of class indices.

        Raises DatasetError, naming the path and the remedy, where the pair cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement read()")

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        return self.read(index)

    def check(self, index: int, decode: bool = True) -> list[str]:
        """Return the faults of one pair, one line each; a function per item, so that a pool can run it."""
        if decode:
            try:
                self.read(index)
            except DatasetError as error:
                return [str(error)]
        return []

    def verify(self, progress: bool = True, sample: int | None = 32) -> None:
        """Check the data set before it is used.

        Every pair is looked at cheaply (names, file headers, sizes); `sample` of them, evenly spread, are
        decoded in full, labels included. `sample=None` decodes all: minutes on a large set, once, by
        `scripts/prepare_data.py check`. Whatever slips through is still named when it is read.

        Raises DatasetError listing the faults.
        """
        raise_faults(self, self.faults(progress, sample))

    def faults(self, progress: bool = True, sample: int | None = 32) -> list[str]:
        """Return what `verify` would complain about, one line per fault."""
        from tqdm import tqdm

        chosen = set(spread(len(self), sample))
        bar = tqdm(
            range(len(self)),
            desc=f"verify {self.info.name} {self.split}",
            disable=None if progress else True,
            leave=False,
        )
        return [fault for index in bar for fault in self.check(index, decode=index in chosen)]

    def fingerprint(self) -> str:
        """Return a short hash of what the data set consists of, cheap enough to note with every run."""
        return digest([self.info.name, *self.names])


def spread(total: int, sample: int | None) -> list[int]:
    """Return `sample` indices spread evenly over range(total), or all of them."""
    if sample is None or sample >= total:
        return list(range(total))
    return sorted({(2 * k + 1) * total // (2 * sample) for k in range(sample)})


def raise_faults(dataset: SegmentationDataset, faults: list[str], shown: int = 10) -> None:
    """Raise DatasetError with the first few of the faults, if there are any."""
    if not faults:
        return
    rest = f"\n  ... and {len(faults) - shown} more" if len(faults) > shown else ""
    lines = "".join(f"\n  {fault}" for fault in faults[:shown])
    count = f"{len(faults)} fault" + "s" * (len(faults) > 1)
    raise DatasetError(f"{dataset.info.name} {dataset.split} has {count}:{lines}{rest}")


def digest(parts: Iterable[object], length: int = 16) -> str:
    """Return a short hexadecimal hash of the parts' text, each ended so that boundaries count."""
    state = hashlib.sha256()
    for part in parts:
        state.update(f"{part}\n".encode())
    return state.hexdigest()[:length]
