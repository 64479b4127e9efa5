"""Image files in and out: orientation, palettes, and writing so that a file is whole or absent.

Everything written lies pixel upon pixel over the stored image and carries its EXIF orientation, so readers that
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
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from datasets import DatasetError
from datasets.base import DatasetInfo
from datasets.decode import EXIF_ORIENTATION, is_deep, load, open_image
from datasets.listing import IMAGE_SUFFIXES

VOID_COLOUR = (224, 224, 192)
BAND = 256  # rows of an overlay that are drawn at once
# From upright back to stored: what undoes ImageOps.exif_transpose for each orientation.
_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


class Picture(NamedTuple):
    """An image as it is shown: upright pixels (3, H, W) uint8, and the EXIF orientation of its file (1: none)."""

    pixels: Tensor
    orientation: int


def read(path: Path) -> Picture:
    """Decode an image file, upright.

    Raises DatasetError naming the path where it is missing, damaged, or deeper than 8 bits a channel.
    """
    image = load(open_image(path), path)
    if is_deep(image.mode):
        raise DatasetError(f"{path} has more than 8 bits a pixel (mode {image.mode}): save it as 8 bits")
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    upright = ImageOps.exif_transpose(image).convert("RGB")
    pixels = torch.from_numpy(np.array(upright)).permute(2, 0, 1)
    return Picture(pixels, orientation if orientation in _BACK else 1)


def find(inputs: Sequence[Path], out: Path) -> dict[str, Path]:
    """Return name -> image file: of files their stem, of folders the path below them, without the suffix.

    What lies in ``out``, inside such a folder, are masks that were written there before: it is left out.

    Raises:
        FileNotFoundError: an input is not there, or a folder holds no image.
        ValueError: two images would have one name, or the masks would lie among the images.
    """
    found: dict[str, Path] = {}
    written = out.resolve()
    for given in inputs:
        if given.is_dir():
            home = given.resolve()
            if home == written:
                raise ValueError(f"--out {out} is the folder of the images: choose another for the masks")
            masks = given / written.relative_to(home) if home in written.parents else None
            files = sorted(
                p
                for p in given.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES
                and p.name[0] != "."
                and (p.is_file() or (p.is_symlink() and not p.exists()))  # links to nowhere are named later
                and not (masks and p.is_relative_to(masks))
            )
            if not files:
                raise FileNotFoundError(f"{given} holds no image ({' '.join(IMAGE_SUFFIXES)})")
            names = {path: path.relative_to(given).with_suffix("").as_posix() for path in files}
        elif given.is_file():
            names = {given: given.stem}
        else:
            raise FileNotFoundError(f"{given} does not exist: give image files or folders of them")
        for path, name in names.items():
            if found.setdefault(name, path) != path:
                raise ValueError(f"{found[name]} and {path} would both be written as {name}: rename one")
    return found


def as_stored(labels: np.ndarray, orientation: int) -> Image.Image:
    """Return upright labels (H, W) uint8 or bool as a picture that lies over the stored file."""
    image = Image.fromarray(labels.astype(np.uint8))
    return image.transpose(_BACK[orientation]) if orientation in _BACK else image


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
    for top in range(0, len(labels), BAND):  # drawing takes 24 bytes a pixel, and one a class
        masks = torch.stack([labels[top : top + BAND] == c for c in info.scored])
        band = pixels[:, top : top + BAND].contiguous()
        drawn = draw_segmentation_masks(band, masks, alpha=0.5, colors=colours)
        picture.paste(Image.fromarray(drawn.permute(1, 2, 0).numpy()), (0, top))
    save_png(picture, path)


def save_probabilities(probs: Tensor, orientation: int, path: Path) -> None:
    """Write probabilities (C, H, W) as a float16 .npy file, a class at a time, so that it may exceed the memory."""
    turned = orientation in (5, 6, 7, 8)
    shape = (len(probs), probs.shape[2], probs.shape[1]) if turned else tuple(probs.shape)
    with aside(path) as temporary:
        out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for c, channel in enumerate(probs):
            image = Image.fromarray(channel.float().numpy())
            out[c] = np.asarray(image.transpose(_BACK[orientation]) if orientation in _BACK else image)
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
    """Give a temporary path beside ``path`` that takes its place when all went well, and is gone if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
