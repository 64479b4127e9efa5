"""A small U-Net that trains on a CPU in minutes."""

from __future__ import annotations

from torch import Tensor, nn

from configs.errors import UserError
from models.layers import SegmentationOutput, conv_bn_relu, resize


class TinyUNet(nn.Module):
    """A U-Net with a third of a million parameters.

    ``widths`` are the channels of its levels, the finest first. The finest level has half the resolution of the images.
    """

    aux_weight = 0.0

    def __init__(self, num_classes: int, weights: None = None, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        if weights is not None:
            raise UserError(
                f"model.weights={weights!r} is invalid: TinyUNet has no pre-trained weights. Fix: set it to null."
            )
        self.num_classes = num_classes
        self.down = nn.ModuleList(
            nn.Sequential(conv_bn_relu(inputs, width, 3, stride=2), conv_bn_relu(width, width, 3))
            for inputs, width in zip((3, *widths[:-1]), widths, strict=True)
        )
        self.lateral = nn.ModuleList(
            nn.Conv2d(coarse, fine, 1) for fine, coarse in zip(widths[-2::-1], widths[:0:-1], strict=True)
        )
        self.up = nn.ModuleList(conv_bn_relu(width, width, 3) for width in widths[-2::-1])
        self.classifier = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Map images (N, 3, H, W) to logits (N, C, H, W)."""
        levels = []
        features = images
        for stage in self.down:
            features = stage(features)
            levels.append(features)
        for lateral, stage, finer in zip(self.lateral, self.up, levels[-2::-1], strict=True):
            features = stage(finer + resize(lateral(features), finer.shape[-2:], align_corners=False))
        return SegmentationOutput(resize(self.classifier(features), images.shape[-2:], align_corners=False))

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return no parameters: all start from random values and have the full learning rate."""
        return []
