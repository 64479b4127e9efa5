"""PSPNet on ResNet-50, as in the experiments of Dai & Li, JMLR 24(224), 2023.

The architecture is Zhao et al., "Pyramid Scene Parsing Network", CVPR 2017: a ResNet-50 whose stem is
three 3x3 convolutions, dilated to an output stride of 8, and an auxiliary head on its third stage.
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from models.layers import SegmentationOutput, conv_bn_relu, initialise_new_layers, narrow_layers, resize
from models.weights import load_backbone

BINS = (1, 2, 3, 6)


class PSPNet(nn.Module):
    """PSPNet with timm's ``resnet50s``."""

    aux_weight = 0.4

    def __init__(self, num_classes: int, weights: str | Path | None = None, narrow: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        # layer3 and layer4 have dilation 2 and 4, their first blocks 1 and 2.
        self.backbone = timm.create_model(
            "resnet50s", pretrained=False, output_stride=8, features_only=True, out_indices=(3, 4)
        )
        if weights is not None:
            load_backbone(self.backbone, weights, source="timm/resnet50s")
        self.pyramid = Pyramid(2048)
        self.classifier = nn.Conv2d(512, num_classes, 1)
        self.auxiliary = nn.Sequential(*conv_bn_relu(1024, 512, 3), nn.Dropout2d(0.1), nn.Conv2d(512, num_classes, 1))
        initialise_new_layers(self.pyramid, self.classifier, self.auxiliary)
        narrow_layers(self, narrow, num_classes, weights)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Map images (N, 3, H, W) to logits and, in training mode, auxiliary logits: (N, C, H, W) each."""
        size = images.shape[-2:]
        third, fourth = self.backbone(images)
        logits = resize(self.classifier(self.pyramid(fourth)), size, align_corners=False)
        aux = resize(self.auxiliary(third), size, align_corners=False) if self.training else None
        return SegmentationOutput(logits, aux)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the ResNet, which have a reduced learning rate."""
        return list(self.backbone.parameters())


class Pyramid(nn.Module):
    """Concatenate features with their averages over 1, 4, 9 and 36 tiles of the image."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        width = inputs // len(BINS)
        self.levels = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(b), *conv_bn_relu(inputs, width, pooled=b == 1)) for b in BINS
        )
        self.merge = nn.Sequential(*conv_bn_relu(2 * inputs, 512, 3), nn.Dropout2d(0.1))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, 2048, h, w) to (N, 512, h, w)."""
        size = features.shape[-2:]
        levels = [resize(level(features), size, align_corners=True) for level in self.levels]
        return self.merge(torch.cat([features, *levels], dim=1))
