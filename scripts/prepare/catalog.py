"""The catalogue of data sets: names, terms, addresses, and how to open them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import OmegaConf

import datasets
from configs.compose import CONFIGS
from datasets import DatasetError

if TYPE_CHECKING:
    from datasets.paired import PairedDataset


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        kind: the name of its class.
        size, licence, home: for people.
        holds: the entries of its root once it is there.
        urls: places of its archive, if it can be downloaded without an account.
        bytes, checksum: of the archive, ``algorithm:hexdigest``; None if the owner publishes none.
        inside: the folder of the archive that becomes the root.
        steps: how to get it by hand.
    """

    name: str
    kind: str
    about: str
    size: str
    licence: str
    home: str
    holds: tuple[str, ...]
    urls: tuple[str, ...] = ()
    bytes: int | None = None
    checksum: str | None = None
    inside: str = ""
    steps: tuple[str, ...] = ()

    @property
    def tree(self) -> str:
        """Return the expected files as text."""
        return getattr(datasets, self.kind).help_tree

    @property
    def root(self) -> Path:
        """Return the default of dataset.root."""
        return Path(str(OmegaConf.load(CONFIGS / "dataset" / f"{self.name}.yaml").root))

    def missing(self, root: Path) -> list[str]:
        """Return the parts that are not there."""
        return [name for name in self.holds if not (root / name).exists()]

    def splits(self, root: Path, chosen: list[str], classes: Path | None = None) -> dict[str, PairedDataset]:
        """Return the chosen splits, or else train and val, and test if it exists.

        Raises DatasetError if one is not there.
        """
        own = {"classes": classes} if self.kind == "Folder" else {}
        source = getattr(datasets, self.kind)
        found = {split: source(root, split, **own) for split in chosen or ("train", "val")}
        if not chosen and self.kind in ("Folder", "KvasirSEG"):
            with contextlib.suppress(DatasetError):  # not every data set has one
                found["test"] = source(root, "test", **own)
        return found


_ENTRIES = (
    Entry(
        "voc2012",
        "VOC2012",
        "PASCAL VOC 2012: 20 kinds of objects; 1464 training and 1449 validation images",
        "2.0 GB to download, 2 GB unpacked",
        "images from Flickr under its terms of use; for research",
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
        ("VOCdevkit",),
        urls=(
            "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        ),
        bytes=1999639040,
        checksum="md5:6cd6e144f989b92b3379bac3b3de84fd",
    ),
    Entry(
        "kvasir_seg",
        "KvasirSEG",
        "Kvasir-SEG: polyps in 1000 colonoscopy images; 880 for training, 120 for validation",
        "46 MB",
        "for research and education, citing Jha et al., MMM 2020",
        "https://datasets.simula.no/kvasir-seg/",
        ("images", "masks"),
        urls=("https://datasets.simula.no/downloads/kvasir-seg.zip",),
        inside="Kvasir-SEG",
    ),
    Entry(
        "cityscapes",
        "Cityscapes",
        "Cityscapes, fine annotations: 19 classes of street scenes; 2975 training and 500 validation images",
        "11.6 GB to download (11 GB images, 241 MB annotations)",
        "free for non-commercial research after registration",
        "https://www.cityscapes-dataset.com/",
        ("leftImg8bit", "gtFine"),
        steps=(
            "register at https://www.cityscapes-dataset.com/register/ and wait for the e-mail",
            "log in, open https://www.cityscapes-dataset.com/downloads/ and fetch"
            " gtFine_trainvaltest.zip (241 MB) and leftImg8bit_trainvaltest.zip (11 GB)",
            "unzip both into {root}: it then holds gtFine/ and leftImg8bit/",
            "or let a program do both: pip install cityscapesscripts, csDownload -l (stores your account), and this"
            " command again",
            "python scripts/prepare_data.py check cityscapes --root {root}",
        ),
    ),
    Entry(
        "folder",
        "Folder",
        "your own images: see docs/own-data.md",
        "yours",
        "yours",
        "docs/own-data.md",
        ("images", "masks"),
        steps=(
            "put images into {root}/images and masks of the same names into {root}/masks",
            "write {root}/classes.yaml, such as: classes: [background, lesion]",
            "python scripts/prepare_data.py split {root}",
            "python scripts/prepare_data.py check folder --root {root}",
        ),
    ),
)
CATALOG = {entry.name: entry for entry in _ENTRIES}
