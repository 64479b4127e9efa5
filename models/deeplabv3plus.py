"""DeepLabV3+ on ResNet-101, as in the experiments of Dai & Li, JMLR 24(224), 2023.

The architecture is Chen et al., "Encoder-Decoder with Atrous Separable Convolution", ECCV 2018, with ordinary
instead of separable convolutions and an output stride of 16.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import ResNet, resnet101

from models.layers import SegmentationOutput, conv_bn_relu, initialise_new_layers, narrow_layers, resize
from models.weights import load_backbone

RATES = (6, 12, 18)


class DeepLabV3Plus(nn.Module):
    """DeepLabV3+ with torchvision's ``resnet101``."""

    aux_weight = 0.0

    def __init__(self, num_classes: int, weights: str | Path | None = None, narrow: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = _dilated_resnet101()
        if weights is not None:
            load_backbone(self.backbone, weights, source="torchvision/resnet101")
        self.aspp = ASPP(2048, 256)
        self.low_level = conv_bn_relu(256, 48)
        self.decoder = nn.Sequential(
            *conv_bn_relu(48 + 256, 256, 3), *conv_bn_relu(256, 256, 3), nn.Dropout(0.1), nn.Conv2d(256, num_classes, 1)
        )
        initialise_new_layers(self.aspp, self.low_level, self.decoder)
        narrow_layers(self, narrow, num_classes, weights)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Map images (N, 3, H, W) to logits (N, C, H, W)."""
        net = self.backbone
        stem = net.maxpool(net.relu(net.bn1(net.conv1(images))))
        fine = net.layer1(stem)
        coarse = self.aspp(net.layer4(net.layer3(net.layer2(fine))))
        fine = self.low_level(fine)
        coarse = resize(coarse, fine.shape[-2:], align_corners=True)
        logits = self.decoder(torch.cat((fine, coarse), dim=1))
        return SegmentationOutput(resize(logits, images.shape[-2:], align_corners=True))

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the ResNet, which have a reduced learning rate."""
        return list(self.backbone.parameters())


class ASPP(nn.Module):
    """Atrous spatial pyramid pooling: features at five scales, the last of which is the whole image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [conv_bn_relu(inputs, outputs), *(conv_bn_relu(inputs, outputs, 3, dilation=r) for r in RATES)]
        )
        self.image = nn.Sequential(nn.AdaptiveAvgPool2d(1), *conv_bn_relu(inputs, outputs, pooled=True))
        self.merge = nn.Sequential(*conv_bn_relu(5 * outputs, outputs), nn.Dropout(0.5))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (N, 2048, h, w) to (N, 256, h, w)."""
        image = self.image(features).expand(-1, -1, *features.shape[-2:])
        return self.merge(torch.cat([*(branch(features) for branch in self.branches), image], dim=1))


def _dilated_resnet101() -> ResNet:
    """Return a ResNet-101 with output stride 16 and without classifier.

    torchvision does not dilate the first 3x3 convolution of a dilated stage. Here all 3x3 convolutions of ``layer4``
    have dilation 2.
    """
    net = resnet101(weights=None, replace_stride_with_dilation=[False, False, True])
    first = net.layer4[0].conv2
    first.dilation, first.padding = (2, 2), (2, 2)
    del net.avgpool, net.fc
    return net
