"""classes.yaml: what a folder data set says of its classes, read and checked key by key."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .base import DatasetInfo
from .errors import DatasetError
from .voc2012 import voc_colour

KEYS = ("classes", "scored", "ignore_index", "mean", "std", "rgb_masks", "nearest", "mask_suffix")
APART = 64  # levels between two values, so that the nearer one is the one that was meant
CLASS_KEYS = ("name", "value", "color")
Table = Mapping[str, Any]


def read_classes(classes: str | Path | Table | Sequence[Any]) -> tuple[Table, list[dict[str, Any]], str]:
    """Return the table of classes, each class as a mapping, and what messages call the table.

    `classes` is the path of a YAML file, or what such a file holds. Raises DatasetError where it cannot be used.
    """
    if isinstance(classes, (str, Path)):
        table, source = load_table(Path(classes)), str(classes)
    else:
        table, source = as_table(classes), "classes"
    return table, [as_entry(item, source) for item in table["classes"]], source


def load_table(path: Path) -> Table:
    """Return the content of classes.yaml.

    Raises DatasetError where it cannot be parsed.
    """
    import yaml

    try:
        return as_table(yaml.safe_load(path.read_text(encoding="utf-8")), str(path))
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
    if isinstance(names, Mapping) and all(isinstance(k, int) for k in names):
        return {**table, "classes": [names[k] for k in sorted(names)]}
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise DatasetError(f"{source}: `classes` must be a list of names, such as [background, lesion]")
    return table


def as_entry(item: Any, source: str) -> dict[str, Any]:
    """Return a class as a mapping with a name."""
    entry = dict(item) if isinstance(item, Mapping) else {"name": item}
    if "name" not in entry or not set(entry) <= set(CLASS_KEYS):
        raise DatasetError(f"{source}: a class has a name and, if needed, a value and a color; got {entry}")
    if type(entry["name"]) not in (str, int, float):
        raise DatasetError(f"{source}: a class is called {entry['name']!r}: put its name in quotes")
    return {**entry, "name": str(entry["name"])}


def make_info(name: str, table: Table, entries: list[dict[str, Any]], source: str) -> DatasetInfo:
    """Return the facts of the data set.

    Raises DatasetError for a table that contradicts itself.
    """
    first_is_background = entries[0]["name"].lower() == "background" and len(entries) > 1
    scored = table.get("scored", [*range(int(first_is_background), len(entries))])
    if not (_is_list(scored, int) and len(scored)):
        raise DatasetError(f"{source}: scored is {scored!r}: list the indices of classes, such as [1, 2]")
    ignore_index = table.get("ignore_index", 255)
    if type(ignore_index) is not int:
        raise DatasetError(f"{source}: ignore_index is {ignore_index!r}: give a whole number, such as 255")
    try:
        return DatasetInfo(
            name=name,
            classes=tuple(entry["name"] for entry in entries),
            palette=tuple(
                colour(entry.get("color", voc_colour(k)), entry, source) for k, entry in enumerate(entries)
            ),
            scored=tuple(scored),
            ignore_index=ignore_index,
            mean=triple(table, "mean", DatasetInfo.mean, source),
            std=triple(table, "std", DatasetInfo.std, source),
        )
    except ValueError as error:
        raise DatasetError(str(error) if isinstance(error, DatasetError) else f"{source}: {error}") from None


def triple(
    table: Table, key: str, default: tuple[float, float, float], source: str
) -> tuple[float, float, float]:
    """Return a number for each of R, G and B: a mean from 0 to 1, or a standard deviation above 0."""
    values = table.get(key, default)
    if _is_list(values, int, float) and len(values) == 3:
        red, green, blue = (float(value) for value in values)
        if all(math.isfinite(x) and 0 <= x <= 1 and (x > 0 or key == "mean") for x in (red, green, blue)):
            return red, green, blue
    above = "from 0 to 1" if key == "mean" else "above 0, at most 1"
    raise DatasetError(f"{source}: {key} is {values!r}: give three numbers {above}, as `stats` prints them")


def colour(value: Any, entry: Mapping[str, Any], source: str) -> tuple[int, int, int]:
    """Return an RGB colour."""
    if not (_is_list(value, int) and len(value) == 3 and all(0 <= channel <= 255 for channel in value)):
        raise DatasetError(
            f"{source}: the color of class {entry['name']!r} is {value!r}: give three numbers from 0 to 255"
        )
    red, green, blue = value
    return red, green, blue


def value_map(entries: list[dict[str, Any]], ignore_index: int, source: str) -> dict[int, int]:
    """Return raw value -> class; the void label is itself unless a class claims it.

    Raises DatasetError where a value is claimed twice or is not one of 0..255.
    """
    mapping: dict[int, int] = {}
    for index, entry in enumerate(entries):
        value = entry.get("value", index)
        for raw in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if not (type(raw) is int and 0 <= raw <= 255) or raw in mapping:
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
            f"{source}: nearest tells two values apart, such as 0 and 255, but the classes have "
            f"{', '.join(map(str, known[:6]))}: name their values, or leave out nearest"
        )
    return {raw: values[min(known, key=lambda k: abs(k - raw))] for raw in range(256)}


def ending(table: Table, source: str) -> str:
    """Return what the names of masks have at their end besides the image's, such as "_mask"."""
    value = table.get("mask_suffix", "")
    if not isinstance(value, str):
        raise DatasetError(f"{source}: mask_suffix is {value!r}: give a text, such as _mask")
    return value


def yes_or_no(table: Table, key: str, source: str) -> bool:
    """Return a switch, false where it is not there."""
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise DatasetError(f"{source}: {key} is {value!r}: give true or false")
    return value


def _is_list(values: Any, *kinds: type) -> bool:
    listed = isinstance(values, Sequence) and not isinstance(values, str)
    return listed and all(type(value) in kinds for value in values)
