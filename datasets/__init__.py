"""Segmentation data sets and their loaders. This file imports neither torch nor torchvision, which take seconds."""

from .base import DatasetError, DatasetInfo, SegmentationDataset

__all__ = ["DatasetError", "DatasetInfo", "SegmentationDataset"]
