"""Image files: find them in folders and decode them to RGB images and index masks. Does not import torch.

Arrays are (H, W, 3) and (H, W) uint8. Pillow decodes, as in the paper's experiments. Every file that cannot be used
raises DatasetError, which names the path and the fix.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import os
import re
import stat
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from configs.errors import UserError
from configs.files import read_bytes

from .base import DatasetError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF")  # Pillow reads more, some by calling other programs
EXIF_ORIENTATION = 0x0112
UPRIGHT = {  # EXIF orientation -> how the stored pixels become upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TO_STORED = {**UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the inverse
TIFF_BITS_TAG, TIFF_KIND_TAG = 258, 254
TIFF_REDUCED_OR_MASK = 0b101  # bits of the kind: the page is a small copy of another, or a transparency mask
GREY_FACTORS = {2: 85, 4: 17}  # Pillow scales grey of 2 and 4 bits to 0..255 by these factors


# ---------------------------------------------------------------------------------------------------------------------
# Folders and split files


@dataclass
class ImageFolder:
    """Image files of a folder, sorted. A name is the path below the folder without suffix, such as "patient1/a"."""

    images: dict[str, Path] = field(default_factory=dict)
    clashes: list[tuple[Path, Path]] = field(default_factory=list)  # two files of one name; the first is used
    ignored: list[Path] = field(default_factory=list)  # visible files of other suffixes

    @property
    def ignored_text(self) -> str:
        """The number of ignored files and their suffixes, such as "3 (2 .npy, 1 .txt)"; "" if there are none."""
        kinds = Counter(path.suffix.lower() or path.name for path in self.ignored)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(5))
        return f"{len(self.ignored)} ({listed})" if kinds else ""


def list_images(folder: Path, below: bool = False, without: Path | None = None) -> ImageFolder:
    """List the visible image files of a folder; with `below` also of sub-folders and linked ones, except `without`."""
    found = ImageFolder()
    for path in sorted(visible_files(folder, below, without)):
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            found.ignored.append(path)
            continue
        name = canonical_name(path.relative_to(folder).with_suffix("").as_posix())
        if name in found.images:
            found.clashes.append((found.images[name], path))
        else:
            found.images[name] = path
    return found


def visible_files(
    folder: Path, below: bool, without: Path | None = None, above: frozenset[tuple[int, int]] = frozenset()
) -> Iterator[Path]:
    """Yield the files of a folder. A link to one of the folders `above` it is not followed: it is a cycle."""
    status = folder.stat()
    identity = status.st_dev, status.st_ino
    if identity in above or (without is not None and folder.resolve() == without):
        return
    for entry in os.scandir(folder):
        if entry.name.startswith("."):
            continue
        path = Path(folder, entry.name)
        if not path.is_dir():
            yield path
        elif below:
            yield from visible_files(path, below, without, above | {identity})


def canonical_name(name: str) -> str:
    """Return the canonical form of a name: composed Unicode (NFC); bytes that are not UTF-8 are read as Latin-1.

    macOS decomposes umlauts; archives and split files from older systems hold Latin-1.
    """
    raw = name.encode("utf-8", "surrogateescape")
    with contextlib.suppress(UnicodeDecodeError):
        return unicodedata.normalize("NFC", raw.decode("utf-8"))
    return raw.decode("latin-1")


def common_suffix(images: Iterable[str], masks: Iterable[str]) -> str:
    """Return the ending, such as "_mask", that turns most image names into mask names; "" if there is none."""
    names, mask_names = set(images), set(masks)
    if names & mask_names:
        return ""
    owners = ((mask, next((k for k in range(len(mask), 0, -1) if mask[:k] in names), 0)) for mask in mask_names)
    endings = Counter(mask[k:] for mask, k in owners if k)
    best = min(endings, key=lambda ending: (-endings[ending], ending), default="")
    return best if 2 * endings[best] > len(names) else ""


def read_split(path: Path) -> list[str]:
    """Return the names in a split file, one per line, in their canonical spelling.

    The text may be UTF-8 with or without a byte-order mark, UTF-16 with one, or Latin-1.
    """
    try:
        raw = read_bytes(path)
        is_utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        text = raw.decode("utf-16") if is_utf16 else raw.decode("utf-8-sig", "surrogateescape")
    except UnicodeDecodeError:
        text = "\0"
    except UserError as error:
        raise DatasetError(str(error)) from error
    if "\0" in text:
        raise DatasetError(f"{path} is not a text file. Fix: write one name per line, in UTF-8")
    return [canonical_name(line.strip()) for line in text.splitlines() if line.strip()]


def make_split(
    stems: Sequence[str], shares: Mapping[str, float], seed: int = 0, group: str | None = None
) -> dict[str, list[str]]:
    """Return the names of each split, sorted. A hash of an image's name decides its split.

    The same names give the same split on every machine and in every version of Python.

    Args:
        stems: the names of all images.
        shares: split -> share of the images to hold out; the rest is "train".
        seed: another number gives another split.
        group: a regular expression; images for which it finds the same text (its first group, if it has one)
            stay together, such as the frames of a video or the images of a patient.
    """
    if any(not 0 < share < 1 for share in shares.values()) or sum(shares.values()) >= 1:
        given = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        raise UserError(f"shares {given} are invalid: expected each between 0 and 1, and a sum less than 1")
    groups: dict[str, list[str]] = defaultdict(list)
    for stem in stems:
        groups[_find_group(stem, group)].append(stem)
    ranked = sorted(groups, key=lambda key: hashlib.sha256(os.fsencode(f"{seed}/{key}")).hexdigest())
    if len(ranked) <= len(shares):
        unit = "images" if group is None else "groups of images"
        raise UserError(f"{len(ranked)} {unit} cannot fill {len(shares) + 1} splits. Fix: add images")
    result: dict[str, list[str]] = {}
    for position, (name, share) in enumerate(shares.items()):
        wanted, chosen = max(1, round(share * len(stems))), list[str]()
        to_keep = len(shares) - position  # groups that the following splits need
        while len(chosen) < wanted and len(ranked) > to_keep:
            chosen += groups[ranked.pop(0)]
        result[name] = sorted(chosen)
    return {"train": sorted(stem for key in ranked for stem in groups[key]), **result}


def _find_group(stem: str, pattern: str | None) -> str:
    """Return the part of a name that the pattern finds; without a pattern, the name."""
    if pattern is None:
        return stem
    try:
        match = re.search(pattern, stem)
    except re.error as error:
        raise UserError(f"--group {pattern!r} is not a regular expression: {error}. Fix: correct it") from None
    found = match and (match[1] if match.re.groups else match[0])
    if found is None:
        raise UserError(f"--group {pattern!r} finds nothing in {stem!r}. Fix: change the expression, or the name")
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Files to pixels


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Any exception of Pillow, here or in the block, becomes a DatasetError that names the path.

    The pixels are not decoded yet. Files with several pages, and colours of more than 8 bits, are rejected here.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a pipe or a device could wait for ever
            raise DatasetError(f"{path} is not a regular file. Fix: replace it by an image file")
        with Image.open(path, formats=FORMATS) as image:
            _require_one_page(image, path)
            bits = _bits(image, path)
            if bits > 8 and not is_deep(image.mode):  # Pillow silently reduces 16-bit colours, not grey
                raise DatasetError(f"{path} has more than 8 bits per channel ({bits}). Fix: save it as 8 bits")
            yield image
    except DatasetError:
        raise
    except Exception as error:  # Pillow's plugins raise almost any type for damaged data
        raise DatasetError(_reason(path, error)) from error


def _reason(path: Path, error: Exception) -> str:
    """Return why a file cannot be read, and the fix."""
    if isinstance(error, FileNotFoundError):
        return _missing(path)
    if isinstance(error, UnidentifiedImageError):
        formats = ", ".join(FORMATS)
        return f"{path} is not an image of a supported format ({formats}). Fix: convert it, or fetch it again"
    if isinstance(error, Image.DecompressionBombError):
        size = re.search(r"\d+ pixels", str(error))
        claimed = size[0] if size else "too many pixels"
        return f"{path} claims to have {claimed}. Fix: fetch it again, or cut it into tiles"
    if isinstance(error, MemoryError):
        return f"{path} does not fit in memory. Fix: free memory, or cut the image into tiles"
    if isinstance(error, OSError) and error.errno is not None:
        return f"{path} cannot be opened ({error}). Fix: check the disk and its permissions"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{path} is damaged ({text}). Fix: download it again, or save it again without metadata"


def _missing(path: Path) -> str:
    """Return the message for a missing file; it names the target of a link, or the same name in another format."""
    with contextlib.suppress(OSError):
        if path.is_symlink():
            return f"{path} is missing: it is a link to {path.readlink()}. Fix: restore that file, or remove the link"
        for other in sorted(path.parent.iterdir()):
            if canonical_name(other.stem) == canonical_name(path.stem) and other.suffix.lower() not in IMAGE_SUFFIXES:
                return f"{path} is missing; {other.name} has a format that is not read. Fix: convert it to PNG"
    return f"{path} is missing. Fix: restore it, or take its name out of the split"


def _require_one_page(image: Image.Image, path: Path) -> None:
    """Reject files with several pages, because any of them could be meant. Small copies of a page do not count."""
    if image.format == "MPO":  # a camera's JPEG with a preview or a depth map behind the picture
        return
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format == "TIFF":
        kinds = []
        for frame in range(frames):
            image.seek(frame)
            kinds.append(int(image.tag_v2.get(TIFF_KIND_TAG, 0)))  # type: ignore[attr-defined]
        image.seek(0)
        frames = 1 + sum(not kind & TIFF_REDUCED_OR_MASK for kind in kinds[1:])
    if frames > 1:
        raise DatasetError(f"{path} has {frames} pages or frames. Fix: save the one that you need as a file of its own")


def _bits(image: Image.Image, path: Path) -> int:
    """Return the bits per channel in the file: the largest of a TIFF, as the header of a PNG has them, else 8."""
    if image.format == "TIFF":
        return max(image.tag_v2.get(TIFF_BITS_TAG, (1,)))  # type: ignore[attr-defined]
    if image.format == "PNG":
        with path.open("rb") as file:
            return file.read(25)[24]  # after the signature: length, "IHDR", width, height
    return 8


def is_deep(mode: str) -> bool:
    """Return whether a mode of Pillow has more than 8 bits per channel."""
    return mode in ("I", "F") or mode.startswith("I;")


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8. Call it after `load`, because a PNG may hold it after the pixels."""
    value = Image.Image.getexif(image).get(EXIF_ORIENTATION, 1)
    return value if value in UPRIGHT else 1


class DecodedFile(NamedTuple):
    """The decoded image of a file, and what the file says about it."""

    image: Image.Image  # the pixels as stored
    orientation: int  # EXIF, 1 to 8
    bits: int  # per channel, in the file
    format: str | None


def load_image(path: Path) -> DecodedFile:
    """Decode an image file. Raises DatasetError, as `open_image` does."""
    with open_image(path) as image:
        kind, bits = image.format, _bits(image, path)
        if kind == "TIFF":  # Pillow rotates its pixels and forgets the orientation
            orientation = orientation_of(image)
            image.load()
            return DecodedFile(orient(image, TO_STORED, orientation), orientation, bits, kind)
        image.load()
        return DecodedFile(image, orientation_of(image), bits, kind)


def orient(image: Image.Image, table: dict[int, Image.Transpose], orientation: int) -> Image.Image:
    """Return the image rotated according to UPRIGHT or TO_STORED and its EXIF orientation."""
    return image.transpose(table[orientation]) if orientation in table else image


def decode_image(path: Path, mask_size: tuple[int, int] | None = None, mask: Path | None = None) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; grey, palette, alpha and CMYK are converted.

    If the image has an EXIF orientation, its `mask` of `mask_size` (width, height) decides whether it is applied.
    """
    image, orientation, *_ = load_image(path)
    if is_deep(image.mode):
        raise DatasetError(
            f"{path} has more than 8 bits per channel (mode {image.mode}). "
            "Fix: choose the range of values to keep, and save it as 8 bits"
        )
    if orientation != 1 and _is_drawn_upright(path, image.size, orientation, mask_size, mask):
        image = orient(image, UPRIGHT, orientation)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _is_drawn_upright(
    path: Path, size: tuple[int, int], orientation: int, mask_size: tuple[int, int] | None, mask: Path | None
) -> bool:
    """Return whether a mask belongs to the upright image, not to the stored pixels.
    Viewers apply an EXIF orientation, and most training code ignores it. The mask decides: it has an orientation too,
    or its size equals that of the upright or of the stored image. Otherwise DatasetError is raised, because a wrong
    guess would shift masks away from their objects.
    """
    if mask is not None and load_image(mask).orientation != 1:
        return True
    upright_size = size[::-1]
    if orientation >= 5 and size != upright_size and mask_size is not None:
        return mask_size == upright_size
    raise DatasetError(
        f"{path} carries EXIF orientation {orientation} and its mask does not tell whether to apply it. "
        "Fix: store the pixels upright (mogrify -auto-orient) or remove the tag (exiftool -Orientation=)"
    )


def decode_mask(path: Path) -> np.ndarray:
    """Return a mask's indices (H, W) uint8: grey values, or palette indices; for a GIF in grey, the grey values.

    The EXIF orientation of the mask is applied. RGB with equal channels counts as grey. Raises DatasetError for
    colours, transparency, and values that are not whole numbers in 0..255.
    """
    stored = load_image(path)
    image = orient(stored.image, UPRIGHT, stored.orientation)
    if image.mode == "1":
        return np.array(image, dtype=np.uint8)
    if is_deep(image.mode):
        return _to_uint8(np.array(image), path)
    if image.mode == "P":
        return _gif_values(image) if stored.format == "GIF" else np.array(image)
    grey = as_grey(image)
    if grey is None:
        raise DatasetError(
            f"{path} has colours or transparency (mode {image.mode}), but class indices are needed. "
            "Fix: save it as a grey PNG of indices, or set rgb_masks: true in the folder's classes.yaml"
        )
    return grey // np.uint8(GREY_FACTORS[stored.bits]) if stored.bits in GREY_FACTORS else grey


def load_opaque(path: Path) -> tuple[Image.Image, str | None]:
    """Return a mask in upright orientation and its format; reject transparency and more than 8 bits per channel."""
    stored = load_image(path)
    image = orient(stored.image, UPRIGHT, stored.orientation)
    if is_deep(image.mode) or (image.mode in ("RGBA", "LA") and image.getextrema()[-1] != (255, 255)):
        raise DatasetError(
            f"{path} is not an opaque image of 8 bits (mode {image.mode}). Fix: save it without transparency, as 8 bits"
        )
    return image, stored.format


def _gif_values(image: Image.Image) -> np.ndarray:
    """Return the palette indices of a GIF, or the grey values if all used colours are grey."""
    indices = np.array(image)
    palette = np.array(image.getpalette("RGB"), dtype=np.uint8).reshape(-1, 3)
    used = palette[np.unique(indices)]
    return palette[:, 0][indices] if (used == used[:, :1]).all() else indices


def as_grey(image: Image.Image) -> np.ndarray | None:
    """Return the grey values (H, W) uint8 of an opaque image whose channels are equal, else None."""
    if image.mode not in ("L", "RGB", "RGBA", "LA"):
        return None
    first, *others = map(np.array, image.split())
    if image.mode in ("RGBA", "LA") and (others.pop() != 255).any():  # values under transparency have no meaning
        return None
    return first if all(np.array_equal(first, other) for other in others) else None


def _to_uint8(mask: np.ndarray, path: Path) -> np.ndarray:
    """Return a mask of 16-bit, 32-bit or float values as uint8 if its values allow it."""
    low, high = mask.min(), mask.max()
    if not (low >= 0 and high <= 255 and (mask == np.floor(mask)).all()):
        raise DatasetError(
            f"{path} holds labels from {low:g} to {high:g}. Fix: save class indices, whole numbers in 0..255"
        )
    return mask.astype(np.uint8)
