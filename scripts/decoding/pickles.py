"""Read the pickles that nnU-Net writes, which may come from anywhere: containers, numbers, and arrays of numbers.

Neither Python nor NumPy makes an object that the file names. NumPy's own constructors would make an array of objects of
any bytes, and read them as addresses.
"""

from __future__ import annotations

import pickle
import re
from typing import Any

import numpy as np


class _DType:
    """The dtype of a pickled array. NumPy's own would let the file's bytes be read as addresses of objects."""

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
        self.values = dtype.read(data) if dtype.dtype is None else dtype.read(data).reshape(shape, order="CF"[fortran])

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return np.array(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)


def _scalar(dtype: _DType, data: bytes) -> Any:
    return None if dtype.dtype is None else dtype.read(data)[0]


def _latin1(text: str, encoding: str) -> bytes:
    """Encode the bytes of an array in an older pickle; other encodings could multiply their length."""
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
    """Unpickle data only: nothing in the file can name a function to call but those of `_SAFE`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _SAFE:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return _SAFE[module, name]
