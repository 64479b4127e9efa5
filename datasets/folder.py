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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .base import DatasetError, DatasetInfo, spread
from .decode import decode_image, decode_mask
from .files import (
    IMAGE_SUFFIXES,
    Pair,
    PairedDataset,
    common_suffix,
    label_table,
    list_images,
    preview,
    read_split,
)
from .voc2012 import voc_colour

KEYS = ("classes", "scored", "ignore_index", "mean", "std", "rgb_masks", "nearest", "mask_suffix")
APART = 64  # levels between two values, so that the nearer one is the one that was meant
CLASS_KEYS = ("name", "value", "color")
Table = Mapping[str, Any]


class Folder(PairedDataset):
    """Your own pairs.

    `classes` is the path of the YAML, by default ROOT/classes.yaml, or its content. `num_classes` and
    `ignore_index` are what the rest of the configuration counts on: DatasetError where the table has others.
    """

    help_tree = """\
  mine/images/*.jpg, mine/masks/*.png                 pairs share a name; grey masks of class indices
  mine/{train,val}.txt                                a name a line; or {images,masks}/{train,val}/
  mine/classes.yaml                                   classes: [background, lesion]"""

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
            table, source = load_table(path), str(path)
        else:
            table, source = as_table(classes), "classes"
        entries = [as_entry(item, source) for item in table["classes"]]
        self.info = make_info(home.resolve().name, table, entries, source)
        values = value_map(entries, self.info.ignore_index, source)
        nearest = bool(table.get("nearest", False))
        self.table = label_table(to_nearest(entries, source) if nearest else values)
        for key, expected in (("num_classes", num_classes), ("ignore_index", ignore_index)):
            actual = getattr(self.info, key)
            if expected not in (None, actual):
                raise DatasetError(f"{source} has {key} {actual}, not {expected}: set dataset.{key}={actual}")
        self.rgb_masks = bool(table.get("rgb_masks", False))
        if self.rgb_masks and nearest:
            raise DatasetError(f"{source}: nearest is for grey masks; leave out nearest or rgb_masks")
        self.mask_suffix = str(table.get("mask_suffix") or "")
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
        names = [bare if (bare := stem(line)) in known else line for line in read_split(path)]
        lacking = f"{self.mask_suffix}.png"
        return [known.get(n, Pair(n, images / f"{n}.jpg", masks / f"{n}{lacking}")) for n in names]

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
        known = [raw for raw in range(256) if self.table[raw] < self.info.num_classes]
        blurred = "; or, as a JPEG or resizing blurs labels, add `nearest: true`" if len(known) == 2 else ""
        return f"the table has {preview(known)}; mend the mask (a JPEG cannot hold labels) or classes.yaml{blurred}"

    def faults(self, progress: bool = True, sample: int | None = 32) -> list[str]:
        """Return what `verify` would complain about; masks of 0 and 255 only are noticed as a whole."""
        found = super().faults(progress, sample)
        void = self.info.ignore_index
        if found or self.info.num_classes < 2:
            return found
        seen = set[int]()
        for index in spread(len(self), min(sample or 32, 32)):
            seen |= set(np.unique(self.read_mask(self.pairs[index].mask)).tolist())
        if seen == {0, void}:
            first = self.pairs[0].mask
            return [f"{first} and the others hold 0 and {void} (void) only: add `value: {void}` to its class"]
        return []


def stem(line: str) -> str:
    """Return a line of a split file without the suffix of an image."""
    path = Path(line)
    return (path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path).as_posix()


def load_table(path: Path) -> Table:
    """Return the content of classes.yaml.

    Raises DatasetError where it cannot be parsed.
    """
    import yaml

    try:
        return as_table(yaml.safe_load(path.read_text()), str(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def as_table(content: Any, source: str = "classes") -> Table:
    """Return the table of classes, also where only a list of names or index: name was given."""
    if isinstance(content, Mapping) and "classes" not in content and all(isinstance(k, int) for k in content):
        content = [content[k] for k in sorted(content)]
    table = content if isinstance(content, Mapping) else {"classes": content}
    unknown = [str(key) for key in table if key not in KEYS]
    if unknown:
        raise DatasetError(f"{source}: unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    names = table.get("classes")
    if isinstance(names, Mapping):
        return {**table, "classes": [names[k] for k in sorted(names)]}
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise DatasetError(f"{source}: `classes` must be a list of names, such as [background, lesion]")
    return table


def as_entry(item: Any, source: str) -> dict[str, Any]:
    """Return a class as a mapping with a name."""
    if not isinstance(item, Mapping):
        return {"name": str(item)}
    unknown = [str(key) for key in item if key not in CLASS_KEYS]
    if unknown or "name" not in item:
        raise DatasetError(
            f"{source}: a class has a name and, if needed, a value and a color; got {dict(item)}"
        )
    return dict(item)


def make_info(name: str, table: Table, entries: list[dict[str, Any]], source: str) -> DatasetInfo:
    """Return the facts of the data set.

    Raises DatasetError for a table that contradicts itself.
    """
    first_is_background = entries[0]["name"].lower() == "background" and len(entries) > 1
    scored = table.get("scored", range(int(first_is_background), len(entries)))
    try:
        return DatasetInfo(
            name=name,
            classes=tuple(str(entry["name"]) for entry in entries),
            palette=tuple(colour(entry.get("color", voc_colour(k))) for k, entry in enumerate(entries)),
            scored=tuple(int(k) for k in scored),
            ignore_index=int(table.get("ignore_index", 255)),
            mean=triple(table.get("mean", DatasetInfo.mean)),
            std=triple(table.get("std", DatasetInfo.std)),
        )
    except (TypeError, ValueError) as error:
        raise DatasetError(f"{source}: {error}") from None


def triple(values: Sequence[float]) -> tuple[float, float, float]:
    """Return a number for each of R, G and B."""
    red, green, blue = (float(value) for value in values)
    return red, green, blue


def colour(value: Sequence[int]) -> tuple[int, int, int]:
    """Return an RGB colour."""
    red, green, blue = (int(channel) for channel in value)
    return red, green, blue


def value_map(entries: list[dict[str, Any]], ignore_index: int, source: str) -> dict[int, int]:
    """Return raw value -> class; the void label is itself unless a class claims it.

    Raises DatasetError where a value is claimed twice or is not one of 0..255.
    """
    mapping: dict[int, int] = {}
    for index, entry in enumerate(entries):
        value = entry.get("value", index)
        for raw in [value] if isinstance(value, int) else value:
            if not (isinstance(raw, int) and 0 <= raw <= 255) or raw in mapping:
                raise DatasetError(
                    f"{source}: value {raw} of class {entry['name']!r} must be new and in 0..255"
                )
            mapping[raw] = index
    if not len(entries) <= ignore_index <= 255:
        raise DatasetError(f"{source}: ignore_index={ignore_index} must lie in {len(entries)}..255")
    return {ignore_index: ignore_index, **mapping}


def to_nearest(entries: list[dict[str, Any]], source: str) -> dict[int, int]:
    """Return raw value -> class where each of 0..255 stands for the nearer of two values; nothing is void.

    Raises DatasetError for other than two values: between 0 and 255, a blurred edge would pass through the third.
    """
    values = value_map(entries, 255, source)
    known = sorted(raw for raw in values if raw != 255 or values[raw] != 255)
    if len(known) != 2 or known[1] - known[0] < APART:
        raise DatasetError(
            f"{source}: nearest tells two values apart, such as 0 and 255, but the classes have {preview(known)}: "
            "name their values, or leave out nearest"
        )
    return {raw: values[min(known, key=lambda k: abs(k - raw))] for raw in range(256)}
