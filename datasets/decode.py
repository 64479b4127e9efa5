"""Files to arrays: RGB images and index masks, with what is refused and how to mend it.

Arrays are (H, W, 3) and (H, W) uint8. Decoding is Pillow's, as in the paper's experiments.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .errors import DatasetError

EXIF_ORIENTATION = 0x0112
DEEP_MODES = ("I", "F")  # and every "I;16..."; 8 bits cannot hold them


def is_deep(mode: str) -> bool:
    """Whether Pillow's mode holds more than 8 bits a channel."""
    return mode in DEEP_MODES or mode.startswith("I;")


def open_image(path: Path) -> Image.Image:
    """Open a file without decoding its pixels.

    Raises DatasetError where it is missing or no image.
    """
    try:
        return Image.open(path)
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing: restore it, or take its name out of the split") from None
    except UnidentifiedImageError:
        raise DatasetError(f"{path} is not an image: fetch it again") from None
    except Image.DecompressionBombError as error:
        size = re.search(r"\d+ pixels", str(error))
        raise DatasetError(
            f"{path} claims to have {size[0] if size else 'too many pixels'}: fetch it again, or cut it into tiles"
        ) from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be opened ({error}): check the disk and its permissions") from None


def load(image: Image.Image, path: Path) -> Image.Image:
    """Decode the pixels.

    Raises DatasetError where the file is cut short or damaged.
    """
    try:
        image.load()
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's ways to say that it is damaged
        raise DatasetError(f"{path} is damaged ({error}): fetch it again") from None
    return image


def orient(image: Image.Image, path: Path, mask_size: tuple[int, int] | None) -> Image.Image:
    """Undo an EXIF rotation where the mask's size proves that the mask was drawn on the rotated image.

    A camera's rotation flag is honoured by viewers and ignored by most training code, so only the mask
    can tell. Where its size cannot (half turns, mirrors, square images), guessing would train on a mask that
    lies beside its object: raises DatasetError instead.
    """
    orientation = image.getexif().get(EXIF_ORIENTATION, 1)
    if orientation in (0, 1):
        return image
    turned = image.size[::-1]
    if orientation in (5, 6, 7, 8) and image.size != turned and mask_size is not None:
        return ImageOps.exif_transpose(image) if mask_size == turned else image
    raise DatasetError(
        f"{path} carries EXIF orientation {orientation} and its mask does not tell whether to apply it: "
        "store the pixels upright (mogrify -auto-orient) or remove the tag (exiftool -Orientation=)"
    )


def decode_image(path: Path, mask_size: tuple[int, int] | None = None) -> np.ndarray:
    """Return an image as (H, W, 3) uint8 RGB; grey, palette, alpha and CMYK are converted.

    `mask_size` is the (width, height) of its mask, which decides about an EXIF rotation.

    Raises DatasetError for damaged files and for more than 8 bits of grey, where no window is known.
    """
    image = load(open_image(path), path)
    if is_deep(image.mode):
        raise DatasetError(
            f"{path} has more than 8 bits a pixel (mode {image.mode}): choose a window and save it as 8 bits"
        )
    image = orient(image, path, mask_size)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_mask(path: Path) -> np.ndarray:
    """Return a mask's indices (H, W) uint8: palette indices, never palette colours.

    Grey saved as RGB is grey. Raises DatasetError for colours and for indices beyond 255.
    """
    image = load(open_image(path), path)
    if image.mode in ("L", "P"):
        return np.array(image)
    if image.mode == "1":
        return np.array(image, dtype=np.uint8)
    if is_deep(image.mode) and image.mode != "F":
        return narrow(np.array(image), path)
    grey = as_grey(image)
    if grey is not None:
        return grey
    raise DatasetError(
        f"{path} is a colour mask (mode {image.mode}) where class indices are needed: "
        "save it as a grey PNG of indices, or say rgb_masks: true in a folder's classes.yaml"
    )


def as_grey(image: Image.Image) -> np.ndarray | None:
    """Return the one channel (H, W) uint8 that an opaque picture with equal channels repeats, or None."""
    if image.mode not in ("RGB", "RGBA", "LA"):
        return None
    *colours, last = image.split()
    if image.mode == "RGB":
        colours.append(last)
    elif last.getextrema() != (255, 255):  # what lies under transparency was meant otherwise
        return None
    first, *others = map(np.array, colours)
    return first if all(np.array_equal(first, other) for other in others) else None


def narrow(mask: np.ndarray, path: Path) -> np.ndarray:
    """Return a 16- or 32-bit mask as uint8 where its indices allow it."""
    low, high = int(mask.min()), int(mask.max())
    if low < 0 or high > 255:
        raise DatasetError(f"{path} holds labels {low}..{high}: class indices lie in 0..255, 255 being void")
    return mask.astype(np.uint8)
