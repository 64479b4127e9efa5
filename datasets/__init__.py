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
    "base": ("DatasetInfo", "Sample", "SegmentationDataset"),
    "loaders": ("Batch", "EvalLoader", "TrainLoader"),
    "transforms": ("EvalTransform", "TrainTransform"),
    **{name.lower(): (name,) for name in ("Cityscapes", "Folder", "Synthetic", "VOC2012")},
    "kvasir_seg": ("KvasirSEG",),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
