"""Bring your own: a folder of images, a folder of masks, and a table of classes.

mine/images/a.jpg          mine/masks/a.png           grey PNG, a pixel is the index of its class
mine/train.txt             mine/val.txt               a name a line; or images/train/, masks/train/, ...
mine/classes.yaml:
    classes:
      - background                                    names in the order of their indices, or with details:
      - {name: lesion, value: 255, color: [255, 0, 0]}    `value`: what masks hold (a number or several)
    scored: [1]                                       default: all but a first class called background
    ignore_index: 255                                 void; read as void unless it is some class's value
    mean: [0.485, 0.456, 0.406]                       default: ImageNet's
    std: [0.229, 0.224, 0.225]
    rgb_masks: false                                  true: masks are RGB pictures in the classes' colours
    nearest: false                                    true: a pixel takes the nearer of two values
    mask_suffix: ""                                   _mask: the mask of a.jpg is a_mask.png

Both folders may have sub-folders, the same in each; split files then hold patient1/a.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import layouts
from .base import DatasetError
from .class_table import Table, ending, make_info, read_classes, to_nearest, value_map, yes_or_no
from .decode import decode_image, decode_mask
from .files import Pair, PairedDataset, label_table, preview, readable
from .listing import common_suffix, list_images, read_split


class Folder(PairedDataset):
    """Your own pairs.

    `classes` is the path of the YAML, by default ROOT/classes.yaml, or its content. `num_classes` and
    `ignore_index` are what the rest of the configuration counts on: DatasetError where the table has others.
    """

    help_tree = layouts.FOLDER

    def __init__(
        self,
        root: str | Path,
        split: str,
        classes: str | Path | Table | Sequence[Any] | None = None,
        num_classes: int | None = None,
        ignore_index: int | None = None,
    ) -> None:
        home = Path(root).expanduser()
        if classes is None or isinstance(classes, (str, Path)):
            path = Path(classes).expanduser() if classes else home / "classes.yaml"
            if not home.is_dir() or not path.is_file():
                where = path if home.is_dir() else home
                raise self.missing(f"{where} does not exist")
            classes = path
        table, entries, source = read_classes(classes)
        self.info = make_info(home.resolve().name, table, entries, source)
        values = value_map(entries, self.info.ignore_index, source)
        nearest = yes_or_no(table, "nearest", source)
        self.table = label_table(to_nearest(entries, source) if nearest else values)
        for key, expected in (("num_classes", num_classes), ("ignore_index", ignore_index)):
            actual = getattr(self.info, key)
            if expected not in (None, actual):
                raise DatasetError(f"{source} has {key} {actual}, not {expected}: set dataset.{key}={actual}")
        self.rgb_masks = yes_or_no(table, "rgb_masks", source)
        if self.rgb_masks and len(set(self.info.palette)) < self.info.num_classes:
            raise DatasetError(f"{source}: two classes have one colour, by which rgb_masks tells them apart")
        if self.rgb_masks and nearest:
            raise DatasetError(f"{source}: nearest is for grey masks; leave out nearest or rgb_masks")
        self.mask_suffix = ending(table, source)
        super().__init__(home, split)

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of the split, by folders or by its file."""
        images, masks = self.root / "images", self.root / "masks"
        if (images / self.split).is_dir():
            images, masks = images / self.split, masks / self.split
        if not (images.is_dir() and masks.is_dir()):
            raise self.missing(f"{self.root} has no folders {images} and {masks}")
        found, drawn = list_images(images, below=True), list_images(masks, below=True)
        drawn = {name.removesuffix(self.mask_suffix): path for name, path in drawn.items()}
        if suffix := common_suffix(found, drawn):
            raise DatasetError(
                f"{masks}: a mask's name is its image's with {suffix} at the end: "
                f"add `mask_suffix: {suffix}` to classes.yaml"
            )
        pairs = self.match(found, drawn, masks, self.mask_suffix)
        if images.name == self.split:
            return pairs
        path = self.root / f"{self.split}.txt"
        if not path.is_file():
            raise self.missing(
                f"split {self.split!r} has neither {path} nor {images / self.split}: "
                f"`python scripts/prepare_data.py split {shlex.quote(str(self.root))}` writes split files"
            )
        known = {pair.name: pair for pair in pairs}

        def name(line: str) -> str:  # as it is, if there is such an image: the end of case.1 is no suffix
            bare = line.removesuffix(Path(line).suffix)
            return bare if line not in known and bare in known else line

        names, mask = map(name, read_split(path)), f"{self.mask_suffix}.png"
        return [known.get(n, Pair(n, images / f"{n}.jpg", masks / f"{n}{mask}")) for n in names]

    def read_mask(self, path: Path) -> np.ndarray:
        """Return the mask (H, W) uint8 as class indices.

        Raises DatasetError naming labels or colours that are not in the table.
        """
        if not self.rgb_masks:
            return self.encode(decode_mask(path), path)
        colours = decode_image(path).astype(np.uint32)
        codes = colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]
        mask = np.full(codes.shape, self.info.ignore_index, dtype=np.uint8)
        left = np.ones(codes.shape, dtype=bool)
        for index, (red, green, blue) in enumerate(self.info.palette):
            here = codes == (red << 16 | green << 8 | blue)
            mask[here] = index
            left &= ~here
        if left.any():
            unknown = [f"#{code:06x}" for code in np.unique(codes[left])[:4]]
            raise DatasetError(
                f"{path} has colours of no class ({', '.join(unknown)}): complete classes.yaml"
            )
        return mask

    def remedy(self, unknown: list[int]) -> str:
        """Return what to do about labels outside the table."""
        if self.info.num_classes == 19 and max(unknown) <= 33:
            return "these look like Cityscapes label ids where train ids are needed: use dataset=cityscapes"
        if unknown == [255]:
            return "in classes.yaml, add `value: 255` to the class that it stands for, or `ignore_index: 255` for void"
        known = [raw for raw in range(256) if self.table[raw] < self.info.num_classes]
        blurred = "; or, as a JPEG or resizing blurs labels, add `nearest: true`" if len(known) == 2 else ""
        return f"the table has {preview(known)}; mend the mask (a JPEG cannot hold labels) or classes.yaml{blurred}"

    def faults_as_a_whole(self) -> list[str]:
        """Return that masks hold 0 and void only, where they do: void then stands for a class."""
        void, seen = self.info.ignore_index, set[int]()
        for mask in readable([pair.mask for pair in self.pairs], self.read_mask):
            seen |= set(np.unique(mask).tolist())
            if not seen <= {0, void}:
                return []
        if seen != {0, void} or self.info.num_classes < 2:
            return []
        first = self.pairs[0].mask
        return [
            f"{first} and the others hold 0 and {void} (void) only: add `value: {void}` to its class in classes.yaml"
        ]
