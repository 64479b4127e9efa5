"""Kvasir-SEG: 1000 colonoscopy images with polyps, two classes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from . import layouts
from .base import DatasetInfo
from .decode import load, open_image
from .files import Pair, PairedDataset
from .listing import list_images, read_split

INFO = DatasetInfo(
    name="kvasir_seg",
    classes=("background", "polyp"),
    palette=((0, 0, 0), (255, 255, 255)),
    scored=(1,),
    mean=(0.48897059, 0.46548275, 0.42940000),
    std=(0.22861765, 0.22948039, 0.24054667),
)
VAL_FRACTION = 0.12  # 880 / 120 of the 1000 images, the sizes usually published with the data set
SPLIT_SEED = 0


def default_split(stems: list[str], seed: int = SPLIT_SEED) -> dict[str, list[str]]:
    """Return the pinned split {"train", "val"} of the released images.

    An image's place depends on its name alone, through a hash: the same on every machine and in every version
    of Python and of random number generators. The authors' own split is not published.
    """
    ranked = sorted(stems, key=lambda stem: hashlib.sha256(f"{seed}/{stem}".encode()).hexdigest())
    held_out = round(len(stems) * VAL_FRACTION)
    return {"train": sorted(ranked[held_out:]), "val": sorted(ranked[:held_out])}


class KvasirSEG(PairedDataset):
    """Kvasir-SEG as released, with split files, or in the layout of the paper's authors.

    `dithered_masks` converts the JPEG masks to one bit with Floyd-Steinberg dithering, as the paper's
    experiments did; otherwise a pixel is polyp above 127.
    """

    info = INFO
    help_tree = layouts.KVASIR_SEG

    def __init__(self, root: str | Path, split: str, dithered_masks: bool = False) -> None:
        self.dithered_masks = dithered_masks
        super().__init__(root, split)

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of whichever layout is there."""
        if (self.root / "images_split").is_dir():
            return self.split_tree()
        folders = self.root / "images", self.root / "masks"
        if not all(folder.is_dir() for folder in folders):
            raise self.missing(f"{self.root} holds neither images/ with masks/ nor images_split/")
        images, masks = map(list_images, folders)
        pairs = {pair.name: pair for pair in self.match(images, masks, folders[1])}
        chosen = self.stems(list(images))
        return [
            pairs.get(stem, Pair(stem, folders[0] / f"{stem}.jpg", folders[1] / f"{stem}.jpg"))
            for stem in chosen
        ]

    def split_tree(self) -> list[Pair]:
        """Return the pairs of the authors' layout, a folder per split."""
        images = self.root / "images_split" / self.split / "jpg_images"
        masks = self.root / "masks_split" / self.split / "jpg_masks"
        if not (images.is_dir() and masks.is_dir()):
            raise self.missing(f"split {self.split!r} has no folders {images} and {masks}")
        return self.match(list_images(images), list_images(masks), masks)

    def stems(self, released: list[str]) -> list[str]:
        """Return the names of this split: from its file, or by the pinned split where there are no files."""
        path = self.root / f"{self.split}.txt"
        if path.is_file():
            return [line.removesuffix(".jpg") for line in read_split(path)]
        files = sorted(p.stem for p in self.root.glob("*.txt") if p.stem in ("train", "val", "test"))
        if files:
            raise self.missing(f"split {self.split!r} has no file {path} (present: {', '.join(files)})")
        split = default_split(released)
        if self.split not in split:
            raise self.missing(f"split {self.split!r} is not one of train, val, and {path} does not exist")
        return split[self.split]

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8: 1 for polyp."""
        image = load(open_image(path), path)
        if self.dithered_masks:
            return np.array(image.convert("1"), dtype=np.uint8)
        return (np.asarray(image.convert("L")) > 127).view(np.uint8)
