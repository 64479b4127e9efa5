"""Segmentation data sets and their loaders.

Everything but DatasetError is imported on first use, because torch and torchvision take seconds.
"""

# ruff: noqa: F401 (the imports for type checkers)

from importlib import import_module
from typing import TYPE_CHECKING, Any

from configs.errors import UserError

if TYPE_CHECKING:
    from .base import DatasetInfo, Sample, SegmentationDataset
    from .cityscapes import Cityscapes
    from .folder import Folder
    from .kvasir_seg import KvasirSEG
    from .loaders import Batch, EvalLoader, TrainLoader
    from .synthetic import Synthetic
    from .transforms import EvalTransform, TrainTransform
    from .voc2012 import VOC2012


class DatasetError(UserError):
    """A fault in a data set. The message names the path and the fix."""


_MODULES = {
    "Batch": "loaders",
    "Cityscapes": "cityscapes",
    "DatasetInfo": "base",
    "EvalLoader": "loaders",
    "EvalTransform": "transforms",
    "Folder": "folder",
    "KvasirSEG": "kvasir_seg",
    "Sample": "base",
    "SegmentationDataset": "base",
    "Synthetic": "synthetic",
    "TrainLoader": "loaders",
    "TrainTransform": "transforms",
    "VOC2012": "voc2012",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
