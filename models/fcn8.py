"""FCN-8s on VGG16, as in the experiments of Dai & Li, JMLR 24(224), 2023 (whose tables say "resnet101").

The architecture is Shelhamer, Long & Darrell, "Fully Convolutional Networks for Semantic Segmentation", TPAMI
2017. The classifier of VGG16, as convolutions, gives coarse scores. They are upsampled three times by fixed bilinear
transposed convolutions. After the first and the second time, the scores of a finer stage are added.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import vgg16

from models.layers import SegmentationOutput, narrow_layers
from models.weights import load_backbone

POOL3, POOL4 = 17, 24  # number of layers up to the end of these stages of VGG16
# Scales of the finer stages, as in the reference FCN: training starts from the coarse map.
POOL3_SCALE, POOL4_SCALE = 1e-4, 1e-2


class FCN8(nn.Module):
    """FCN-8s with torchvision's ``vgg16``, including its fully connected layers."""

    aux_weight = 0.0
    enlarge2: Tensor
    enlarge8: Tensor

    def __init__(self, num_classes: int, weights: str | Path | None = None, narrow: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        vgg = vgg16(weights=None)
        vgg.classifier = vgg.classifier[:6]  # without the last layer, the scores of ImageNet
        if weights is not None:
            load_backbone(vgg, weights, truncated=True, source="torchvision/vgg16")
        self.features = vgg.features
        self.features[0].padding = (100, 100)  # for the 7x7 convolution
        for layer in self.features:
            if isinstance(layer, nn.MaxPool2d):
                layer.ceil_mode = True  # keep an odd last row
        self.classifier = nn.Sequential(
            _as_convolution(vgg.classifier[0], kernel=7),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            _as_convolution(vgg.classifier[3], kernel=1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(4096, num_classes, 1),
        )
        # The scores of the finer stages; checkpoints hold these names.
        self.pool4 = nn.Conv2d(512, num_classes, 1)
        self.pool3 = nn.Conv2d(256, num_classes, 1)
        self.register_buffer("enlarge2", bilinear_kernel(4), persistent=False)
        self.register_buffer("enlarge8", bilinear_kernel(16), persistent=False)
        narrow_layers(self, narrow, num_classes, weights)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Map images (N, 3, H, W) to logits (N, C, H, W)."""
        stage3 = self.features[:POOL3](images)
        stage4 = self.features[POOL3:POOL4](stage3)
        scores = self.classifier(self.features[POOL4:](stage4))
        scores = _add(_enlarge(scores, self.enlarge2, 2), self.pool4(POOL4_SCALE * stage4), offset=5)
        scores = _add(_enlarge(scores, self.enlarge2, 2), self.pool3(POOL3_SCALE * stage3), offset=9)
        height, width = images.shape[-2:]
        logits = _enlarge(scores, self.enlarge8, 8)[..., 31 : 31 + height, 31 : 31 + width]
        return SegmentationOutput(logits)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters with a reduced learning rate: VGG16 and the last layer, without `pool3` and `pool4`."""
        return [*self.features.parameters(), *self.classifier.parameters()]


def bilinear_kernel(size: int) -> Tensor:
    """Return the (size, size) kernel of a bilinear transposed convolution with stride ``size / 2``."""
    positions = torch.arange(size, dtype=torch.float32, device="cpu")  # also if the network is built on the meta device
    tent = 1 - (positions - (size - 1) / 2).abs() / (size / 2)
    return torch.outer(tent, tent)


def _as_convolution(linear: nn.Linear, kernel: int) -> nn.Conv2d:
    """Return a fully connected layer as a convolution over ``kernel`` x ``kernel`` windows, with the same weights."""
    inputs = linear.in_features // kernel**2
    convolution = nn.Conv2d(inputs, linear.out_features, kernel, device="meta")
    convolution.weight = nn.Parameter(linear.weight.detach().view(-1, inputs, kernel, kernel))
    convolution.bias = linear.bias
    return convolution


def _enlarge(scores: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """Upsample scores (N, C, h, w), each class separately."""
    channels = scores.shape[1]
    weight = kernel.to(scores.dtype).expand(channels, 1, -1, -1)
    return F.conv_transpose2d(scores, weight, stride=factor, groups=channels)


def _add(coarse: Tensor, fine: Tensor, offset: int) -> Tensor:
    """Add both scores on the area of the coarse map, which starts at ``offset`` of the fine map."""
    height, width = coarse.shape[-2:]
    return coarse + fine[..., offset : offset + height, offset : offset + width]
