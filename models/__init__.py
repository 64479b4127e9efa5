"""Networks: the paper's three and any of segmentation_models_pytorch; weights and checkpoints read safely."""

from models.deeplabv3plus import DeepLabV3Plus
from models.fcn8 import FCN8
from models.library import SMP
from models.output import SegmentationOutput
from models.pspnet import PSPNet
from models.reading import CheckpointError, load_state, read_checkpoint
from models.tiny import TinyUNet

__all__ = [
    "FCN8",
    "SMP",
    "CheckpointError",
    "DeepLabV3Plus",
    "PSPNet",
    "SegmentationOutput",
    "TinyUNet",
    "load_state",
    "read_checkpoint",
]
