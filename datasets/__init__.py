"""Segmentation data sets: thin, checked before use, and read the same way everywhere."""

from .base import DatasetError, DatasetInfo, Sample, SegmentationDataset
from .kvasir_seg import KvasirSEG
from .loaders import Batch, EvalLoader, TrainLoader
from .synthetic import Synthetic
from .transforms import EvalTransform, TrainTransform
from .voc2012 import VOC2012

__all__ = [
    "VOC2012",
    "Batch",
    "DatasetError",
    "DatasetInfo",
    "EvalLoader",
    "EvalTransform",
    "KvasirSEG",
    "Sample",
    "SegmentationDataset",
    "Synthetic",
    "TrainLoader",
    "TrainTransform",
]
