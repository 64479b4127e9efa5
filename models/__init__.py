"""Networks: the paper's three and any of segmentation_models_pytorch; weights and checkpoints read safely."""

from models.library import SMP
from models.output import SegmentationOutput
from models.reading import CheckpointError, load_state, read_checkpoint
from models.tiny import TinyUNet

__all__ = ["SMP", "CheckpointError", "SegmentationOutput", "TinyUNet", "load_state", "read_checkpoint"]
