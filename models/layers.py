"""Building blocks that several networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError


class PooledBatchNorm(nn.BatchNorm2d):
    """Batch normalisation behind global pooling, which a batch of one does not break.

    One image pooled to 1x1 leaves a single value a channel, which has no variance. Such a batch is normalised
    with the running statistics and leaves them alone; with two images or more this is ``nn.BatchNorm2d``.
    """

    def forward(self, input: Tensor) -> Tensor:
        if self.training and input.shape[0] * input.shape[2] * input.shape[3] == 1:
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        return super().forward(input)


def allow_batch_of_one(root: nn.Module) -> None:
    """Replace, in a network built elsewhere, the normalisation behind global pooling; parameters stay."""
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
    """A convolution padded to keep the size (over ``stride``), normalised and rectified."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=False),
        (PooledBatchNorm if pooled else nn.BatchNorm2d)(outputs),
        nn.ReLU(inplace=True),
    )


def initialise_new_layers(*modules: nn.Module) -> None:
    """Start the layers that no ImageNet weights exist for as the experiments did.

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
    """Leave one channel in ``factor`` in every layer, drawn anew: the same network, small enough to try things with.

    Raises:
        ValueError: a layer's channels cannot be divided so, or ``weights`` of the whole network are asked for.
    """
    if factor == 1:
        return
    if weights is not None:
        raise UserError(
            f"weights={weights} are those of the whole network; with narrow={factor} set weights=null"
        )

    def fewer(channels: int) -> int:
        if channels in (3, num_classes):  # the image's and the classes'
            return channels
        if factor < 1 or channels % factor:
            raise UserError(
                f"narrow={factor} does not divide a layer of {channels} channels; try a smaller power of two"
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
            raise UserError(
                f"narrow={factor} cannot divide a layer of type {type(layer).__name__}; set narrow=1"
            )
        else:
            continue
        for name, values in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
            cut = values.detach()[:first] if values.ndim else values
            if isinstance(layer, nn.Conv2d) and values.ndim > 1:
                cut = cut[:, : layer.in_channels // layer.groups]
            setattr(
                layer, name, nn.Parameter(cut.clone()) if isinstance(values, nn.Parameter) else cut.clone()
            )
        layer.reset_parameters()


def resize(maps: Tensor, size: Sequence[int], align_corners: bool) -> Tensor:
    """Maps (N, C, *, *) brought to ``size`` bilinearly."""
    return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=align_corners)
