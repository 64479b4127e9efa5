"""Find and read images, write masks and review.csv, and prevent one file from replacing another.

Masks and probabilities have the layout of the stored pixels, and masks carry the EXIF orientation of the image. Readers
that apply it and readers that ignore it both see a mask over its object. Only overlays, which people view, are upright.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from collections import defaultdict
from collections.abc import Mapping, Sequence
from os.path import realpath  # unlike Path.resolve(), accepts cyclic links, which reading reports
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from torchvision.utils import draw_segmentation_masks

from configs import build
from configs.errors import UserError
from configs.files import read_json, read_text, temporary_file, write_json, write_text
from datasets import DatasetError, decode
from datasets.base import DatasetInfo
from datasets.folder import Folder, read_class_table
from rankseg.expected import absence, confidence
from trainers.text import csv_text, read_csv

VOID_COLOUR = (224, 224, 192)
BAND = 256  # rows of an overlay that are drawn at once
Outputs = Mapping[str | int, Path]  # files to write for an image: kind -> path, or index of a class -> path of its mask


class Picture(NamedTuple):
    """Upright pixels (3, H, W) uint8 of an image, and the EXIF orientation of its file (1: none)."""

    pixels: Tensor
    orientation: int


def read(path: Path) -> Picture:
    """Decode an image file, upright.

    Raises DatasetError if the file is missing, damaged or too large, or has more than 8 bits per channel.
    """
    stored = decode.load_image(path)
    mode = stored.image.mode
    if decode.is_deep(mode):
        raise DatasetError(f"{path} has more than 8 bits per channel (mode {mode}). Fix: save it as 8 bits")
    try:
        upright = decode.orient(stored.image, decode.UPRIGHT, stored.orientation).convert("RGB")
        return Picture(torch.from_numpy(np.array(upright)).permute(2, 0, 1), stored.orientation)
    except MemoryError as error:
        raise DatasetError(f"{path} does not fit in memory. Fix: cut it into tiles") from error


def find(inputs: Sequence[Path], out: Path) -> tuple[dict[str, Path], list[str]]:
    """Return {name: image file} and notes. The name of a file is its stem, or its path below a given folder.

    In a given folder, hidden files and sub-folders are skipped, and also ``out``, because it holds masks.
    """
    found: dict[str, Path] = {}
    notes: list[str] = []
    for given in inputs:
        if not given.exists():
            raise FileNotFoundError(f"{given} does not exist. Fix: give image files or folders of them")
        names = {given: given.stem}  # file -> name
        if given.is_dir():
            if given.resolve() == out.resolve():
                raise UserError(f"--out {out} is the folder of the images. Fix: choose another for the masks")
            listing = decode.list_images(given, below=True, without=out.resolve())
            if listing.ignored:
                notes.append(f"files in {given} that are not read: {listing.ignored_text}")
            if not listing.images:
                raise UserError("; ".join([f"{given} has no image ({' '.join(decode.IMAGE_SUFFIXES)})", *notes]))
            paths = [*listing.images.values(), *(other for pair in listing.clashes for other in pair)]
            names = {path: path.relative_to(given).with_suffix("").as_posix() for path in paths}
        for path, name in names.items():
            if found.setdefault(name, path) != path:
                raise UserError(f"{found[name]} and {path} would both be written as {name}.png. Fix: rename one")
    return found, notes


def as_stored(labels: np.ndarray, orientation: int) -> Image.Image:
    """Return upright labels (H, W) uint8 in the layout of the stored pixels."""
    return decode.orient(Image.fromarray(labels.astype(np.uint8)), decode.TO_STORED, orientation)


def save_labels(labels: Tensor, orientation: int, info: DatasetInfo, path: Path) -> None:
    """Write labels (H, W) uint8 as a palette PNG: an index is a class, in the colour of the class."""
    colours = [*info.palette, *[(0, 0, 0)] * (256 - info.num_classes)]
    colours[info.ignore_index] = VOID_COLOUR
    image = as_stored(labels.numpy(), orientation)
    image.putpalette([channel for colour in colours for channel in colour])
    save_png(image, path, orientation)


def save_mask(mask: Tensor, orientation: int, path: Path) -> None:
    """Write one class's mask (H, W) bool as a PNG of 0 and 255."""
    save_png(as_stored(mask.numpy() * np.uint8(255), orientation), path, orientation)


def save_overlay(pixels: Tensor, labels: Tensor, info: DatasetInfo, path: Path) -> None:
    """Write the upright image (3, H, W) uint8 under the colours of the scored classes; other labels are transparent."""
    colours = [tuple(info.palette[c]) for c in info.scored]
    picture = Image.new("RGB", (labels.shape[1], labels.shape[0]))
    for top in range(0, len(labels), BAND):  # drawing needs 24 bytes per pixel, and one per class
        masks = torch.stack([labels[top : top + BAND] == c for c in info.scored])
        band = pixels[:, top : top + BAND].contiguous()
        drawn = draw_segmentation_masks(band, masks, alpha=0.5, colors=colours)
        picture.paste(Image.fromarray(drawn.permute(1, 2, 0).numpy()), (0, top))
    save_png(picture, path)


def save_probabilities(probs: Tensor, orientation: int, path: Path) -> None:
    """Write probabilities (C, H, W) as a float16 .npy file, one class at a time to save memory."""
    is_transposed = orientation in (5, 6, 7, 8)
    shape = (len(probs), probs.shape[2], probs.shape[1]) if is_transposed else tuple(probs.shape)
    with temporary_file(path) as temporary:
        out = np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
        for c, channel in enumerate(probs):
            image = Image.fromarray(channel.float().numpy())
            out[c] = np.asarray(decode.orient(image, decode.TO_STORED, orientation))
        out.flush()


def save_png(image: Image.Image, path: Path, orientation: int = 1) -> None:
    """Write a PNG, with the EXIF orientation if there is one."""
    exif = Image.Exif()
    if orientation != 1:
        exif[decode.EXIF_ORIENTATION] = orientation
    with temporary_file(path) as temporary:
        image.save(temporary, format="PNG", exif=exif if orientation != 1 else None)


# ---------------------------------------------------------------------------------------------------------------------
# Output paths


def outputs_of(args: Namespace, image: str, info: DatasetInfo) -> Outputs:
    """Return the files to write for an image. ``image`` is its name: a path below ``args.out``, without suffix."""
    out: Path = args.out
    paths: dict[str | int, Path] = {}
    if args.per_class:
        paths |= {c: out / "classes" / image / f"{name}.png" for c, name in enumerate(file_names(info.classes))}
    if args.overlay:
        paths["overlay"] = out / "overlay" / f"{image}.png"
    if args.probabilities:
        paths["probabilities"] = out / "probabilities" / f"{image}.npy"
    return {**paths, "labels": out / f"{image}.png"}


def file_names(classes: tuple[str, ...]) -> list[str]:
    """Return a different file name for each class."""
    safe = [name.replace("/", "_") for name in classes]
    return [name if safe.count(name) == 1 else f"{name}_{c}" for c, name in enumerate(safe)]


def reject_collisions(outputs: Mapping[str, Outputs], images: Mapping[str, Path]) -> None:
    """Raise UserError if two images need the same path, as a file or folder, or if a file would replace an image."""
    fix = "Fix: rename one, or segment them into folders of their own"
    read = {realpath(path): path for path in images.values()}
    written: dict[Path, str] = {}
    for name, files in outputs.items():
        for path in files.values():
            if realpath(path) in read:
                raise UserError(f"{read[realpath(path)]} would be replaced by a mask. Fix: choose another --out")
            other = written.setdefault(path, name)
            if other != name:
                raise UserError(f"{images[other]} and {images[name]} would both be written to {path}. {fix}")
    for path, name in written.items():
        for folder in written.keys() & set(path.parents):
            image = images[written[folder]]
            raise UserError(f"{image} would become {folder}, which is a folder for {images[name]}. {fix}")


def record_settings(
    out: Path, settings: dict[str, Any], outputs: Mapping[str, Outputs], images: Mapping[str, Path], force: bool
) -> None:
    """Store the settings of the masks, and the image that each is made from, in predict.json of the folder ``out``.

    Without ``force``, raises UserError if the folder has masks of other settings, or if a file to write exists and was
    not made from the same image.
    """
    path = out / "predict.json"
    sources = {name: realpath(image) for name, image in images.items()}
    before: dict[str, Any] = {}
    try:
        if path.exists():
            before = dict(read_json(path))
            before["images"] = dict(before.get("images", {}))
    except (ValueError, TypeError):
        raise UserError(f"{path} is not a record of this command. Fix: remove it, or choose another --out") from None
    changed = [key for key, value in settings.items() if before and before.get(key) != value]
    if changed and not force:
        raise UserError(
            f"{out} holds masks made with another {', '.join(changed)}. Fix: choose another --out, or pass --force"
        )
    known = {} if changed else before.get("images", {})  # masks of other settings do not count as done
    for name, files in outputs.items() if not force else ():
        there = next((file for file in files.values() if file.exists()), None)
        if there and known.get(name) != sources[name]:
            origin = f"was made from {known[name]}" if name in known else "was not made by this command and settings"
            raise UserError(f"{there} {origin}. Fix: choose another --out, or pass --force to replace it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**settings, "images": {**known, **sources}})


def dataset_info(cfg: DictConfig, classes: Path | None = None) -> DatasetInfo:
    """Return the table of a classes.yaml if given, else of the network's data set. The images are not needed.

    Raises UserError if the network was trained on a folder whose classes.yaml is missing.
    """
    kind = get_class(cfg.dataset.source._target_)
    name = str(cfg.dataset.name)
    if classes is None and kind is Folder:
        own = cfg.dataset.classes
        if OmegaConf.is_config(own):  # the table itself
            return read_class_table(name, OmegaConf.to_object(own)).info  # type: ignore[arg-type]
        classes = Path(own or Path(cfg.dataset.root) / "classes.yaml").expanduser()
        if not classes.is_file():
            raise UserError(f"{classes}, which names the classes, does not exist. Fix: pass --classes PATH")
    if classes is not None:
        return read_class_table(name, classes).info
    known = getattr(kind, "info", None)
    return known or build.dataset(cfg, next(iter(cfg.dataset.splits))).info


# ---------------------------------------------------------------------------------------------------------------------
# Confidence of the masks

COLUMNS = ("image", "class", "area", "confidence", "lower_bound")


class Review:
    """The rows of review.csv, sorted by confidence. Rows of images that are not segmented again are kept.

    A row describes a predicted class of an image: area in pixels, confidence (the expected Dice), and the lower bound
    of the Dice. The bound is confidence - margin, at least 0. It holds for a share 1 - alpha of new images like those
    that fitted the margin. An image without any mask has one row with an empty class; its confidence is the smallest
    P(class absent).

    Args:
        path: the file.
        classes: names of the classes.
        scored: the classes that are reviewed.
        margins: index of a class, as text -> margin of its bound; None or missing for no bound.
    """

    def __init__(
        self, path: Path, classes: Sequence[str], scored: Sequence[int], margins: Mapping[str, float | None]
    ) -> None:
        self.path, self.classes, self.scored, self.margins = path, classes, scored, margins
        self.before = _read_review(path) if path.exists() else {}
        self.rows: dict[str, list[dict[str, str]]] = defaultdict(list)  # also of classes without a mask

    def add(self, image: str, index: int, probs: Tensor, mask: Tensor) -> None:
        """Add one class of an image: probabilities and mask, (H, W)."""
        if index not in self.scored:
            return
        area, margin = int(mask.sum()), self.margins.get(str(index))
        sure = float(confidence(probs[None, None], mask[None, None]) if area else absence(probs[None, None]))
        bound = "" if margin is None or not area else f"{max(0.0, sure - margin):.4f}"
        values = (image, self.classes[index] if area else "", str(area), f"{sure:.4f}", bound)
        self.rows[image].append(dict(zip(COLUMNS, values, strict=True)))

    def save(self) -> None:
        """Write the file, the lowest confidence first."""
        rows: list[dict[str, str]] = []
        for found in {**self.before, **self.rows}.values():
            rows += [row for row in found if row["class"]] or [min(found, key=lambda row: row["confidence"])]
        rows.sort(key=lambda row: (float(row["confidence"]), row["image"], row["class"]))
        write_text(self.path, csv_text([COLUMNS, *([row[key] for key in COLUMNS] for row in rows)]))


def _read_review(path: Path) -> dict[str, list[dict[str, str]]]:
    """Return image -> its rows in an existing file. Raises UserError if `Review` did not write it."""
    found: dict[str, list[dict[str, str]]] = defaultdict(list)
    try:
        text = read_text(path)
        if text.partition("\n")[0].rstrip("\r") != ",".join(COLUMNS):
            raise ValueError("another header")
        for row in read_csv(text):
            float(row["area"]), float(row["confidence"]), float(row["lower_bound"] or 0)
            found[row["image"]].append(row)
    except (ValueError, KeyError, OSError, csv.Error):
        raise UserError(f"{path} is not a review of this command. Fix: move it, or choose another --out.") from None
    return found
