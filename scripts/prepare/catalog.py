"""The catalogue of data sets: what is known about each (catalog.yaml), and how to open it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from configs.compose import CONFIGS
from configs.errors import UserError
from configs.files import read_yaml
from datasets import DatasetError

if TYPE_CHECKING:
    from datasets.paired import PairedDataset


@dataclass(frozen=True)
class Entry:
    """One data set.

    Attributes:
        kind: the name of its class in `datasets`.
        about, size, licence, home: texts to print.
        holds: the entries of its root once it is there.
        urls: addresses of its archive, if it can be downloaded without an account.
        bytes: the size of the archive; None if it is not known.
        checksum: ``algorithm:hexdigest`` of the archive; None if the owner publishes none.
        inside: the folder of the archive that becomes the root; empty for the whole archive.
        steps: how to get it by hand.
    """

    name: str
    kind: str
    about: str
    size: str
    licence: str
    home: str
    holds: Sequence[str]
    urls: Sequence[str] = ()
    bytes: int | None = None
    checksum: str | None = None
    inside: str = ""
    steps: Sequence[str] = ()

    @property
    def source(self) -> Any:
        """Return its class. The module is imported here, because torchvision is slow to import."""
        return getattr(import_module(f"datasets.{self.name}"), self.kind)

    @property
    def tree(self) -> str:
        """Return the expected files as text."""
        return self.source.help_tree

    @property
    def root(self) -> Path:
        """Return the default of dataset.root."""
        return Path(str(OmegaConf.load(CONFIGS / "dataset" / f"{self.name}.yaml").root))

    def missing(self, root: Path) -> list[str]:
        """Return the entries of ``holds`` that ``root`` lacks."""
        return [name for name in self.holds if not (root / name).exists()]

    def splits(self, root: Path, chosen: list[str], classes: Path | None = None) -> dict[str, PairedDataset]:
        """Return the chosen splits; by default train and val, and test if a Folder or KvasirSEG has it.

        Raises DatasetError if a split cannot be opened.
        """
        if classes is not None and self.kind != "Folder":
            raise UserError(f"--classes {classes} is for folder; {self.name} has classes of its own. Fix: leave it out")
        own = {"classes": classes} if self.kind == "Folder" else {}
        found = {split: self.source(root, split, **own) for split in chosen or ("train", "val")}
        if not chosen and self.kind in ("Folder", "KvasirSEG"):
            try:
                found["test"] = self.source(root, "test", **own)
            except DatasetError:
                if (root.expanduser() / "test.txt").exists():
                    raise
        return found


CATALOG = {name: Entry(name, **fields) for name, fields in read_yaml(Path(__file__).with_suffix(".yaml")).items()}
