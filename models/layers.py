"""The output of every network, and building blocks that several networks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError


class SegmentationOutput(NamedTuple):
    """Scores of each class at each pixel, before softmax or sigmoid."""

    logits: Tensor  # (N, C, H, W) at the size of the images
    aux: Tensor | None = None  # (N, C, H, W) of an auxiliary head, in training mode only


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch normalisation after global pooling that also accepts a batch of one.

    A single image pooled to 1x1 has one value per channel and no variance. Such a batch is normalised with the running
    statistics and does not change them.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def allow_batch_of_one(root: nn.Module) -> None:
    """Replace batch normalisation after global pooling by `PooledBatchNorm`, with the same parameters."""
    for module in root.modules():
        if not isinstance(module, nn.Sequential):
            continue
        pooled = any(isinstance(m, nn.AdaptiveAvgPool2d) and m.output_size in (1, (1, 1)) for m in module)
        for name, child in module.named_children():
            if pooled and type(child) is nn.BatchNorm2d:
                replacement = PooledBatchNorm(child.num_features, eps=child.eps, momentum=child.momentum)
                replacement.load_state_dict(child.state_dict())
                setattr(module, name, replacement)


def conv_bn_relu(
    inputs: int, outputs: int, kernel: int = 1, dilation: int = 1, stride: int = 1, pooled: bool = False
) -> nn.Sequential:
    """Return convolution, batch normalisation and ReLU; the output has the input's size divided by ``stride``."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        (PooledBatchNorm if pooled else nn.BatchNorm2d)(outputs),
        nn.ReLU(inplace=True),
    )


def initialise_new_layers(*modules: nn.Module) -> None:
    """Initialise the layers without ImageNet weights as the experiments of the paper did.

    Convolutions: Kaiming normal (fan in, ReLU), biases as PyTorch leaves them. Batch normalisation: weight 1,
    bias 1e-4. Source: the released code of Dai & Li, JMLR 24(224), 2023.
    """
    for module in (layer for root in modules for layer in root.modules()):
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.constant_(module.bias, 1e-4)


def narrow_layers(network: nn.Module, factor: int, num_classes: int, weights: object) -> None:
    """Keep one in ``factor`` channels of every layer and initialise the layers again, for small test networks."""
    if factor == 1:
        return
    if weights is not None:
        raise UserError(
            f"weights={weights} fit the full network only, got narrow={factor}. Fix: set weights=null or narrow=1."
        )

    def fewer(channels: int) -> int:
        if channels in (3, num_classes):  # input and output of the network
            return channels
        if factor < 1 or channels % factor:
            raise UserError(
                f"narrow={factor} does not divide a layer of {channels} channels. Fix: choose a smaller power of two."
            )
        return channels // factor

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            layer.in_channels, layer.out_channels = fewer(layer.in_channels), fewer(layer.out_channels)
            layer.groups = max(1, layer.groups // factor)
            first = layer.out_channels
        elif isinstance(layer, nn.BatchNorm2d):
            layer.num_features = first = fewer(layer.num_features)
        elif isinstance(layer, nn.GroupNorm):
            layer.num_channels = first = fewer(layer.num_channels)
            layer.num_groups = max(1, layer.num_groups // factor)
        elif next(layer.children(), None) is None and next(layer.parameters(), None) is not None:
            raise UserError(f"narrow={factor} cannot divide a layer of type {type(layer).__name__}. Fix: set narrow=1.")
        else:
            continue
        for name, values in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            cut = values.detach()[:first] if values.ndim else values
            if isinstance(layer, nn.Conv2d) and values.ndim > 1:
                cut = cut[:, : layer.in_channels // layer.groups]
            setattr(layer, name, nn.Parameter(cut.clone()) if isinstance(values, nn.Parameter) else cut.clone())
        layer.reset_parameters()


def resize(maps: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Resize maps (N, C, *, *) to ``size`` with bilinear interpolation."""
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=align_corners)
