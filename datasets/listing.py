"""Which image files a folder holds, and which names a split file."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")


def image_files(folder: Path) -> list[Path]:
    """Return the image files of a folder, sorted by name."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and not _is_folder(entry)]
    return sorted(folder / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES)


def list_images(folder: Path) -> dict[str, Path]:
    """Return the image files of a folder by stem, sorted by name."""
    return {path.stem: path for path in image_files(folder)}


def read_split(path: Path) -> list[str]:
    """Return the lines of a split file that are not empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DatasetError(f"{path} is no text in UTF-8: write a name a line") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links in a circle: reading it names them
        return False
