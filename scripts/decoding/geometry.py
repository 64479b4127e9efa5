"""Where an array is in space: NIfTI affines and headers, and what nnU-Net writes next to its probabilities.

Shapes: C classes, (X, Y, Z) the axes of a NIfTI file.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from scripts.decoding.arrays import PICTURES, load_nifti, require

_MAX_PICKLE = 16 << 20
_SAFE = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    ("collections", "OrderedDict"),
}


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


class _PlainUnpickler(pickle.Unpickler):
    """Unpickle data only: nothing in the file can name a function to call but NumPy's own constructors."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _read_properties(path: Path) -> dict[str, Any]:
    """Read nnU-Net's properties of a case; empty if there are none."""
    if not path.is_file():
        return {}
    reason = f"it has more than {_MAX_PICKLE >> 20} MiB"
    if path.stat().st_size <= _MAX_PICKLE:
        try:
            with path.open("rb") as file:
                content = _PlainUnpickler(file).load()
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
