"""What a prediction has to know of the data set: its classes, colours and normalisation, without its images."""

from __future__ import annotations

from pathlib import Path

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf

from configs import build
from datasets import DatasetInfo, Folder
from datasets.folder import read_class_table


def facts(cfg: DictConfig, classes: Path | None = None) -> DatasetInfo:
    """Return the facts of the data set that a network was trained on, or of a classes.yaml.

    Raises:
        FileNotFoundError: the network was trained on a folder whose classes.yaml is not there.
    """
    kind = get_class(cfg.dataset.source._target_)
    name = str(cfg.dataset.name)
    if classes is None and kind is Folder:
        own = cfg.dataset.classes
        if OmegaConf.is_config(own):  # the table itself
            return read_class_table(name, OmegaConf.to_object(own)).info  # type: ignore[arg-type]
        classes = Path(own or Path(cfg.dataset.root) / "classes.yaml").expanduser()
        if not classes.is_file():
            raise FileNotFoundError(f"{classes}, which names the classes, is not there: pass --classes PATH")
    if classes is not None:
        return read_class_table(name, classes).info
    known = getattr(kind, "info", None)
    return known or build.dataset(cfg, next(iter(cfg.dataset.splits))).info
