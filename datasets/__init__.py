"""Segmentation data sets: thin, checked before use, and read the same way everywhere.

All but the error is imported where it is first asked for: torch takes a second, torchvision more.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import DatasetError

if TYPE_CHECKING:
    from .base import DatasetInfo, Sample, SegmentationDataset
    from .cityscapes import Cityscapes
    from .folder import Folder
    from .kvasir_seg import KvasirSEG
    from .loaders import Batch, EvalLoader, TrainLoader
    from .synthetic import Synthetic
    from .transforms import EvalTransform, TrainTransform
    from .voc2012 import VOC2012

__all__ = [
    "VOC2012",
    "Batch",
    "Cityscapes",
    "DatasetError",
    "DatasetInfo",
    "EvalLoader",
    "EvalTransform",
    "Folder",
    "KvasirSEG",
    "Sample",
    "SegmentationDataset",
    "Synthetic",
    "TrainLoader",
    "TrainTransform",
]

_LATER = {
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
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LATER[name]}"), name)
