"""Read and write arrays of any size, and where they are in space.

The formats are NumPy, NIfTI and TIFF; large arrays are mapped to temporary files. The place of a NIfTI file is its
affine and header; that of nnU-Net's probabilities is in the files next to them.

Shapes: C classes, *S spatial axes; (X, Y, Z) the axes of a NIfTI file.
"""

from __future__ import annotations

import errno
import math
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import temporary_file
from datasets.decode import UPRIGHT, load_image, orient
from scripts.decoding.pickles import PlainUnpickler

SUFFIXES = (".npy", ".npz", ".nii.gz", ".nii", ".tif", ".tiff")
LABEL_SUFFIXES = (*SUFFIXES, ".png")
PICTURES = (".png", ".bmp")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
IN_MEMORY = 64 << 20  # bytes of an array above which it lives in a temporary file
_MOST_PACKED = 1100  # bytes that gzip makes of one at most, rounded up
_USUAL_KEYS = ("probabilities", "softmax", "probs", "logits")
_MAX_PICKLE = 16 << 20


def suffix_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """Return the suffix of a file name, ``.nii.gz`` as one; empty if it is not among ``suffixes``."""
    return next((s for s in suffixes if path.name.lower().endswith(s)), "")


def scratch(shape: Sequence[int], dtype: Any, folder: Path) -> np.ndarray:
    """Return an uninitialised array: in memory if it is small, else mapped to a temporary file in ``folder``.

    Raises:
        OSError: the disk has too little space.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= IN_MEMORY:
        return np.empty(shape, dtype)
    _require_space(folder, size)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the name of the file
        file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=tuple(shape))


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size >> 20} MiB are needed and {free >> 20} MiB are free", str(folder))


def read_array(path: Path, folder: Path, key: str | None = None, classes_last: bool = False) -> np.ndarray:
    """Read an array without holding a large one in memory.

    Args:
        path: a file with one of `LABEL_SUFFIXES`.
        folder: where temporary files go.
        key: the array of an .npz file that holds several.
        classes_last: read the last axis of a NIfTI file of more than 3 axes as the first one, class by class.
    """
    suffix = suffix_of(path, LABEL_SUFFIXES)
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="c", allow_pickle=False)
        if suffix == ".npz":
            return _read_npz(path, folder, key)
        if suffix in (".nii", ".nii.gz"):
            return _read_nifti(path, folder, classes_last)
        if suffix in (".tif", ".tiff"):
            with require("tifffile", path).TiffFile(path) as file:
                series = file.series[0]
                return series.asarray(out=scratch(series.shape, series.dtype, folder))
        stored = load_image(path)
        return np.asarray(orient(stored.image, UPRIGHT, stored.orientation))
    except (UserError, MemoryError):
        raise
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise
        raise _damaged(path, error) from error
    except Exception as error:  # nibabel, tifffile, zipfile and numpy each raise classes of their own
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return UserError(f"{path}: cannot be read ({reason}). Fix: write or copy the file again.")


def require(package: str, path: Path) -> Any:
    """Import a package, or raise UserError that names the file which needs it."""
    try:
        return __import__(package)
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: needs the package {package}, which is missing. Fix: pip install {package}") from error


def load_nifti(path: Path, **options: Any) -> Any:
    """Open a NIfTI file; its values are read later."""
    nib = require("nibabel", path)
    try:
        return nib.load(path, **options)
    except (OSError, ValueError, EOFError, nib.filebasedimages.ImageFileError) as error:
        raise _damaged(path, error) from error


def _read_npz(path: Path, folder: Path, key: str | None) -> np.ndarray:
    """Map one array of an .npz file, unpacked into a temporary file; numpy.load would hold all of it in memory."""
    scratch_folder = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)  # Windows keeps a mapped file
    with zipfile.ZipFile(path) as archive, scratch_folder as temporary:
        keys = [name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy")]
        usual = [name for name in _USUAL_KEYS if name in keys]
        name = key or (keys[0] if len(keys) == 1 else usual[0] if len(usual) == 1 else None)
        if name is None or name not in keys:
            listed = ", ".join(keys) or "none"
            raise UserError(f"{path}: array {key or 'unclear'}; arrays in it: {listed}. Fix: pass --key NAME.")
        _require_space(folder, archive.getinfo(f"{name}.npy").file_size)
        return np.load(archive.extract(f"{name}.npy", temporary), mmap_mode="c", allow_pickle=False)


def _read_nifti(path: Path, folder: Path, classes_last: bool) -> np.ndarray:
    data = load_nifti(path, keep_file_open=True).dataobj  # class after class is one pass through a .gz
    dtype = data.dtype if (data.slope, data.inter) == (1.0, 0.0) else np.dtype(np.float32)
    shape = data.shape
    if math.prod(shape) * data.dtype.itemsize > _MOST_PACKED * path.stat().st_size:  # before memory or disk is taken
        raise UserError(f"{path}: its header claims the shape {shape}, more than the file holds. Fix: copy it again.")
    if len(shape) < 3:
        return np.asarray(data, dtype)
    if classes_last and len(shape) > 3:
        spatial = shape[:3] if len(shape) == 4 or shape[3] == 1 else shape[:-1]
        array = parts = scratch((shape[-1], *spatial), dtype, folder)
    else:
        array = scratch(shape[::-1], dtype, folder).T  # in the order of the file
        parts = np.moveaxis(array, -1, 0)
    for index, part in enumerate(parts):
        part[...] = data[..., index].reshape(part.shape)
    return array


def write_array(array: np.ndarray, path: Path, geometry: Any, key: str) -> None:
    """Write labels (*S) or masks (C, *S) in the format of the path's suffix; ``key`` names them in an .npz."""
    suffix = suffix_of(path, (*SUFFIXES, *PICTURES))
    with temporary_file(path) as temporary:
        if suffix == ".npy":
            with temporary.open("wb") as file:
                np.save(file, array)
        elif suffix == ".npz":
            with temporary.open("wb") as file:
                np.savez_compressed(file, **{key: array})
        elif suffix in PICTURES:
            from PIL import Image

            if array.dtype != np.uint8 and (array.dtype != np.uint16 or suffix == ".bmp"):
                raise UserError(
                    f"{path}: a picture cannot hold labels such as {array.min()}, {array.max()}. "
                    "Fix: pass another --unassigned."
                )
            Image.fromarray(array.reshape(array.shape[-2:])).save(temporary, suffix[1:])
        elif suffix in (".tif", ".tiff"):
            pixels = array.view(np.uint8) if array.dtype == bool else array
            require("tifffile", path).imwrite(temporary, pixels, photometric="minisblack", compression=None)
        else:
            geometry.save(array, temporary, has_classes=key == "masks")


@dataclass(frozen=True)
class Geometry:
    """Affine and header of a volume. ``reversed``: the array's spatial axes are (Z, Y, X), as nnU-Net's are."""

    affine: np.ndarray
    header: Any
    reversed: bool = False

    def save(self, array: np.ndarray, path: Path, has_classes: bool) -> None:
        """Write labels or, with the classes as last axis, masks, with this affine and header."""
        nib = require("nibabel", path)
        spatial = array.ndim - has_classes
        if self.reversed:
            order = range(spatial)[::-1]
            array = array.transpose(*([0] if has_classes else []), *(k + has_classes for k in order))
        if has_classes:
            array = np.moveaxis(array, 0, -1)
        if array.dtype == bool:
            array = array.view(np.uint8)
        image = nib.Nifti1Image(array, None if self.header is None else self.affine, self.header)
        image.set_data_dtype(array.dtype)
        image.header.set_slope_inter(1, 0)
        if self.header is None:
            image.set_sform(self.affine, 2)
            image.set_qform(self.affine, 1)
        image.header["cal_min"], image.header["cal_max"] = 0, 0
        nib.save(image, path)


def read_geometry(path: Path) -> Geometry:
    """Read the affine and the header of a NIfTI file."""
    image = load_nifti(path)
    if not np.isfinite(image.affine).all():
        raise UserError(f"{path}: its affine holds NaN or infinity. Fix: correct the header.")
    return Geometry(image.affine, image.header)


def nnunet_geometry(probabilities: Path) -> Geometry | None:
    """Return the geometry of nnU-Net's ``<case>.npz``, from ``<case>.pkl`` or the segmentation next to it.

    None if neither is a volume, as for photographs. The .pkl may come from anywhere: only plain containers,
    numbers and NumPy arrays are read from it.
    """
    stem = probabilities.name.removesuffix(".npz")
    properties = _read_properties(probabilities.with_name(f"{stem}.pkl"))
    affine = _affine(properties)
    paths = (probabilities.with_name(stem + suffix) for suffix in (".nii.gz", ".nii"))
    segmentation = next((path for path in paths if path.is_file()), None)
    if segmentation is not None:
        found = read_geometry(segmentation)
        if affine is None or np.allclose(found.affine, affine, atol=1e-3):
            return Geometry(found.affine, found.header, reversed=True)
    return None if affine is None else Geometry(affine, None, reversed=True)


def nnunet_picture(probabilities: Path) -> str:
    """Return the suffix of nnU-Net's own segmentation next to ``<case>.npz`` if it is not a NIfTI file, else ''."""
    stem = probabilities.name.removesuffix(".npz")
    suffixes = (*PICTURES, ".tif", ".tiff")
    return next((s for s in suffixes if probabilities.with_name(stem + s).is_file()), "")


def _read_properties(path: Path) -> dict[str, Any]:
    """Read nnU-Net's properties of a case; empty if there are none."""
    if not path.is_file():
        return {}
    reason = f"it has more than {_MAX_PICKLE >> 20} MiB"
    if path.stat().st_size <= _MAX_PICKLE:
        try:
            with path.open("rb") as file:
                content = PlainUnpickler(file).load()
            if isinstance(content, dict):
                return content
            reason = f"it holds a {type(content).__name__}, not a dict"
        except Exception as error:  # a damaged pickle may raise nearly anything
            reason = " ".join(str(error).split()) or type(error).__name__
    raise UserError(
        f"{path}: not the properties that nnU-Net writes ({reason}); nothing in it was run. "
        "Fix: remove the file; the segmentation <case>.nii.gz gives the geometry too."
    )


def _affine(properties: dict[str, Any]) -> np.ndarray | None:
    """Return the affine that nnU-Net's SimpleITK and nibabel readers note."""
    try:
        if stuff := properties.get("nibabel_stuff"):
            return np.asarray(stuff.get("reoriented_affine", stuff["original_affine"]), float).reshape(4, 4)
        if stuff := properties.get("sitk_stuff"):
            count = len(stuff["spacing"])
            affine = np.eye(4)
            directions = np.asarray(stuff["direction"], float).reshape(count, count)
            affine[:count, :count] = directions * np.asarray(stuff["spacing"], float)
            affine[:count, 3] = np.asarray(stuff["origin"], float)
            return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine  # SimpleITK's axes point left and back
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    return None
