"""FCN-8s on VGG16, as in the experiments of Dai & Li, JMLR 24(224), 2023 (whose tables say "resnet101").

The architecture is Shelhamer, Long & Darrell, "Fully Convolutional Networks for Semantic Segmentation", TPAMI
2017: the classifier of VGG16 as convolutions, added to scores of two finer stages, each enlarged by a fixed
bilinear transposed convolution.

Legend: N images, C classes, H x W pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import VGG, vgg16

from models.layers import narrow_layers
from models.output import SegmentationOutput
from models.weights import load_backbone

POOL3, POOL4 = 17, 24  # where these stages of VGG16 end
# The finer stages are scaled down, so that training begins from the coarse map (the reference FCN's scales).
POOL3_SCALE, POOL4_SCALE = 1e-4, 1e-2


class FCN8(nn.Module):
    """FCN-8s with torchvision's VGG16, its fully connected layers included.

    Args:
        num_classes: C.
        weights: None, or the path of ImageNet weights of torchvision's ``vgg16``.
        narrow: divides the channels of every layer; 16 makes a network to try things with.

    Raises:
        ValueError: the weights are not of a VGG16.
        FileNotFoundError: there is no such file.
    """

    aux_weight = 0.0
    enlarge2: Tensor
    enlarge8: Tensor

    def __init__(self, num_classes: int, weights: str | Path | None = None, narrow: int = 1) -> None:
        super().__init__()
        self.num_classes = num_classes
        vgg = vgg16(weights=None)
        vgg.classifier = vgg.classifier[:6]  # without ImageNet's scores
        if weights is not None:
            load_backbone(vgg, weights, truncated=True)
        self.features = _padded_features(vgg)
        self.classifier = nn.Sequential(
            _as_convolution(vgg.classifier[0], kernel=7),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            _as_convolution(vgg.classifier[3], kernel=1),
            nn.ReLU(inplace=True),
            nn.Dropout(0.5),
            nn.Conv2d(4096, num_classes, 1),
        )
        self.pool4 = nn.Conv2d(512, num_classes, 1)
        self.pool3 = nn.Conv2d(256, num_classes, 1)
        self.register_buffer("enlarge2", bilinear_kernel(4), persistent=False)
        self.register_buffer("enlarge8", bilinear_kernel(16), persistent=False)
        narrow_layers(self, narrow, num_classes, weights)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Images (N, 3, H, W) to logits (N, C, H, W)."""
        pool3 = self.features[:POOL3](images)
        pool4 = self.features[POOL3:POOL4](pool3)
        scores = self.classifier(self.features[POOL4:](pool4))
        scores = _add(_enlarge(scores, self.enlarge2, 2), self.pool4(POOL4_SCALE * pool4), offset=5)
        scores = _add(_enlarge(scores, self.enlarge2, 2), self.pool3(POOL3_SCALE * pool3), offset=9)
        height, width = images.shape[-2:]
        logits = _enlarge(scores, self.enlarge8, 8)[..., 31 : 31 + height, 31 : 31 + width]
        return SegmentationOutput(logits)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """What learns at a tenth of the rate: all but the two adapters, even the new score layer."""
        return [*self.features.parameters(), *self.classifier.parameters()]


def bilinear_kernel(size: int) -> Tensor:
    """The (size, size) kernel with which a transposed convolution of stride ``size / 2`` is bilinear."""
    positions = torch.arange(size, dtype=torch.float32)
    tent = 1 - (positions - (size - 1) / 2).abs() / (size / 2)
    return torch.outer(tent, tent)


def _padded_features(vgg: VGG) -> nn.Sequential:
    """VGG16's convolutions, padded by 100 pixels for the 7x7 one; pooling keeps an odd last row."""
    features = vgg.features
    features[0].padding = (100, 100)
    for layer in features:
        if isinstance(layer, nn.MaxPool2d):
            layer.ceil_mode = True
    return features


def _as_convolution(linear: nn.Linear, kernel: int) -> nn.Conv2d:
    """A fully connected layer as a convolution over ``kernel`` x ``kernel`` windows, weights unchanged."""
    inputs = linear.in_features // kernel**2
    convolution = nn.Conv2d(inputs, linear.out_features, kernel, device="meta")
    convolution.weight = nn.Parameter(linear.weight.detach().view(-1, inputs, kernel, kernel))
    convolution.bias = linear.bias
    return convolution


def _enlarge(scores: Tensor, kernel: Tensor, factor: int) -> Tensor:
    """Scores (N, C, h, w) enlarged, each class by itself."""
    channels = scores.shape[1]
    weight = kernel.to(scores.dtype).expand(channels, 1, -1, -1)
    return F.conv_transpose2d(scores, weight, stride=factor, groups=channels)


def _add(coarse: Tensor, fine: Tensor, offset: int) -> Tensor:
    """Both scores on the coarse map's extent, which lies ``offset`` inside the fine one."""
    height, width = coarse.shape[-2:]
    return coarse + fine[..., offset : offset + height, offset : offset + width]
