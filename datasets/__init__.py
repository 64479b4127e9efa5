"""Segmentation data sets: thin, checked before use, and read the same way everywhere."""

from .base import DatasetError, DatasetInfo, Sample, SegmentationDataset
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
