"""Your own data: a folder of images, a folder of masks, and a table of classes.

mine/images/a.jpg          mine/masks/a.png           grey PNG; a pixel is the index of its class
mine/train.txt             mine/val.txt               one name per line; or images/train/, masks/train/, ...
mine/classes.yaml:
    classes:
      - background                                    names in the order of their indices, or with details:
      - {name: lesion, value: 255, color: [255, 0, 0]}    `value`: the number, or numbers, in the masks
    scored: [1]                                       default: all but a first class called background
    void: [0, 255]                                    the numbers of void in the mask files; default: ignore_index
    ignore_index: 255                                 the number that void has after reading
    mean: [0.485, 0.456, 0.406]                       default: ImageNet's
    std: [0.229, 0.224, 0.225]
    rgb_masks: false                                  true: masks are RGB images in the colours of the classes
    void_color: [224, 224, 192]                       the colour, or colours, of void in RGB masks; default: none
    nearest: false                                    true: a pixel takes the nearer of the two values of the classes
    mask_suffix: ""                                   _mask: the mask of a.jpg is a_mask.png

Both folders may have sub-folders, the same in each; split files then hold patient1/a.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import read_yaml, shell_word

from .base import DatasetError, DatasetInfo
from .decode import canonical_name, common_suffix, decode_mask, list_images, load_opaque, read_split
from .paired import LabelTable, Pair, PairedDataset, preview
from .voc2012 import voc_colour

MIN_DIFFERENCE = 64  # of the two values that `nearest` tells apart
Colour = tuple[int, int, int]
Table = Mapping[str, Any]


class Folder(PairedDataset):
    """The data set of such a folder.

    `classes` is the path of the YAML file, by default ROOT/classes.yaml, or its content. DatasetError is raised if
    `num_classes` or `ignore_index` is given and differs from the table.
    """

    help_tree = """\
  mine/images/*.jpg, mine/masks/*.png                 pairs share a name; grey masks of class indices
  mine/{train,val}.txt                                one name per line; or {images,masks}/{train,val}/
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
                raise self.missing_error(f"{path if home.is_dir() else home} does not exist")
            classes = path
        self.classes = read_class_table(home.resolve().name, classes)
        self.info, self.table = self.classes.info, self.classes.labels
        for key, expected in (("num_classes", num_classes), ("ignore_index", ignore_index)):
            actual = getattr(self.info, key)
            if expected not in (None, actual):
                raise DatasetError(
                    f"{self.classes.source} has {key} {actual}, not {expected}. Fix: set dataset.{key}={actual}"
                )
        super().__init__(home, split)

    def find_pairs(self) -> list[Pair]:
        """Return the pairs of the split, by folders or by its file."""
        images, masks = self.root / "images", self.root / "masks"
        if (images / self.split).is_dir():
            images, masks = images / self.split, masks / self.split
        if not (images.is_dir() and masks.is_dir()):
            raise self.missing_error(f"{self.root} has no folders {images} and {masks}")
        ending = self.classes.mask_suffix
        found, drawn = list_images(images, below=True), list_images(masks, below=True)
        names = [name.removesuffix(ending) for name in drawn.images]
        if suffix := common_suffix(found.images, names):
            raise DatasetError(
                f"{masks}: the name of a mask is the name of its image with {suffix} at the end. "
                f"Fix: add `mask_suffix: {suffix}` to classes.yaml"
            )
        pairs = self.match_folders(found, drawn, masks, ending)
        if images.name == self.split:
            return pairs
        path = self.root / f"{self.split}.txt"
        if not path.is_file():
            raise self.missing_error(
                f"split {self.split!r} has neither {path} nor {images / self.split}: "
                f"`python scripts/prepare_data.py split {shell_word(str(self.root))}` writes split files"
            )
        known = {pair.name: pair for pair in pairs}
        listed = []
        for line in read_split(path):
            bare = line.removesuffix(Path(line).suffix)
            name = bare if line not in known and bare in known else line  # ".1" of "case.1" is not a suffix
            missing = Pair(name, images / f"{name}.jpg", masks / f"{name}{ending}.png")
            listed.append(known.get(name, missing))
        return listed

    def read_mask(self, path: Path) -> np.ndarray:
        if self.classes.rgb_masks:
            return self._decode_colours(np.array(load_opaque(path)[0].convert("RGB")), path)
        raw = decode_mask(path)
        mask = self.encode(raw, path)
        if self.classes.nearest and (mask == mask.flat[0]).all():
            low, high = self.classes.nearest
            value = low if self.table.mapping[low] == mask.flat[0] else high
            if (raw != value).any():
                raise DatasetError(
                    f"{path} holds labels {raw.min()}..{raw.max()}: `nearest` would give all of them the class of "
                    f"value {value}. Fix: in classes.yaml, give each class the `value` that the masks hold"
                )
        return mask

    def _decode_colours(self, colours: np.ndarray, path: Path) -> np.ndarray:
        """Return the class indices (H, W) uint8 of a mask (H, W, 3) in the colours of the classes."""
        codes = colours.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.uint32)
        mask = np.full(codes.shape, self.info.ignore_index, dtype=np.uint8)
        is_unknown = np.ones(codes.shape, dtype=bool)
        void = [(self.info.ignore_index, colour) for colour in self.classes.void_colours]
        for index, (red, green, blue) in [*enumerate(self.info.palette), *void]:
            here = codes == (red << 16 | green << 8 | blue)
            mask[here] = index
            is_unknown &= ~here
        if is_unknown.any():
            unknown = [f"#{code:06x}" for code in np.unique(codes[is_unknown])[:4]]
            raise DatasetError(
                f"{path} has colours that are not in the table ({', '.join(unknown)}). "
                "Fix: add them to classes.yaml, as the `color` of a class or as `void_color`"
            )
        return mask

    def remedy(self, unknown: list[int]) -> str:
        known = sorted(raw for raw, label in self.table.mapping.items() if label < self.info.num_classes)
        if self.info.num_classes == 19 and max(unknown) <= 33:
            return "use dataset=cityscapes, because these look like its label ids"
        if unknown == [255]:
            return "in classes.yaml, add `value: 255` to the class that 255 stands for, or `void: 255` if it is void"
        if unknown == [0]:
            return f"in classes.yaml, add `void: [0, 255]` if 0 is void; the table has {preview(known)}"
        if unknown == [1] and known == [0, 255]:
            return "remove `value: 255` from classes.yaml: the table has 0, 255, but the masks hold 0 and 1"
        blurred = len(known) == 2 and known[1] - known[0] >= MIN_DIFFERENCE and len(unknown) > 2
        more = "; or, because a JPEG or resizing blurs labels, add `nearest: true`" if blurred else ""
        return f"correct the mask (a JPEG cannot hold labels) or classes.yaml, whose table has {preview(known)}{more}"

    def faults_as_a_whole(self) -> list[str]:
        """Return a fault if masks hold only 0 and void: void is probably the value of a class."""
        void = self.classes.void
        if void is None or self.labels_seen() != {0, self.info.ignore_index} or self.info.num_classes < 2:
            return super().faults_as_a_whole()
        return [
            f"all masks, such as {self.pairs[0].mask}, hold only 0 and {void} (void). "
            f"Fix: in classes.yaml, add `value: {void}` to the class that {void} stands for"
        ]


# ---------------------------------------------------------------------------------------------------------------------
# classes.yaml


def read_class_table(name: str, classes: str | Path | Table | Sequence[Any]) -> ClassTable:
    """Return the table of classes of a data set called `name`, from a YAML file or from its content.

    Raises DatasetError if a key or a value cannot be used, or if two contradict each other.
    """
    if not isinstance(classes, (str, Path)):
        return ClassTable(name, "classes", classes)
    try:
        return ClassTable(name, str(classes), read_yaml(Path(classes)))
    except UserError as error:
        raise DatasetError(str(error)) from error


def _is_list(values: Any, *kinds: type) -> bool:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and all(type(value) in kinds for value in values)


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _is_byte(value: Any) -> bool:
    return type(value) is int and 0 <= value <= 255


def _is_colour(value: Any) -> bool:
    return _is_list(value, int) and len(value) == 3 and all(map(_is_byte, value))


def _is_share(value: Any) -> bool:
    return _is_list(value, int, float) and len(value) == 3 and all(0 <= channel <= 1 for channel in value)


_FLAG = (lambda value: isinstance(value, bool), "true or false")
_CHECKS: dict[str, tuple[Callable[[Any], bool], str]] = {  # key: whether a value is valid, and what is expected
    "scored": (lambda value: _is_list(value, int) and len(value) > 0, "indices of classes, such as [1, 2]"),
    "ignore_index": (_is_byte, "a whole number in 0..255"),
    "void": (lambda value: all(map(_is_byte, _as_list(value))), "numbers in 0..255, such as [0, 255]"),
    "mean": (_is_share, "three numbers from 0 to 1, as `stats` prints them"),
    "std": (lambda value: _is_share(value) and 0 not in value, "three numbers above 0, as `stats` prints them"),
    "rgb_masks": _FLAG,
    "void_color": (lambda value: _is_colour(value) or all(map(_is_colour, _as_list(value))), "one or more RGB colours"),
    "nearest": _FLAG,
    "mask_suffix": (lambda value: isinstance(value, str), "a text, such as _mask"),
}


class ClassTable:
    """The checked content of classes.yaml. Every error names its `source`."""

    def __init__(self, name: str, source: str, content: Any) -> None:
        self.source = source
        self.table = self._table(content)
        self.entries = entries = [self._entry(item) for item in self.table["classes"]]
        self.mask_suffix = canonical_name(self._get("mask_suffix", ""))
        self.rgb_masks: bool = self._get("rgb_masks", False)
        rgb, nearest, has_void = self.rgb_masks, self._get("nearest", False), "void" in self.table
        if rgb and nearest:
            raise self.fault("nearest is for grey masks. Fix: remove nearest or rgb_masks")
        ignore_index = self._get("ignore_index", 255)
        void = list(_as_list(self._get("void", ignore_index)))
        colours = self._get("void_color", [])
        if colours and not rgb:
            raise self.fault("void_color is for RGB masks. Fix: set rgb_masks: true, or use void")
        void_colours = [_colour(value) for value in ([colours] if _is_colour(colours) else colours)]
        if rgb and len(entries) > 1 and _claims(entries[-1], void):  # not a class: it gives void a colour
            last = entries.pop()
            void_colours.append(self._class_colour(last, len(entries)))
        if rgb and any(_claims(entry, void) for entry in entries):
            raise self.fault("a class of rgb_masks has the value of void. Fix: use `void_color` for it")
        values = self._values()
        if not has_void:
            if ignore_index < len(entries) and not rgb and ignore_index not in values:
                ignore_index = 255  # the given one is a number in the masks, but as an index it would be a class
            void = [raw for raw in void if raw not in values]
        for raw in () if rgb else void:
            if raw in values:
                raise self.fault(
                    f"{raw} is void and the value of class {entries[values[raw]]['name']!r}. "
                    "Fix: give each class its `value`, such as {name: wall, value: 1}"
                )
        self.info, self.void_colours = self._info(name, ignore_index), void_colours
        colours = [*self.info.palette, *void_colours]
        if rgb and len(set(colours)) < len(colours):
            raise self.fault("two classes, or a class and void, have one colour. Fix: change one")
        if nearest and has_void:
            raise self.fault("nearest leaves no void. Fix: remove void or nearest")
        self.labels = LabelTable(self._nearest(values) if nearest else dict.fromkeys(void, ignore_index) | values)
        self.nearest = (min(values), max(values)) if nearest else None
        # The number of void in the masks, if it is the default and no class has this value.
        self.void = ignore_index if not has_void and ignore_index in void else None

    def fault(self, text: str) -> DatasetError:
        return DatasetError(f"{self.source}: {text}")

    def _get(self, key: str, default: Any) -> Any:
        if key not in self.table:
            return default
        value, (is_valid, expected) = self.table[key], _CHECKS[key]
        if not is_valid(value):
            raise self.fault(f"{key}={value!r} is invalid: expected {expected}")
        return value

    def _table(self, content: Any) -> Table:
        """Return the content as a mapping with a list of classes; a list or {index: name} alone is accepted too."""
        if isinstance(content, Mapping) and ("classes" in content or not _has_indices(content)):
            table = content
        else:
            table = {"classes": content}
        unknown = [str(key) for key in table if key not in ("classes", *_CHECKS)]
        if unknown:
            raise self.fault(f"unknown key {unknown[0]!r}. Fix: use only classes, {', '.join(_CHECKS)}")
        names = table.get("classes")
        if isinstance(names, Mapping) and _has_indices(names):
            if sorted(names) != list(range(len(names))):
                raise self.fault(
                    f"the indices of `classes` are {preview(sorted(names))}: expected 0, 1, ... "
                    "Fix: write a list, with the number in the masks as `value`: - {name: lesion, value: 2}"
                )
            names = [names[k] for k in range(len(names))]
        if isinstance(names, str) or not isinstance(names, Sequence) or not names:
            raise self.fault("`classes` must be a list of names, such as [background, lesion]")
        return {**table, "classes": names}

    def _entry(self, item: Any) -> dict[str, Any]:
        """Return a class as a mapping with a name."""
        entry = dict(item) if isinstance(item, Mapping) else {"name": item}
        if "name" not in entry or not set(entry) <= {"name", "value", "color"}:
            raise self.fault(f"a class has a name and, if needed, a value and a color; got {entry}")
        if type(entry["name"]) not in (str, int, float):
            raise self.fault(f"the name of a class is {entry['name']!r}. Fix: put the name in quotes")
        return {**entry, "name": str(entry["name"])}

    def _info(self, name: str, ignore_index: int) -> DatasetInfo:
        classes = tuple(entry["name"] for entry in self.entries)
        first_is_background = classes[0].lower() == "background" and len(classes) > 1
        scored = self._get("scored", [*range(int(first_is_background), len(classes))])
        palette = tuple(self._class_colour(entry, k) for k, entry in enumerate(self.entries))
        mean, std = (tuple(map(float, self._get(key, getattr(DatasetInfo, key)))) for key in ("mean", "std"))
        try:
            return DatasetInfo(name, classes, palette, tuple(scored), ignore_index, mean, std)  # type: ignore[arg-type]
        except ValueError as error:
            raise self.fault(str(error)) from None

    def _class_colour(self, entry: Mapping[str, Any], index: int) -> Colour:
        value = entry.get("color", voc_colour(index))
        if not _is_colour(value):
            name = entry["name"]
            raise self.fault(f"the color of class {name!r} is {value!r}: expected three numbers from 0 to 255")
        return _colour(value)

    def _values(self) -> dict[int, int]:
        """Return raw value -> class. Raises DatasetError if a value has two classes, or is not one of 0..255."""
        mapping: dict[int, int] = {}
        for index, entry in enumerate(self.entries):
            for raw in _as_list(entry.get("value", index)):
                if not _is_byte(raw) or raw in mapping:
                    raise self.fault(
                        f"value {raw} of class {entry['name']!r} is invalid: expected a number in 0..255 "
                        "that no other class has"
                    )
                mapping[raw] = index
        return mapping

    def _nearest(self, values: dict[int, int]) -> dict[int, int]:
        """Return raw value -> class: each of 0..255 takes the nearer of two values.

        Raises DatasetError unless there are two: a blurred edge between two values would take the third, between them.
        """
        known = sorted(values)
        if len(known) != 2 or known[1] - known[0] < MIN_DIFFERENCE:
            raise self.fault(
                f"nearest needs two values at least {MIN_DIFFERENCE} apart, such as 0 and 255, but the classes have "
                f"{', '.join(map(str, known[:6]))}. Fix: add `value` to the classes, or remove nearest"
            )
        return {raw: values[min(known, key=lambda k: abs(k - raw))] for raw in range(256)}


def _claims(entry: Mapping[str, Any], void: list[int]) -> bool:
    """Return whether the explicit value of a class is a number of void."""
    return any(value in void for value in _as_list(entry.get("value", [])))


def _has_indices(names: Mapping[Any, Any]) -> bool:
    return all(isinstance(k, int) for k in names)


def _colour(value: Sequence[int]) -> Colour:
    red, green, blue = value
    return red, green, blue
