"""Image files in and out: orientation, palettes, and writing so that a file is whole or absent.

Every written picture has the pixel grid and the EXIF orientation of the stored image, so readers that
honour it and readers that do not both see a mask where its object is. Only overlays, which are to be looked at, are
written upright.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from configs.errors import UserError
from datasets import DatasetError
from datasets.base import DatasetInfo
from datasets.decode import (
    EXIF_ORIENTATION,
    IMAGE_SUFFIXES,
    STORED,
    UPRIGHT,
    is_deep,
    list_images,
    load_image,
    turned,
)  # fmt: skip

VOID_COLOUR = (224, 224, 192)
BAND = 256  # rows of an overlay that are drawn at once


class Picture(NamedTuple):
    """An image as it is shown: upright pixels (3, H, W) uint8, and the EXIF orientation of its file (1: none)."""

    pixels: Tensor
    orientation: int


def read(path: Path) -> Picture:
    """Decode an image file, upright.

    Raises DatasetError that names the path if it is missing, damaged, too large, or deeper than 8 bits a channel.
    """
    stored = load_image(path)
    if is_deep(stored.image.mode):
        raise DatasetError(
            f"{path} has more than 8 bits per channel (mode {stored.image.mode}). Fix: save it as 8 bits"
        )
    try:
        upright = turned(stored.image, UPRIGHT, stored.orientation).convert("RGB")
        return Picture(torch.from_numpy(np.array(upright)).permute(2, 0, 1), stored.orientation)
    except MemoryError as error:
        raise DatasetError(f"{path} does not fit in memory. Fix: cut it into tiles") from error


def find(inputs: Sequence[Path], out: Path) -> tuple[dict[str, Path], list[str]]:
    """Return {name: image file} and notes. The name of a file is its stem, or its path below a given folder.

    Hidden files and folders are skipped, and also ``out`` if it is inside such a folder: it holds masks.

    Raises:
        FileNotFoundError: an input does not exist.
        UserError: a folder has no image, two images have one name, or ``out`` is the folder of the images.
    """
    found: dict[str, Path] = {}
    notes: list[str] = []
    written = out.resolve()
    for given in inputs:
        if given.is_dir():
            if given.resolve() == written:
                raise UserError(f"--out {out} is the folder of the images. Fix: choose another for the masks")
            listing = list_images(given, below=True, without=written)
            if listing.ignored:
                notes.append(f"files in {given} that are not read: {listing.ignored_text}")
            if not listing.images:
                raise UserError("; ".join([f"{given} has no image ({' '.join(IMAGE_SUFFIXES)})", *notes]))
            if listing.clashes:
                raise UserError(same_name(*listing.clashes[0]))
            paths = list(listing.images.values())
            names = {path: path.relative_to(given).with_suffix("").as_posix() for path in paths}
        elif given.is_file():
            names = {given: given.stem}
        else:
            raise FileNotFoundError(f"{given} does not exist. Fix: give image files or folders of them")
        for path, name in names.items():
            if found.setdefault(name, path) != path:
                raise UserError(same_name(found[name], path))
    return found, notes


def same_name(path: Path, other: Path) -> str:
    """Return the message for two images whose masks would have one name."""
    return f"{path} and {other} would both be written as {path.stem}. Fix: rename one"


def as_stored(labels: np.ndarray, orientation: int) -> Image.Image:
    """Return upright labels (H, W) uint8 or bool as a picture on the pixel grid of the stored file."""
    return turned(Image.fromarray(labels.astype(np.uint8)), STORED, orientation)


def save_labels(labels: Tensor, orientation: int, info: DatasetInfo, path: Path) -> None:
    """Write labels (H, W) uint8 as a palette PNG: the index is the class, the colour its colour."""
    image = as_stored(labels.numpy(), orientation)
    image.putpalette(palette(info))
    save_png(image, path, orientation)


def save_mask(mask: Tensor, orientation: int, path: Path) -> None:
    """Write one class's mask (H, W) bool as a PNG of 0 and 255."""
    save_png(as_stored(mask.numpy() * np.uint8(255), orientation), path, orientation)


def save_overlay(pixels: Tensor, labels: Tensor, info: DatasetInfo, path: Path) -> None:
    """Write the image (3, H, W) uint8, upright, with the labels' colours over it; unscored classes stay clear."""
    colours = [tuple(info.palette[c]) for c in info.scored]
    picture = Image.new("RGB", (labels.shape[1], labels.shape[0]))
    for top in range(0, len(labels), BAND):  # drawing needs 24 bytes per pixel, and one per class
        masks = torch.stack([labels[top : top + BAND] == c for c in info.scored])
        band = pixels[:, top : top + BAND].contiguous()
        drawn = draw_segmentation_masks(band, masks, alpha=0.5, colors=colours)
        picture.paste(Image.fromarray(drawn.permute(1, 2, 0).numpy()), (0, top))
    save_png(picture, path)


def save_probabilities(probs: Tensor, orientation: int, path: Path) -> None:
    """Write probabilities (C, H, W) as a float16 .npy file, a class at a time, so that it may exceed the memory."""
    across = orientation in (5, 6, 7, 8)
    shape = (len(probs), probs.shape[2], probs.shape[1]) if across else tuple(probs.shape)
    with aside(path) as temporary:
        out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for c, channel in enumerate(probs):
            image = Image.fromarray(channel.float().numpy())
            out[c] = np.asarray(turned(image, STORED, orientation))
        out.flush()


def palette(info: DatasetInfo) -> list[int]:
    """Return the 256 colours of a palette PNG, void included."""
    colours = [*info.palette, *[(0, 0, 0)] * (256 - info.num_classes)]
    colours[info.ignore_index] = VOID_COLOUR
    return [int(channel) for colour in colours for channel in colour]


def save_png(image: Image.Image, path: Path, orientation: int = 1) -> None:
    """Write a PNG whole or not at all, with the EXIF orientation if there is one."""
    exif = Image.Exif()
    if orientation != 1:
        exif[EXIF_ORIENTATION] = orientation
    with aside(path) as temporary:
        image.save(temporary, format="PNG", exif=exif if orientation != 1 else None)


@contextlib.contextmanager
def aside(path: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``path``. It replaces ``path`` on success and is deleted on an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
