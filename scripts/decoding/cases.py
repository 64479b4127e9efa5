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
from scripts.decoding import arrays
from scripts.decoding.arrays import Geometry, read_array, scratch, suffix_of
from trainers.evaluator import Scoring
from trainers.forward import ToProbs
from trainers.losses import Link
from trainers.metrics import Truth, encode
from trainers.results import fingerprint

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
        """Return finite logits (N, C, *S) float32 of stored values."""
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
class Case:
    """One case: its file ``path``, `probs` (C, *S), `labels` and `valid` (*S), or None if they were not asked for.

    Labels are void outside the field of view. ``suffixes`` are those of the files of masks and of label maps.
    """

    path: Path
    probs: Tensor
    labels: np.ndarray | None
    valid: np.ndarray | None
    geometry: Geometry | None
    suffixes: tuple[str, str]


def find_cases(
    folder: Path, suffixes: tuple[str, ...] = arrays.SUFFIXES, without: Path | None = None
) -> dict[str, Path]:
    """Return case name -> file: the path below the folder without its suffix.

    Linked folders are followed; hidden ones, and ``without``, are skipped. nnU-Net's ``<case>.npz`` with ``<case>.pkl``
    is the case; a segmentation of the same name is not.
    """
    if not folder.exists():
        raise FileNotFoundError(2, "no such file or folder", str(folder))
    files = sorted(visible_files(folder, True, without and without.resolve())) if folder.is_dir() else [folder]
    found: dict[str, Path] = {}
    for path in files:
        suffix = suffix_of(path, suffixes)
        if suffix and not path.exists():
            raise UserError(f"{path}: a link to a file that does not exist. Fix: restore the file or the link.")
        if not suffix:
            continue
        if not path.is_file():  # opening a pipe could wait for ever
            raise UserError(f"{path}: not a regular file. Fix: replace it by a file.")
        inside = path.relative_to(folder) if folder.is_dir() else Path(path.name)
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


def unread(folder: Path, suffixes: tuple[str, ...], without: Path) -> str:
    """Return the number and the suffixes of the files that are not read, but for nnU-Net's notes; "" for none."""
    files = list(visible_files(folder, True, without.resolve())) if folder.is_dir() else []
    known = (*suffixes, *arrays.PICTURES, ".pkl", ".json")
    return ImageFolder(ignored=[path for path in files if not suffix_of(path, known)]).ignored_text


def first_label(channels: int, args: Namespace) -> int:
    """Return the label of the first channel: 1 if label 0, the background, has no channel."""
    return int(channels == 1 or args.foreground_only)


class _ForegroundScoring(Scoring):
    """Channel c is label c + 1. Label 0, the background, has no channel."""

    def encode(self, targets: Tensor) -> Truth:
        truth = encode(targets, self.num_classes + 1, self.ignore_index, self.void)
        return Truth(truth.onehot[:, 1:], truth.valid, truth.actual[:, 1:], truth.pixels)


class Folder:
    """Cases with their labels and fields of view: load one, or iterate over all as over the batches of a data set.

    Without ``labels``, the batches have label 0 everywhere.

    Attributes:
        failed: case name -> what is wrong with it; such a case is left out of the batches.
    """

    def __init__(self, args: Namespace, probs: Path, labels: Path | None = None, valid: Path | None = None) -> None:
        self.args, self.cases = args, find_cases(probs, without=args.out)
        self.labels = find_cases(labels, arrays.LABEL_SUFFIXES) if labels else None
        self.valid = find_cases(valid, arrays.LABEL_SUFFIXES) if valid else None
        self.values = FromStored(args.link, args.temperature, args.foreground_only)
        self.failed: dict[str, str] = {}
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
        return first_label(self.channels, self.args)

    def scoring(self) -> Scoring:
        """Return the conventions, whose classes are the channels."""
        first, channels, labels = self.first, self.channels, self.args.scored
        scored = tuple(c - first for c in labels or range(first, channels + first))
        if not set(scored) <= set(range(channels)):
            raise UserError(f"--scored {labels} is invalid: labels are {first} to {channels - 1 + first}.")
        return (_ForegroundScoring if first else Scoring)(channels, scored, self.args.void)

    @property
    def info(self) -> SimpleNamespace:
        """The scored channels."""
        return SimpleNamespace(scored=self.scoring().scored)

    def sources(self, name: str) -> list[list[Any]]:
        """Return path, size and time of change of the files that a case is made of."""
        groups = (self.cases, self.labels or {}, self.valid or {})
        paths = [group[name] for group in groups if name in group]
        return [[str(p), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]

    def fingerprint(self) -> str:
        """Return a hash of path, size and time of change of all files that are read."""
        return fingerprint({name: self.sources(name) for name in self.cases if name not in self.failed})

    checksum = fingerprint  # volumes are too large to read their contents for this

    def load(self, name: str, values: FromStored, as_stored: bool = False) -> Case:
        """Load a case; large arrays stay in files.

        Args:
            values: what the file holds, and how it becomes probabilities.
            as_stored: leave logits, and probabilities before a calibration, as they are.
        """
        path, args = self.cases[name], self.args
        for kind, group in (("label", self.labels), ("field of view", self.valid)):
            if group is not None and name not in group:
                raise UserError(f"{path}: no {kind} of this name. Fix: add it, or move the case away.")
        geometry, masks = None, suffix_of(path)
        labels_suffix = masks
        if masks in _NIFTI:
            geometry = arrays.read_geometry(path)
        elif path.name.endswith(".npz") and path.with_name(path.name[:-4] + ".pkl").is_file():
            geometry = arrays.nnunet_geometry(path)
            masks = ".npz" if geometry is None else ".nii.gz"
            labels_suffix = (arrays.nnunet_picture(path) or masks) if geometry is None else masks
        array = read_array(path, args.out, args.key, classes_last=args.classes_axis in ("auto", "last"))
        if not array.size:
            raise UserError(f"{path}: shape {array.shape} holds no value. Fix: write the file again.")
        integer_logits = values.link is not None and np.issubdtype(array.dtype, np.integer)
        if not (integer_logits or np.issubdtype(array.dtype, np.floating)) or array.dtype.itemsize > 8:
            raise UserError(
                f"{path}: its values are {array.dtype}, not probabilities. Fix: save float16, float32 or float64 "
                "values, or logits with --link."
            )
        paths = [group[name] if group else None for group in (self.labels, self.valid)]
        maps = [None if p is None else _read_labels(p, args.out, geometry) for p in paths]
        axis = _class_axis(path, array, next((m.shape for m in maps if m is not None), None), values.link, args)
        array = np.moveaxis(array, -1, 0) if axis == "last" else array[None] if axis == "none" else array
        labels, inside = (
            None if p is None or m is None else _fit(m, array.shape[1:], p, path)
            for p, m in zip(paths, maps, strict=True)
        )
        inside = None if inside is None else inside != 0
        if labels is not None:
            labels = labels if inside is None else np.where(inside, labels, np.asarray(args.void, np.int64))
            _check_labels(paths[0], labels, len(array) + first_label(len(array), args), args.void)
        probs = _as_probs(path, array, inside, values, as_stored, args.out)
        return Case(path, probs, labels, inside, geometry, (masks, labels_suffix))

    def __iter__(self) -> Iterator[SimpleNamespace]:
        """Yield a batch for each case, as stored and in memory as a whole."""
        for index, name in enumerate(self.cases):
            if name in self.failed:
                continue
            try:
                case = self.load(name, self.values, as_stored=True)
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
        """Iterate over batches of logits."""
        for batch in self:
            with named(self.cases[batch.names[0]]):
                batch.images = self.values.logits(batch.images)
            yield batch

    def binary(self, channels: Sequence[int]) -> Iterator[SimpleNamespace]:
        """Iterate over channels as problems of two classes: batches of logits (0, z) and of labels 0 and 1."""
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


def _check_labels(path: Path | None, labels: np.ndarray, count: int, void: int) -> None:
    """Raise UserError for labels without a channel."""
    wrong = set[int]()
    for part in slabs(labels.shape):
        wrong |= {int(v) for v in np.unique(labels[part])} - {*range(count), void}
    if wrong:
        raise UserError(
            f"{path}: labels {sorted(wrong)[:5]} are neither in 0..{count - 1} nor void={void}. "
            "Fix: pass --void VALUE or --foreground-only, or change the labels."
        )


def _class_axis(path: Path, array: np.ndarray, known: tuple[int, ...] | None, link: str | None, args: Namespace) -> str:
    """Return which axis holds the classes: "first", "last" or "none"; ``known`` is the shape of the labels."""
    given = args.classes_axis
    if given == "none" or array.ndim == 2:
        return "none"
    if array.ndim < 2:
        raise UserError(f"{path}: shape {array.shape} is not a map. Fix: save (C, *S) or (*S, C).")
    if suffix_of(path) in _NIFTI:  # the reader moved the last of four axes to the front
        if array.ndim > 3:
            return "first"
        return "none" if given == "auto" else given
    if given != "auto":
        return given
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
    if link is None:
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


def _read_labels(path: Path, folder: Path, geometry: Geometry | None) -> np.ndarray:
    """Read integer labels (*S), with the axes of the probabilities if both files say where they are."""
    array = read_array(path, folder)
    if suffix_of(path, arrays.LABEL_SUFFIXES) in _NIFTI:
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
    nib = arrays.require("nibabel", path)
    affine = arrays.load_nifti(path).affine
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


def _as_probs(
    path: Path, array: np.ndarray, inside: np.ndarray | None, values: FromStored, as_stored: bool, folder: Path
) -> Tensor:
    """Return probabilities (C, *S), each class contiguous; a file that has this layout is not copied.

    Pixels outside the field of view get probability 0, which changes no rule's result inside.
    """
    dtype = array.dtype.newbyteorder("=") if array.dtype.kind == "f" else np.dtype(np.float32)  # integer logits
    change = values.changes and not as_stored
    logits = values.link is not None
    if inside is None and array.flags.c_contiguous and array.dtype == dtype and not change:
        out = array
    else:
        out = scratch(array.shape, np.float32 if change else dtype, folder)
    outside = -np.inf if logits and not change else 0
    low, high = np.inf, -np.inf
    for part in slabs(array.shape[1:], len(array)):
        some = np.ascontiguousarray(array[:, part], dtype)
        low, high = min(low, some.min(initial=np.inf)), max(high, some.max(initial=-np.inf))
        if np.isnan(some).any():
            raise UserError(f"{path}: holds NaN. Fix: look for an overflow in the network.")
        if out is array:
            continue
        if change:
            _check_range(path, low, high, dtype, logits)
            with named(path):
                some = values(torch.from_numpy(some)[None])[0].numpy()
        out[:, part] = some if inside is None else np.where(inside[part], some, outside)
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
    """Add a path to the ValueError of a rule or a calibration."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
