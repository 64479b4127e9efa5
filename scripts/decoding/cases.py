"""Find cases and load one: probabilities, its labels, its field of view and its geometry.

Shapes: C classes, *S spatial axes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from rankseg.calibration import Calibration
from scripts.decoding.arrays import LABEL_SUFFIXES, SUFFIXES, load_nifti, nibabel, read_array, scratch, suffix_of
from scripts.decoding.geometry import Geometry, nnunet_geometry, nnunet_picture, read_geometry
from trainers.forward import ToProbs
from trainers.losses import Link

SLAB = 1 << 22  # values that are converted or counted at once
_NIFTI = (".nii", ".nii.gz")
_SMALLEST = 2**-24  # in place of a probability of 0 or 1, whose logit is infinite; float16 holds no smaller number
_SUM = 0.02  # how far the probabilities of a pixel may be from 1 in sum


@dataclass(frozen=True)
class FromStored:
    """Turn arrays (N, C, *S) as they are stored into probabilities.

    Attributes:
        link: "softmax" or "sigmoid" if they are logits; None if they are probabilities.
        calibration: divides the logits if it is a number; a `Calibration` has a temperature and a bias per class.
        foreground_only: the background has no channel, so the probabilities of a pixel need not add to 1.
    """

    link: str | None = None
    calibration: float | Calibration = 1.0
    foreground_only: bool = False

    @property
    def changes(self) -> bool:
        """Whether probabilities differ from what is stored."""
        return self.link is not None or isinstance(self.calibration, Calibration) or self.calibration != 1

    def link_of(self, classes: int) -> Link:
        """Return the link of logits, or the one that probabilities of so many channels come from."""
        return cast(Link, self.link or ("sigmoid" if classes == 1 or self.foreground_only else "softmax"))

    def logits(self, values: Tensor) -> Tensor:
        """Return finite logits (N, C, *S) float32 of stored values.

        Raises:
            UserError: they are probabilities of a softmax that do not add to 1.
        """
        if self.link is not None:
            return values.float()
        if self.link_of(values.shape[1]) == "sigmoid":
            return values.float().logit(eps=_SMALLEST)
        total = values.float().sum(1)
        if not ((total == 0) | ((total - 1).abs() < _SUM)).all():  # 0: outside a crop
            raise UserError(
                "its probabilities change with the calibration, but those of a pixel do not add to 1. "
                "Fix: save logits and pass --link sigmoid, or pass --foreground-only."
            )
        return values.float().clamp(min=_SMALLEST).log()

    def __call__(self, values: Tensor) -> Tensor:
        """Return probabilities (N, C, *S); 0 where all probabilities are 0, as outside a crop."""
        if not self.changes:
            return values
        probs = ToProbs(self.link_of(values.shape[1]), self.calibration)(self.logits(values))
        if self.link is None:
            return probs.masked_fill((values == 0).all(1, keepdim=True), 0)
        return probs.nan_to_num(0)  # logits of -inf: outside the field of view


@dataclass(frozen=True)
class Reading:
    """How files are read.

    Attributes:
        scratch: folder of temporary files.
        values: what the files hold, and how it becomes probabilities.
        axis: which axis of the array holds the classes: "auto", "first", "last" or "none".
        key: the array in .npz files.
        void: label value of pixels that are not scored.
        as_stored: whether to leave logits, and probabilities before a calibration, as they are.
    """

    scratch: Path
    values: FromStored = FromStored()
    axis: str = "auto"
    key: str | None = None
    void: int = 255
    as_stored: bool = False


@dataclass(frozen=True)
class Case:
    """One case: `probs` (C, *S), `labels` and `valid` (*S), or None if they were not asked for.

    ``suffix`` is that of the files that are written: of masks and of label maps.
    """

    probs: Tensor
    labels: np.ndarray | None
    valid: np.ndarray | None
    geometry: Geometry | None
    suffix: tuple[str, str]


def find_cases(folder: Path, suffixes: tuple[str, ...] = SUFFIXES) -> dict[str, Path]:
    """Return case name -> file: the path below the folder without its suffix.

    nnU-Net's ``<case>.npz`` with ``<case>.pkl`` is the case; a segmentation of the same name is not.

    Raises:
        FileNotFoundError: the folder does not exist.
        UserError: it holds no such file, or two files of one name.
    """
    if not folder.exists():
        raise FileNotFoundError(2, "no such file or folder", str(folder))
    files = [folder] if folder.is_file() else sorted(p for p in folder.rglob("*") if p.is_file() or p.is_symlink())
    found: dict[str, Path] = {}
    for path in files:
        suffix = suffix_of(path, suffixes)
        if suffix and not path.exists():
            raise UserError(f"{path}: a link to a file that does not exist. Fix: restore the file or the link.")
        inside = Path(path.name) if folder.is_file() else path.relative_to(folder)
        if not suffix or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.as_posix()[: -len(suffix)]
        stem = Path(name).name
        if suffix != ".npz" and all(path.with_name(stem + s).is_file() for s in (".npz", ".pkl")):
            continue
        if name in found:
            raise UserError(f"{found[name]} and {path} are both case {name}. Fix: remove or rename one.")
        found[name] = path
    if not found:
        raise UserError(f"{folder} holds no array ({' '.join(suffixes)}). Fix: give the folder of the arrays.")
    return found


def load_case(path: Path, labels: Path | None, valid: Path | None, how: Reading) -> Case:
    """Load a case; large arrays stay in files.

    Raises:
        UserError: names the file and what is wrong with it.
    """
    geometry, masks = None, suffix_of(path)
    labels_suffix = masks
    if masks in _NIFTI:
        geometry = read_geometry(path)
    elif path.name.endswith(".npz") and path.with_name(path.name[:-4] + ".pkl").is_file():
        geometry = nnunet_geometry(path)
        masks = ".npz" if geometry is None else ".nii.gz"
        labels_suffix = (nnunet_picture(path) or masks) if geometry is None else masks
    array = read_array(path, how.scratch, how.key, classes_last=how.axis in ("auto", "last"))
    if not array.size:
        raise UserError(f"{path}: shape {array.shape} holds no value. Fix: write the file again.")
    whole_logits = how.values.link is not None and np.issubdtype(array.dtype, np.integer)
    if not (whole_logits or np.issubdtype(array.dtype, np.floating)) or array.dtype.itemsize > 8:
        raise UserError(
            f"{path}: its values are {array.dtype}, not probabilities. Fix: save float16, float32 or float64 values, "
            "or logits with --link."
        )
    truth = None if labels is None else _read_labels(labels, how, geometry)
    inside = None if valid is None else _read_labels(valid, how, geometry)
    known = next((a.shape for a in (truth, inside) if a is not None), None)
    axis = _class_axis(path, array, known, how)
    array = np.moveaxis(array, -1, 0) if axis == "last" else array[None] if axis == "none" else array
    truth, inside = (
        None if a is None else _fit(a, array.shape[1:], p, path) for a, p in ((truth, labels), (inside, valid))
    )
    if inside is not None:
        inside = inside != 0
    probs = _as_probs(path, array, inside, how)
    return Case(probs, truth, inside, geometry, (masks, labels_suffix))


def _class_axis(path: Path, array: np.ndarray, known: tuple[int, ...] | None, how: Reading) -> str:
    """Return which axis holds the classes: "first", "last" or "none"."""
    if how.axis == "none" or array.ndim == 2:
        return "none"
    if array.ndim < 2:
        raise UserError(f"{path}: shape {array.shape} is not a map. Fix: save (C, *S) or (*S, C).")
    if suffix_of(path) in _NIFTI:  # the reader moved the last of four axes to the front
        if array.ndim > 3:
            return "first"
        return "none" if how.axis == "auto" else how.axis
    if how.axis != "auto":
        return how.axis
    if path.with_name(path.name.removesuffix(".npz") + ".pkl").is_file() and path.suffix == ".npz":
        return "first"  # nnU-Net's
    shapes = {"none": array.shape, "first": array.shape[1:], "last": array.shape[:-1]}
    if known is not None:
        fits = [name for name, shape in shapes.items() if _squeezed(shape) == _squeezed(known)]
        fits = fits or [name for name, shape in shapes.items() if _squeezed(shape) == _squeezed(known)[::-1]]
        if fits == ["none"] and _sums_to_one(array, 0):
            raise UserError(
                f"{path}: the labels have its shape {array.shape}, with an axis for the classes. "
                "Fix: save one integer per pixel as labels, or pass --classes-axis none."
            )
        if len(fits) == 1:
            return fits[0]
    if how.values.link is None:
        fits = [name for name, index in (("first", 0), ("last", -1)) if _sums_to_one(array, index)]
        if len(fits) == 1:
            return fits[0]
    raise UserError(
        f"{path}: which axis of shape {array.shape} holds the classes is unclear. "
        "Fix: pass --classes-axis first, last or none."
    )


def _sums_to_one(array: np.ndarray, axis: int) -> bool:
    """Whether the values of each pixel add to 1 over an axis, on a sample of the pixels."""
    if array.shape[axis] < 2:
        return False
    steps = [slice(None, None, max(1, size // 24)) for size in array.shape]
    steps[axis] = slice(None)
    sums = np.asarray(array[tuple(steps)], np.float64).sum(axis)
    inside = sums[sums > 0]  # a map may be 0 outside a crop
    return bool(inside.size) and bool(np.abs(inside - 1).max() < _SUM)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _read_labels(path: Path, how: Reading, geometry: Geometry | None) -> np.ndarray:
    """Read integer labels (*S), with the axes of the probabilities if both files say where they are."""
    array = read_array(path, how.scratch)
    if suffix_of(path, LABEL_SUFFIXES) in _NIFTI:
        array = _aligned(path, array, geometry)
    if np.issubdtype(array.dtype, np.floating):
        whole = array.astype(np.int32)
        if not np.array_equal(whole, array):
            raise UserError(f"{path}: labels are not integers. Fix: save one integer per pixel.")
        return whole
    if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"{path}: labels are {array.dtype}. Fix: save one integer per pixel.")
    return array


def _aligned(path: Path, array: np.ndarray, geometry: Geometry | None) -> np.ndarray:
    """Turn NIfTI labels to the axes of the probabilities, and check that both are in the same place."""
    if geometry is None:
        return array
    nib = nibabel(path)
    affine = load_nifti(path).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(geometry.affine))
    turned = affine @ nib.orientations.inv_ornt_aff(turn, array.shape[:3])
    if not np.allclose(turned, geometry.affine, atol=1e-3, rtol=1e-4):
        raise UserError(
            f"{path}: another affine than the probabilities have, {_text(affine)} and {_text(geometry.affine)}. "
            "Fix: resample one of them to the other, or correct the header."
        )
    array = nib.orientations.apply_orientation(array, turn)
    return array.T if geometry.reversed else array


def _text(affine: np.ndarray) -> str:
    return str(np.round(affine[:3], 3).tolist())


def _fit(labels: np.ndarray, shape: tuple[int, ...], path: Path, probs: Path) -> np.ndarray:
    """Return labels with the shape of the probabilities: axes of size 1 may differ, or their order be reversed."""
    if _squeezed(labels.shape) == _squeezed(shape):
        return labels.reshape(shape)
    if _squeezed(labels.shape)[::-1] == _squeezed(shape):
        return labels.T.reshape(shape)
    raise UserError(
        f"{path}: shape {labels.shape} does not fit {probs} with spatial shape {shape}. "
        "Fix: save both at the same size, or pass --classes-axis."
    )


def slabs(shape: tuple[int, ...], depth: int = 1) -> Iterator[slice]:
    """Yield slices of the first spatial axis that hold about `SLAB` values of ``depth`` classes."""
    step = max(1, SLAB // max(1, depth * int(np.prod(shape[1:], dtype=np.int64))))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def _as_probs(path: Path, array: np.ndarray, inside: np.ndarray | None, how: Reading) -> Tensor:
    """Return probabilities (C, *S), each class contiguous; a file that has this layout is not copied.

    Pixels outside the field of view get probability 0, which changes no rule's result inside.
    """
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype(np.float32)  # integer logits
    change = how.values.changes and not how.as_stored
    logits = how.values.link is not None
    if inside is None and array.flags.c_contiguous and array.dtype == dtype and not change:
        out = array
    else:
        out = scratch(array.shape, np.float32 if change else dtype, how.scratch)
    outside = -np.inf if logits and not change else 0
    low, high = np.inf, -np.inf
    for part in slabs(array.shape[1:], len(array)):
        values = np.ascontiguousarray(array[:, part], dtype)
        low, high = min(low, values.min(initial=np.inf)), max(high, values.max(initial=-np.inf))
        if np.isnan(values).any():
            raise UserError(f"{path}: holds NaN. Fix: look for an overflow in the network.")
        if out is array:
            continue
        if change:
            _check_range(path, low, high, dtype, logits)
            with named(path):
                values = how.values(torch.from_numpy(values)[None])[0].numpy()
        out[:, part] = values if inside is None else np.where(inside[part], values, outside)
    _check_range(path, low, high, dtype, logits)
    return torch.from_numpy(np.asarray(out))


def _check_range(path: Path, low: float, high: float, dtype: np.dtype, logits: bool) -> None:
    """Raise UserError for values that are infinite, or outside of [0, 1] if they are not logits."""
    slack = 2e-3 if dtype == np.float16 else 1e-5  # what rounding alone explains
    if not np.isfinite([low, high]).all():
        raise UserError(f"{path}: values in [{low:g}, {high:g}]. Fix: look for an overflow in the network.")
    if not logits and not (low >= -slack and high <= 1 + slack):
        raise UserError(
            f"{path}: values in [{low:.6g}, {high:.6g}] are not probabilities. "
            "Fix: pass --link softmax or --link sigmoid if they are logits."
        )


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Add a path to the ValueError of a rule, of labels or of a calibration."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
