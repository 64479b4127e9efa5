"""Kvasir-SEG: 1000 colonoscopy images with polyps, two classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from .base import DatasetError, DatasetInfo
from .decode import list_images, load_opaque, make_split, read_split
from .paired import Pair, PairedDataset

INFO = DatasetInfo(
    name="kvasir_seg",
    classes=("background", "polyp"),
    palette=((0, 0, 0), (255, 255, 255)),
    scored=(1,),
    mean=(0.48897059, 0.46548275, 0.42940000),
    std=(0.22861765, 0.22948039, 0.24054667),
)
# 880 / 120 of the 1000 images, the sizes usually published with the data set. The authors' own split is not published.
VAL_FRACTION = 0.12
THRESHOLD = 127  # a pixel above it is polyp
MAX_GREY_SHARE = 1 / 3  # largest share of grey among the pixels that are not dark; released masks have less than 1 %


class KvasirSEG(PairedDataset):
    """Kvasir-SEG as released, with split files, or in the layout of the paper's authors.

    `dithered_masks` converts the JPEG masks to one bit with Floyd-Steinberg dithering, as the paper's experiments
    did. Otherwise a pixel above 127 is polyp. Masks stored as 0 and 1 are read as such.
    """

    info = INFO
    help_tree = """\
  Kvasir-SEG/images/*.jpg, Kvasir-SEG/masks/*.jpg               as released; without split files, 880 / 120 by name
  Kvasir-SEG/{train,val,test}.txt                               split files (optional), one name per line
  or Kvasir-SEG/{images,masks}_split/{train,val}/jpg_{images,masks}/*.jpg
  from https://datasets.simula.no/kvasir-seg/ ; for research and education, citing Jha et al., MMM 2020."""

    def __init__(self, root: str | Path, split: str, dithered_masks: bool = False) -> None:
        self.dithered_masks = dithered_masks
        super().__init__(root, split)

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of the layout that is there."""
        if (self.root / "images_split").is_dir():
            images = self.root / "images_split" / self.split / "jpg_images"
            masks = self.root / "masks_split" / self.split / "jpg_masks"
            if not (images.is_dir() and masks.is_dir()):
                raise self.missing_error(f"split {self.split!r} has no folders {images} and {masks}")
            return self.match_folders(list_images(images), list_images(masks), masks)
        images, masks = self.root / "images", self.root / "masks"
        if not (images.is_dir() and masks.is_dir()):
            raise self.missing_error(f"{self.root} has neither images/ with masks/ nor images_split/")
        released = list_images(images)
        pairs = {pair.name: pair for pair in self.match_folders(released, list_images(masks), masks)}
        return [
            pairs.get(stem, Pair(stem, images / f"{stem}.jpg", masks / f"{stem}.jpg"))
            for stem in self.names_of_split(list(released.images))
        ]

    def names_of_split(self, released: list[str]) -> list[str]:
        """Return the names of this split: from its file, or from the pinned split if there are no files."""
        path = self.root / f"{self.split}.txt"
        if path.is_file():
            return [line.removesuffix(".jpg") for line in read_split(path)]
        files = sorted(p.stem for p in self.root.glob("*.txt") if p.stem in ("train", "val", "test"))
        if files:
            raise self.missing_error(f"split {self.split!r} has no file {path} (present: {', '.join(files)})")
        if not released:
            return []  # the base class raises an error that shows the layout
        split = make_split(released, {"val": VAL_FRACTION})
        if self.split not in split:
            raise self.missing_error(f"split {self.split!r} is not one of train, val, and {path} does not exist")
        return split[self.split]

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8, 1 for polyp. Reject masks that are neither black and white nor 0 and 1."""
        image, kind = load_opaque(path)
        grey = np.asarray(image.convert("L"))
        bright = int((grey > THRESHOLD).sum())
        if not bright:
            return self._zero_one(image, grey, kind, path)
        middle, light = int(((grey >= 64) & (grey < 192)).sum()), int((grey >= 64).sum())
        if middle > MAX_GREY_SHARE * light:
            raise DatasetError(
                f"{path} has many grey pixels, but black and white are expected. "
                "Fix: save it as a grey image of 0 and 255"
            )
        if self.dithered_masks:
            return np.array(image.convert("1"), dtype=np.uint8)
        return (grey > THRESHOLD).view(np.uint8)

    def label_meaning(self) -> list[object]:
        """Return whether grey pixels are dithered: no table of labels is used here."""
        return [self.dithered_masks]

    def _zero_one(self, image: Image.Image, grey: np.ndarray, kind: str | None, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8 of a file without a bright pixel: all 0, or 0 and 1. Reject dark grey."""
        indices = np.asarray(image) if image.mode == "P" else grey
        if int(indices.max()) > 1 or (kind == "JPEG" and indices.any()):
            raise DatasetError(
                f"{path} has no pixel above {THRESHOLD}; its largest value is {indices.max()}. Black and white, or 0 "
                "and 1, are expected. Fix: save it as a grey image of 0 and 255"
            )
        return indices.astype(np.uint8)
