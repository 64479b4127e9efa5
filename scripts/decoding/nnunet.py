"""Read what nnU-Net writes next to the probabilities ``<case>.npz``: properties ``<case>.pkl``, and its segmentation.

A pickle may come from anywhere and can run code. Only containers, numbers, and arrays of numbers are read here. No
class that the file names is created. NumPy's own unpickling is not used either: a malicious file could make it treat
bytes as the addresses of objects.
"""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.files import read_bytes
from scripts.decoding.arrays import NIFTI, PICTURES, Geometry, read_geometry

_MAX_PICKLE = 16 << 20


def is_export(path: Path) -> bool:
    """Whether a file is nnU-Net's ``<case>.npz``."""
    return path.suffix == ".npz" and path.is_file() and path.with_suffix(".pkl").is_file()


def geometry_of(probabilities: Path) -> Geometry | None:
    """Return the geometry of ``<case>.npz``, from ``<case>.pkl`` or the segmentation.

    None if neither has a geometry, as for photographs.
    """
    affine = _affine(_read_properties(probabilities.with_suffix(".pkl")))
    paths = (probabilities.with_suffix(suffix) for suffix in NIFTI)
    segmentation = next((path for path in paths if path.is_file()), None)
    if segmentation is not None:
        found = read_geometry(segmentation)
        if affine is None or np.allclose(found.affine, affine, atol=1e-3):
            return Geometry(found.affine, found.header, reversed=True)
    return None if affine is None else Geometry(affine, None, reversed=True)


def picture_suffix(probabilities: Path) -> str:
    """Return the suffix of the segmentation if it is not a NIfTI file, else ''."""
    suffixes = (*PICTURES, ".tif", ".tiff")
    return next((suffix for suffix in suffixes if probabilities.with_suffix(suffix).is_file()), "")


def _read_properties(path: Path) -> dict[str, Any]:
    """Read nnU-Net's properties of a case; empty if there are none."""
    if not path.is_file():
        return {}
    try:
        content = PlainUnpickler(io.BytesIO(read_bytes(path, _MAX_PICKLE))).load()
        if not isinstance(content, dict):
            raise TypeError(f"it holds a {type(content).__name__}, not a dict")
        return content
    except Exception as error:  # a damaged pickle may raise nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{path}: not the properties that nnU-Net writes ({reason}); nothing in it was run. "
            "Fix: remove the file; the segmentation <case>.nii.gz gives the geometry too."
        ) from error


def _affine(properties: dict[str, Any]) -> np.ndarray | None:
    """Return the affine that nnU-Net's SimpleITK or nibabel reader stored; None if there is none."""
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


class _DType:
    """The dtype of a pickled array, in place of NumPy's own, which could be made to read bytes as addresses."""

    def __init__(self, code: str, *_: Any) -> None:
        self.dtype = np.dtype(code) if re.fullmatch(r"[biufc][0-9]+", code) else None  # None: not read

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype and self.dtype.newbyteorder("=" if state[1] == "|" else state[1])

    def read(self, data: bytes) -> np.ndarray:
        return np.empty(0) if self.dtype is None else np.frombuffer(data, self.dtype)


class _Array:
    """A pickled array of numbers."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        values = dtype.read(data)
        self.values = values if dtype.dtype is None else values.reshape(shape, order="CF"[fortran])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)


def _scalar(dtype: _DType, data: bytes) -> Any:
    return None if dtype.dtype is None else dtype.read(data)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """Convert text to bytes, as older pickles store arrays. Other encodings than latin1 could enlarge the data."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it names the encoding {encoding}")
    return text.encode("latin1")


_SAFE: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")},
    **{(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")},
    ("numpy", "ndarray"): None,  # an argument of _reconstruct
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): dict,
}


class PlainUnpickler(pickle.Unpickler):
    """Unpickle data only: the file can call the functions in `_SAFE` and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _SAFE[module, name]
