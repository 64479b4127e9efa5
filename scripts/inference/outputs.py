"""Where the masks go, what they were made with, and that none takes the place of another file."""

from __future__ import annotations

import json
import os
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.files import write_json
from datasets.base import DatasetInfo


class Outputs:
    """The output files of an image. The palette PNG is written last and marks them as complete.

    Args:
        args: the command line: ``out``, and which of ``overlay``, ``per_class`` and ``probabilities`` are wanted.
        image: the image's name, a path below ``out`` without suffix.
        info: the classes.
    """

    def __init__(self, args: Namespace, image: str, info: DatasetInfo) -> None:
        out: Path = args.out
        self.labels = out / f"{image}.png"
        self.overlay = out / "overlay" / f"{image}.png" if args.overlay else None
        self.probabilities = out / "probabilities" / f"{image}.npy" if args.probabilities else None
        names = file_names(info.classes) if args.per_class else []
        self.masks = [out / "classes" / image / f"{name}.png" for name in names]

    def all(self) -> list[Path]:
        """Return every file that is wanted."""
        return [self.labels, *self.masks, *(p for p in (self.overlay, self.probabilities) if p is not None)]

    def done(self) -> bool:
        """Whether every file is there."""
        return all(path.exists() for path in self.all())


def file_names(classes: tuple[str, ...]) -> list[str]:
    """Return the classes' names as names of files, each another."""
    safe = [name.replace("/", "_") for name in classes]
    return [name if safe.count(name) == 1 else f"{name}_{c}" for c, name in enumerate(safe)]


def refuse_collisions(outputs: Mapping[str, Outputs], images: Mapping[str, Path]) -> None:
    """Raise ValueError where two files would be written to one place, or one over an image."""
    read = {_real(path): path for path in images.values()}
    written: dict[Path, str] = {}
    for name, files in outputs.items():
        for path in files.all():
            if _real(path) in read:
                raise UserError(
                    f"{read[_real(path)]} would be written over: choose another --out than its folder"
                )
            other = written.setdefault(path, name)
            if other != name:
                raise UserError(
                    f"{images[other]} and {images[name]} would both be written to {path}: "
                    "rename one, or segment them into folders of their own"
                )
    for path, name in written.items():
        for folder in path.parents:
            if folder in written:
                raise UserError(
                    f"{images[written[folder]]} would become {folder}, which is a folder for {images[name]}: "
                    "rename one, or segment them into folders of their own"
                )


def settle(
    out: Path,
    settings: dict[str, Any],
    outputs: Mapping[str, Outputs],
    images: Mapping[str, Path],
    force: bool,
) -> None:
    """Record in the folder how its masks are made and from which images; reject other masks.

    Raises ValueError, naming what differs.
    """
    path = out / "predict.json"
    sources = {name: _real(image) for name, image in images.items()}
    before = _read(path) if path.exists() else {}
    changed = [key for key, value in settings.items() if before and before.get(key) != value]
    if changed and not force:
        raise UserError(
            f"{out} holds masks made with another {', '.join(changed)}: choose another --out, or --force"
        )
    known = {} if changed else before.get("images", {})  # what was made otherwise is not done
    for name, files in outputs.items() if not force else ():
        there = next((file for file in files.all() if file.exists()), None)
        if there and known.get(name) != sources[name]:
            of = f"is the mask of {known[name]}" if name in known else "was not made by this command"
            raise UserError(f"{there} {of}: choose another --out, or --force to write over it")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, {**settings, "images": {**known, **sources}})


def _real(path: Path) -> str:
    """Return the target of a path. In contrast to resolve(), accept circular links, which reading reports."""
    return os.path.realpath(path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):
        raise UserError(f"{path} is not what was written there: remove it, or choose another --out") from None
