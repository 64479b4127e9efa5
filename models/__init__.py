"""Networks: the three of the paper and those of segmentation_models_pytorch; safe reading of checkpoints.

A network maps images (N, 3, H, W) to `SegmentationOutput`: logits (N, C, H, W). ``weights`` are those of its backbone
(see ``models/weights.py``). ``narrow`` divides the channels of every layer, for small test networks.

Networks that need torchvision or timm are imported on first use, because these imports are slow.
"""

from importlib import import_module
from typing import Any

from models.layers import SegmentationOutput
from models.reading import CheckpointError, load_state, read_checkpoint
from models.tiny import TinyUNet

__all__ = ["CheckpointError", "SegmentationOutput", "TinyUNet", "load_state", "read_checkpoint"]

_MODULES = {"DeepLabV3Plus": "deeplabv3plus", "FCN8": "fcn8", "PSPNet": "pspnet", "SMP": "library"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
