"""Small data sets on disk in the real layouts: file names, formats and palettes as in the real things.

Each function writes below a folder and returns the root that the data set takes. Pictures are smooth, so that
JPEG keeps them, and depend on the index only.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from datasets.voc2012 import voc_colour


def picture(index: int, size: tuple[int, int]) -> Image.Image:
    """An RGB image of (width, height): a smooth pattern with a bright square."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    waves = [127 + 80 * np.sin((x + 2 * y) / (7 + channel) + index) for channel in range(3)]
    pixels = np.stack(waves, axis=-1)
    pixels[square(index, size)] = (230, 200, 60)
    return Image.fromarray(pixels.astype(np.uint8))


def square(index: int, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the object."""
    width, height = size
    top, left = (3 + 5 * index) % (height // 2), (4 + 3 * index) % (width // 2)
    return slice(top, top + height // 3), slice(left, left + width // 3)


def labels(index: int, size: tuple[int, int], inside: int, outside: int = 0) -> np.ndarray:
    """A mask (H, W) uint8 with the object of `picture`."""
    mask = np.full(size[::-1], outside, dtype=np.uint8)
    mask[square(index, size)] = inside
    return mask


def save(image: Image.Image, path: Path, **options: object) -> None:
    """Write an image and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)  # type: ignore[arg-type]


def palette_image(mask: np.ndarray) -> Image.Image:
    """A PNG as VOC has them: indices, with VOC's palette."""
    image = Image.fromarray(mask)
    image.putpalette([channel for label in range(256) for channel in voc_colour(label)])
    return image


def make_kvasir(tmp_path: Path, count: int = 25, layout: str = "released", size: tuple[int, int] = (48, 40)) -> Path:
    """Kvasir-SEG: layout "released", "files" (with split files) or "split" (the authors' tree)."""
    root = tmp_path / "Kvasir-SEG"
    for index in range(count):
        name = f"cju{index:03d}abc.jpg"
        split = "val" if index % 5 == 4 else "train"
        if layout == "split":
            image, mask = root / f"images_split/{split}/jpg_images", root / f"masks_split/{split}/jpg_masks"
        else:
            image, mask = root / "images", root / "masks"
        save(picture(index, size), image / name, quality=95)
        save(Image.fromarray(labels(index, size, 255)).convert("RGB"), mask / name, quality=75)
        if layout == "files":
            with (root / f"{split}.txt").open("a") as file:
                file.write(Path(name).stem + "\n")
    return root


def make_voc(tmp_path: Path, count: int = 6, aug: bool = False, size: tuple[int, int] = (50, 38)) -> Path:
    """VOC 2012 with a void border around each object; `aug` adds the augmented split, pairs of paths."""
    root = tmp_path / "VOCtrainval_11-May-2012"
    home = root / "VOCdevkit" / "VOC2012"
    sets = home / "ImageSets" / "Segmentation"
    sets.mkdir(parents=True)
    names: dict[str, list[str]] = {"train": [], "val": []}
    for index in range(count):
        name = f"2007_{index:06d}"
        shape = size if index % 2 == 0 else size[::-1]
        mask = labels(index, shape, 1 + index % 20)
        rows, columns = square(index, shape)
        mask[rows.start, columns] = 255
        save(picture(index, shape), home / "JPEGImages" / f"{name}.jpg", quality=95)
        save(palette_image(mask), home / "SegmentationClass" / f"{name}.png")
        if aug:
            save(Image.fromarray(mask), home / "SegmentationClassAug" / f"{name}.png")
        names["val" if index % 3 == 2 else "train"].append(name)
    for split, members in names.items():
        (sets / f"{split}.txt").write_text("".join(f"{name}\n" for name in members))
    if aug:
        lines = [f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in names["train"]]
        (sets / "train_aug.txt").write_text("".join(lines))
    return root


def make_cityscapes(tmp_path: Path, count: int = 4, size: tuple[int, int] = (64, 32)) -> Path:
    """Cityscapes, fine: `count` frames for each split, two cities each, the usual extra files too."""
    root = tmp_path / "cityscapes"
    cities = {"train": ("aachen", "bochum"), "val": ("frankfurt", "lindau")}
    for split, names in cities.items():
        for index in range(count):
            city = names[index % 2]
            frame = f"{city}_{index:06d}_000019"
            fine = root / "gtFine" / split / city
            ids = labels(index, size, inside=26, outside=7)  # a car on a road
            ids[0], ids[-1, :4] = 23, 1  # sky; ego vehicle, which is void
            save(picture(index, size), root / "leftImg8bit" / split / city / f"{frame}_leftImg8bit.png")
            save(Image.fromarray(ids), fine / f"{frame}_gtFine_labelIds.png")
            save(Image.fromarray(ids), fine / f"{frame}_gtFine_instanceIds.png")
            (fine / f"{frame}_gtFine_polygons.json").write_text("{}")
    return root


def make_folder(
    tmp_path: Path,
    count: int = 6,
    layout: str = "files",
    classes: str = "classes: [background, lesion]\n",
    inside: int = 1,
    size: tuple[int, int] = (40, 32),
) -> Path:
    """Bring your own: layout "files" (train.txt, val.txt) or "split" (images/train, masks/train, ...)."""
    root = tmp_path / "mine"
    for index in range(count):
        split = "val" if index % 3 == 2 else "train"
        below = split if layout == "split" else ""
        save(picture(index, size), root / "images" / below / f"case{index}.jpg")
        save(Image.fromarray(labels(index, size, inside)), root / "masks" / below / f"case{index}.png")
        if layout == "files":
            with (root / f"{split}.txt").open("a") as file:
                file.write(f"case{index}\n")
    (root / "classes.yaml").write_text(classes)
    return root


def bomb(path: Path) -> None:
    """A PNG whose header claims 40 gigapixels."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", 200_000, 200_000, 8, 2, 0, 0, 0)
    for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    path.write_bytes(content)
