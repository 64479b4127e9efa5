"""Read and write arrays of any size: NumPy, NIfTI and TIFF. Large arrays are mapped to temporary files.

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
from PIL import Image

from configs.errors import UserError
from configs.files import temporary_file
from datasets.decode import UPRIGHT, load_image, orient

SUFFIXES = (".npy", ".npz", ".nii.gz", ".nii", ".tif", ".tiff")
LABEL_SUFFIXES = (*SUFFIXES, ".png")
PICTURES = (".png", ".bmp")
NIFTI = (".nii", ".nii.gz")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
IN_MEMORY = 64 << 20  # larger arrays, in bytes, are in a temporary file
_MAX_GZIP_RATIO = 1100  # gzip compresses by at most 1032
_USUAL_KEYS = ("probabilities", "softmax", "probs", "logits")


def suffix_of(path: Path, suffixes: Sequence[str] = SUFFIXES) -> str:
    """Return the suffix of a file name, ``.nii.gz`` as one; empty if it is not among ``suffixes``."""
    return next((s for s in suffixes if path.name.lower().endswith(s)), "")


def scratch(shape: Sequence[int], dtype: Any, folder: Path, limit: int | None = None) -> np.ndarray:
    """Return zeros: in memory up to ``limit`` bytes (default: `IN_MEMORY`), else mapped to a temporary file.

    Raises:
        OSError: the disk of ``folder`` has too little space.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size <= (IN_MEMORY if limit is None else limit):
        return np.zeros(shape, dtype)
    _require_space(folder, size)
    with tempfile.TemporaryFile(dir=folder) as file:  # the mapping outlives the name of the file
        file.truncate(size)
        return np.memmap(file, dtype, "r+", shape=tuple(shape))


def _require_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{size >> 20} MiB are needed and {free >> 20} MiB are free", str(folder))


def read_array(path: Path, folder: Path, key: str | None = None) -> np.ndarray:
    """Read an array without holding a large one in memory.

    Args:
        path: a file with one of `LABEL_SUFFIXES`.
        folder: where temporary files go.
        key: the array of an .npz file that holds several.
    """
    suffix = suffix_of(path, LABEL_SUFFIXES)
    try:
        if suffix == ".npy":
            return np.load(path, mmap_mode="c", allow_pickle=False)
        if suffix == ".npz":
            return _read_npz(path, folder, key)
        if suffix in NIFTI:
            return _read_nifti(path, folder)
        if suffix in (".tif", ".tiff"):
            with require("tifffile", path).TiffFile(path) as file:
                series = file.series[0]
                return series.asarray(out=scratch(series.shape, series.dtype, folder))
        stored = load_image(path)
        return np.asarray(orient(stored.image, UPRIGHT, stored.orientation))
    except Exception as error:  # nibabel, tifffile, zipfile and numpy each raise classes of their own
        if isinstance(error, (UserError, MemoryError)) or getattr(error, "errno", None) in _DISK_FULL:
            raise
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
            problem = f"it has no array {key}" if key else "it is unclear which array to read"
            raise UserError(f"{path}: {problem}; arrays in it: {listed}. Fix: pass --key NAME, or save one array.")
        _require_space(folder, archive.getinfo(f"{name}.npy").file_size)
        return np.load(archive.extract(f"{name}.npy", temporary), mmap_mode="c", allow_pickle=False)


def _read_nifti(path: Path, folder: Path) -> np.ndarray:
    """Read a NIfTI file. In memory its last axis, which holds the classes or the slices, is the first one."""
    data = load_nifti(path, keep_file_open=True).dataobj  # reading parts in order decompresses a .gz once
    dtype = data.dtype if (data.slope, data.inter) == (1.0, 0.0) else np.dtype(np.float32)
    shape = data.shape
    # Checked before memory or disk space is used.
    if math.prod(shape) * data.dtype.itemsize > _MAX_GZIP_RATIO * path.stat().st_size:
        raise UserError(f"{path}: shape {shape} of its header is more than the file can hold. Fix: copy it again.")
    if len(shape) < 3:
        return np.asarray(data, dtype)
    spatial = shape[:3] if shape[3:-1] == (1,) else shape[:-1]
    parts = scratch((shape[-1], *spatial), dtype, folder)
    for index, part in enumerate(parts):
        part[...] = data[..., index].reshape(spatial)
    return np.moveaxis(parts, 0, -1)


def write_array(array: np.ndarray, path: Path, geometry: Any, key: str) -> None:
    """Write labels (*S) or masks (C, *S) in the format of the path's suffix; ``key`` names them in an .npz."""
    suffix = suffix_of(path, (*SUFFIXES, *PICTURES))
    with temporary_file(path) as temporary:
        if suffix == ".npy":
            np.save(temporary, array)
        elif suffix == ".npz":
            np.savez_compressed(temporary, **{key: array})  # type: ignore[arg-type]
        elif suffix in PICTURES:
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
        if self.reversed:
            array = array.T
        elif has_classes:
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
