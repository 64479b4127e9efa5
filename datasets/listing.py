"""Which image files a folder holds, and which names a split file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from .errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def image_files(folder: Path, below: bool = False) -> list[Path]:
    """Return the image files of a folder, sorted; with `below` those of its sub-folders too."""
    found = []
    for home, folders, files in os.walk(folder, onerror=_raise):
        visible = [name for name in files if not name.startswith(".")]
        found += [Path(home, name) for name in visible if Path(name).suffix.lower() in IMAGE_SUFFIXES]
        folders[:] = [name for name in folders if below and not name.startswith(".")]
    return sorted(found)


def list_images(folder: Path, below: bool = False) -> dict[str, Path]:
    """Return the image files of a folder by stem, sorted; with `below` its sub-folders' too, as "patient1/a"."""
    found = image_files(folder, below)
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def common_suffix(images: Iterable[str], masks: Iterable[str]) -> str:
    """Return what the names of images lack of their masks', such as "_mask"; "" where there is no such thing.

    It is what most images have in common: a mask or two may be missing.
    """
    names, there = set(images), set(masks)
    if names & there:
        return ""
    owners = ((mask, next((k for k in range(len(mask), 0, -1) if mask[:k] in names), 0)) for mask in there)
    endings = Counter(mask[k:] for mask, k in owners if k)
    best = min(endings, key=lambda ending: (-endings[ending], ending), default="")
    return best if 2 * endings[best] > len(names) else ""


def read_split(path: Path) -> list[str]:
    """Return the lines of a split file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is no text in UTF-8: write a name a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _raise(error: OSError) -> None:
    raise error
