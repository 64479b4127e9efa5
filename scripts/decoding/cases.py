"""Find cases and load them: probabilities, labels, field of view and geometry.

``args`` is the command line of scripts/decode.py; temporary files are written to ``args.out``.

Shapes: C channels, *S spatial axes.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from datasets.decode import ImageFolder, visible_files
from rankseg.calibration import Calibration
from scripts.decoding import arrays, nnunet
from scripts.decoding.arrays import LABEL_SUFFIXES, NIFTI, SUFFIXES, Geometry, read_array, scratch, suffix_of
from trainers.forward import ToProbs
from trainers.losses import Link
from trainers.metrics import Scoring, Truth
from trainers.results import fingerprint

SLAB = 1 << 22  # values that are converted or counted at once
_KNOWN = (*LABEL_SUFFIXES, *arrays.PICTURES, ".pkl", ".json")  # other files are reported
_SMALLEST = 2**-24  # distance of probabilities from 0 and 1 before the logit, which is infinite there; least float16
_SUM = 0.02  # largest difference between 1 and the sum of the probabilities of a pixel


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
        """Return the link of the logits; for probabilities, the link that they usually come from."""
        return cast(Link, self.link or ("sigmoid" if classes == 1 or self.foreground_only else "softmax"))

    def logits(self, values: Tensor) -> Tensor:
        """Return logits (N, C, *S) float32 of stored values; those of probabilities are finite."""
        if self.link is not None:
            return values.float()
        if self.link_of(values.shape[1]) == "sigmoid":
            return values.float().logit(eps=_SMALLEST)
        total = values.float().sum(1)
        if not ((total == 0) | ((total - 1).abs() < _SUM)).all():  # 0: outside a crop
            raise UserError(
                "the calibration needs probabilities that add to 1 over the classes of a pixel, and these do not. "
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
class Case:
    """One case: its file ``path``, `probs` (C, *S), `labels` and `valid` (*S), or None if they were not asked for.

    Labels are void outside the field of view. ``first`` is the label of the first channel. ``suffixes`` are those of
    the files of masks and of label maps.
    """

    path: Path
    probs: Tensor
    first: int
    labels: np.ndarray | None
    valid: np.ndarray | None
    geometry: Geometry | None
    suffixes: tuple[str, str]


def find_cases(folder: Path, suffixes: Sequence[str], without: Path, notes: list[str]) -> dict[str, Path]:
    """Return case name -> file: the path below the folder without its suffix. Add a note about files that are not read.

    Linked folders are followed; hidden ones, and ``without``, are skipped. nnU-Net's ``<case>.npz`` with ``<case>.pkl``
    is the case; a segmentation of the same name is not.
    """
    if not folder.exists():
        raise FileNotFoundError(2, "no such file or folder", str(folder))
    files = sorted(visible_files(folder, True, without.resolve())) if folder.is_dir() else [folder]
    found: dict[str, Path] = {}
    for path in files:
        suffix = suffix_of(path, suffixes)
        if not suffix:
            continue
        if not path.is_file():  # a broken link; or a pipe, and opening it could wait for ever
            raise UserError(f"{path}: not a regular file, or a link to none. Fix: replace it by a file, or remove it.")
        bare = path.with_name(path.name[: -len(suffix)])
        if suffix != ".npz" and nnunet.is_export(bare.with_name(f"{bare.name}.npz")):
            continue
        name = bare.relative_to(folder).as_posix() if folder.is_dir() else bare.name
        if name in found:
            raise UserError(f"{found[name]} and {path} are both case {name}. Fix: remove or rename one.")
        found[name] = path
    if not found:
        raise UserError(f"{folder} holds no array ({' '.join(suffixes)}). Fix: give the folder of the arrays.")
    ignored = ImageFolder(ignored=[path for path in files if not suffix_of(path, _KNOWN)]).ignored_text
    notes += [f"files in {folder} that are not read: {ignored}"] if ignored else []
    return found


def without_background(truth: Truth) -> Truth:
    """Return the truth of the labels 1, 2, …"""
    return Truth(truth.onehot[:, 1:], truth.valid, truth.actual[:, 1:], truth.pixels)


class _ForegroundScoring(Scoring):
    """Channel c is label c + 1. Label 0, the background, has no channel."""

    def encode(self, targets: Tensor) -> Truth:
        labels = Scoring(self.num_classes + 1, (), self.ignore_index, self.void)
        return without_background(labels.encode(targets))


class Folder:
    """Cases with their labels and fields of view: load one, or iterate over all as over the batches of a data set.

    Without ``labels``, the batches have label 0 everywhere.

    Attributes:
        values: how what is stored becomes probabilities.
        notes: about files that are not read.
        failed: case name -> what is wrong with it; such a case is left out of the batches.
        linked_twice: the files whose values may be probabilities although --link takes them for logits.
    """

    def __init__(self, args: Namespace, probs: Path, labels: Path | None = None, valid: Path | None = None) -> None:
        self.args = args
        self.values = FromStored(args.link, args.temperature, args.foreground_only)
        self.notes: list[str] = []
        self.cases = find_cases(probs, SUFFIXES, args.out, self.notes)
        self.labels, self.valid = (
            find_cases(folder, LABEL_SUFFIXES, args.out, self.notes) if folder else None for folder in (labels, valid)
        )
        self.failed: dict[str, str] = {}
        self.linked_twice: set[Path] = set()
        self.num_images = len(self.cases)
        self._channels: int | None = None

    def __len__(self) -> int:
        return len(self.cases) - len(self.failed)

    @property
    def channels(self) -> int:
        """The number of channels of the first case that can be read."""
        if self._channels is None and next(iter(self), None) is None:
            raise UserError("no case can be read:", *self.failed.values())
        assert self._channels is not None
        return self._channels

    @property
    def first(self) -> int:
        """The label of the first channel."""
        return self._first(self.channels)

    def _first(self, channels: int) -> int:
        """Return 1 if label 0, the background, has no channel."""
        return int(channels == 1 or self.args.foreground_only)

    def scoring(self) -> Scoring:
        """Return the conventions, whose classes are the channels."""
        first, count, labels = self.first, self.channels, self.args.scored
        channels = tuple(c - first for c in labels or range(first, count + first))
        if not set(channels) <= set(range(count)):
            raise UserError(f"--scored {labels} is invalid: labels are {first} to {count - 1 + first}.")
        return (_ForegroundScoring if first else Scoring)(count, channels, self.args.void)

    def sources(self, name: str) -> list[list[Any]]:
        """Return path, size and time of change of the files that a case is made of."""
        groups = (self.cases, self.labels or {}, self.valid or {})
        paths = [group[name] for group in groups if name in group]
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]

    def fingerprint(self) -> str:
        """Return a hash of path, size and time of change of all files that are read."""
        return fingerprint({name: self.sources(name) for name in self.cases if name not in self.failed})

    checksum = fingerprint  # volumes are too large to read their contents for this

    def load(self, name: str, values: FromStored | None) -> Case:
        """Load a case; large arrays stay in files. ``values`` makes probabilities; None: they are left as stored."""
        path, args = self.cases[name], self.args
        geometry, suffixes = _read_place(path)
        labels, valid = (
            self._read_map(kind, group, name, geometry)
            for kind, group in (("label", self.labels), ("field of view", self.valid))
        )
        array = read_array(path, args.out, args.key)
        if not array.size:
            raise UserError(f"{path}: shape {array.shape} holds no value. Fix: write the file again.")
        integer_logits = args.link is not None and np.issubdtype(array.dtype, np.integer)
        if not (integer_logits or np.issubdtype(array.dtype, np.floating)) or array.dtype.itemsize > 8:
            raise UserError(
                f"{path}: its values are {array.dtype}, not probabilities. Fix: save float16, float32 or float64 "
                "values, or logits with --link."
            )
        axis = self._class_axis(path, array, next((m.shape for m in (labels, valid) if m is not None), None))
        array = np.moveaxis(array, -1, 0) if axis == "last" else array[None] if axis == "none" else array
        first = self._first(len(array))
        if valid is not None and self.valid:
            valid = _match_shape(valid, array.shape[1:], self.valid[name], path) != 0
        if labels is not None and self.labels:
            labels = _match_shape(labels, array.shape[1:], self.labels[name], path)
            labels = labels if valid is None else np.where(valid, labels, np.asarray(args.void, np.int64))
            _check_labels(self.labels[name], labels, len(array) + first, args.void)
        return Case(path, self._as_probs(path, array, valid, values), first, labels, valid, geometry, suffixes)

    def _read_map(
        self, kind: str, group: dict[str, Path] | None, name: str, geometry: Geometry | None
    ) -> np.ndarray | None:
        """Read integers (*S); if both files are NIfTI, in the orientation of the probabilities."""
        if group is None:
            return None
        if name not in group:
            raise UserError(f"{self.cases[name]}: no {kind} of this name. Fix: add it, or move the case away.")
        path = group[name]
        array = read_array(path, self.args.out)
        if geometry is not None and suffix_of(path, LABEL_SUFFIXES) in NIFTI:
            array = _align(path, array, geometry)
        if np.issubdtype(array.dtype, np.floating):
            rounded = array.astype(np.int32)
            if not np.array_equal(rounded, array):
                raise UserError(f"{path}: labels are not integers. Fix: save one integer per pixel.")
            return rounded
        if array.dtype != bool and not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path}: labels are {array.dtype}. Fix: save one integer per pixel.")
        return array

    def _class_axis(self, path: Path, array: np.ndarray, known: tuple[int, ...] | None) -> str:
        """Return which axis holds the classes, "first", "last" or "none"; ``known`` is the shape of any labels."""
        given, shape = self.args.classes_axis, array.shape
        if array.ndim < 2:
            raise UserError(f"{path}: shape {shape} has fewer than two axes. Fix: save (C, *S) or (*S, C).")
        if array.ndim == 2:
            return "none"
        if given != "auto":
            return given
        if suffix_of(path) in NIFTI:
            return "last" if array.ndim > 3 else "none"
        if nnunet.is_export(path):
            return "first"
        if known is not None:
            spatial = {"none": _squeeze(shape), "first": _squeeze(shape[1:]), "last": _squeeze(shape[:-1])}
            for expected in (_squeeze(known), _squeeze(known)[::-1]):
                fits = [axis for axis, sizes in spatial.items() if sizes == expected]
                if fits:
                    break
            if fits == ["none"] and _sums_to_one(array, 0):
                raise UserError(
                    f"{path}: the labels have its shape {shape}, with an axis for the classes. "
                    "Fix: save one integer per pixel as labels, or pass --classes-axis none."
                )
            if len(fits) == 1:
                return fits[0]
        if self.args.link is None:
            fits = [axis for axis, index in (("first", 0), ("last", -1)) if _sums_to_one(array, index)]
            if len(fits) == 1:
                return fits[0]
        raise UserError(
            f"{path}: which axis of shape {shape} holds the classes is unclear. "
            "Fix: pass --classes-axis first, last or none."
        )

    def _as_probs(self, path: Path, array: np.ndarray, valid: np.ndarray | None, values: FromStored | None) -> Tensor:
        """Return probabilities (C, *S), each class contiguous; a file that has this layout is not copied.

        Pixels outside the field of view get probability 0, which changes no rule's result inside.
        """
        dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype(np.float32)  # integer logits
        logits = self.args.link is not None
        change = values is not None and values.changes
        outside = -np.inf if logits and not change else 0
        out, in_unit_range = array, True
        if valid is not None or change or not array.flags.c_contiguous or array.dtype != dtype:
            out = scratch(array.shape, np.float32 if change else dtype, self.args.out)
        for part in slabs(array.shape[1:], len(array)):
            some = np.ascontiguousarray(array[:, part], dtype)
            in_unit_range &= _check_range(path, some, logits)
            if out is array:
                continue
            if values is not None and change:
                with name_case_in_errors(path):
                    some = values(torch.from_numpy(some)[None])[0].numpy()
            out[:, part] = some if valid is None else np.where(valid[part], some, outside)
        if logits and in_unit_range and (self.args.link == "sigmoid" or _sums_to_one(array, 0)):
            self.linked_twice.add(path)
        return torch.from_numpy(np.asarray(out))

    def __iter__(self) -> Iterator[SimpleNamespace]:
        """Yield a batch for each case, as stored and in memory as a whole."""
        for index, name in enumerate(self.cases):
            if name in self.failed:
                continue
            try:
                case = self.load(name, None)
                found = len(case.probs)
                self._channels = self._channels or found
                if found != self._channels:
                    raise UserError(
                        f"{case.path}: {found} channels, the first has {self._channels}. Fix: move it away."
                    )
            except UserError as error:
                self.failed[name] = str(error)
                continue
            targets = torch.zeros((), dtype=torch.int64).expand(case.probs.shape[1:])
            if case.labels is not None:
                targets = torch.from_numpy(case.labels.astype("int64"))
            yield SimpleNamespace(images=case.probs[None], targets=targets[None], names=[name], indices=[index])

    def logits(self) -> Iterator[SimpleNamespace]:
        """Yield the batches with logits as images."""
        for batch in self:
            with name_case_in_errors(self.cases[batch.names[0]]):
                batch.images = self.values.logits(batch.images)
            yield batch

    def binary(self, channels: Sequence[int]) -> Iterator[SimpleNamespace]:
        """Yield a batch for each case and channel as a problem of two classes: logits (0, z) and labels 0 and 1."""
        void = self.args.void
        for batch in self.logits():
            for c in channels:
                z = batch.images[:, c : c + 1]
                yield SimpleNamespace(
                    images=torch.cat([torch.zeros_like(z), z], 1),
                    targets=(batch.targets == c + 1).long().masked_fill(batch.targets == void, void),
                    names=batch.names,
                    indices=[batch.indices[0] * len(channels) + c],
                )


def _read_place(path: Path) -> tuple[Geometry | None, tuple[str, str]]:
    """Return the geometry of a case, and the suffixes of its masks and of its label map."""
    suffix = suffix_of(path)
    if suffix in NIFTI:
        return arrays.read_geometry(path), (suffix, suffix)
    if not nnunet.is_export(path):
        return None, (suffix, suffix)
    geometry = nnunet.geometry_of(path)
    if geometry is not None:
        return geometry, (".nii.gz", ".nii.gz")
    return None, (".npz", nnunet.picture_suffix(path) or ".npz")


def _check_labels(path: Path, labels: np.ndarray, count: int, void: int) -> None:
    """Raise UserError for labels without a channel."""
    wrong = set[int]()
    for part in slabs(labels.shape):
        wrong |= {int(v) for v in np.unique(labels[part])} - {*range(count), void}
    if wrong:
        raise UserError(
            f"{path}: labels {sorted(wrong)[:5]} are neither in 0..{count - 1} nor void={void}. "
            "Fix: pass --void VALUE or --foreground-only, or change the labels."
        )


def _sums_to_one(array: np.ndarray, axis: int) -> bool:
    """Return whether the values of each pixel in a sample add to 1 over an axis."""
    if array.shape[axis] < 2:
        return False
    steps = [slice(None, None, max(1, size // 24)) for size in array.shape]
    steps[axis] = slice(None)
    sums = np.asarray(array[tuple(steps)], np.float64).sum(axis)
    inside = sums[sums > 0]  # a map may be 0 outside a crop
    return bool(inside.size) and bool(np.abs(inside - 1).max() < _SUM)


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape without its axes of size 1."""
    return tuple(size for size in shape if size != 1)


def _align(path: Path, array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Return NIfTI labels with the axes of the probabilities; raise UserError if the affines differ."""
    nib = arrays.require("nibabel", path)
    affine = arrays.load_nifti(path).affine
    turn = nib.orientations.ornt_transform(nib.io_orientation(affine), nib.io_orientation(geometry.affine))
    turned = affine @ nib.orientations.inv_ornt_aff(turn, array.shape[:3])
    if not np.allclose(turned, geometry.affine, atol=1e-3, rtol=1e-4):
        both = " and ".join(str(np.round(one[:3], 3).tolist()) for one in (affine, geometry.affine))
        raise UserError(
            f"{path}: another affine than the probabilities have, {both}. "
            "Fix: resample one of them to the other, or correct the header."
        )
    array = nib.orientations.apply_orientation(array, turn)
    return array.T if geometry.reversed else array


def _match_shape(labels: np.ndarray, shape: tuple[int, ...], path: Path, probs: Path) -> np.ndarray:
    """Return labels in the shape of the probabilities: axes of size 1 may differ, and the axes may be reversed."""
    if _squeeze(labels.shape) == _squeeze(shape):
        return labels.reshape(shape)
    if _squeeze(labels.shape)[::-1] == _squeeze(shape):
        return labels.T.reshape(shape)
    raise UserError(
        f"{path}: shape {labels.shape} does not fit {probs} with spatial shape {shape}. "
        "Fix: save both at the same size, or pass --classes-axis."
    )


def slabs(shape: tuple[int, ...], depth: int = 1) -> Iterator[slice]:
    """Yield slices of the first spatial axis; each has at most `SLAB` values of ``depth`` classes, or one plane."""
    step = max(1, SLAB // max(1, depth * int(np.prod(shape[1:], dtype=np.int64))))
    for start in range(0, shape[0], step):
        yield slice(start, min(shape[0], start + step))


def _check_range(path: Path, values: np.ndarray, logits: bool) -> bool:
    """Return whether all values are in [0, 1].

    Raise UserError for values that are NaN or infinite; if they are not logits, also for values outside [0, 1].
    """
    low, high = values.min(), values.max()
    slack = 2e-3 if values.dtype == np.float16 else 1e-5  # rounding errors
    if np.isnan(low):
        raise UserError(f"{path}: holds NaN. Fix: look for an overflow in the network.")
    if not np.isfinite([low, high]).all():
        raise UserError(f"{path}: values in [{low:g}, {high:g}]. Fix: look for an overflow in the network.")
    in_unit_range = bool(low >= -slack and high <= 1 + slack)
    if not logits and not in_unit_range:
        raise UserError(
            f"{path}: values in [{low:.6g}, {high:.6g}] are not probabilities. "
            "Fix: pass --link softmax or --link sigmoid if they are logits."
        )
    return in_unit_range


@contextmanager
def name_case_in_errors(path: Path) -> Iterator[None]:
    """Add a path to the ValueError of a rule or a calibration."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
