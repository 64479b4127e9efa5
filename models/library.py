"""Architectures of segmentation_models_pytorch, with the encoders of that package and most of timm's."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from inspect import signature
from pathlib import Path
from typing import Any

import segmentation_models_pytorch as smp
import timm
import torch.nn.functional as F
from torch import Tensor, nn

from configs.errors import UserError
from models.layers import SegmentationOutput, allow_batch_of_one, narrow_layers, resize
from models.weights import LITE0, load_backbone

ARCHITECTURES = {
    network.__name__.lower(): network
    for network in (
        smp.Unet, smp.UnetPlusPlus, smp.MAnet, smp.Linknet, smp.FPN, smp.PSPNet, smp.DeepLabV3, smp.DeepLabV3Plus,
        smp.PAN, smp.UPerNet, smp.Segformer, smp.DPT,
    )
}  # fmt: skip
# Without these, smp's PSPNet never runs the last two stages of its encoder.
_DEFAULTS: dict[str, dict[str, Any]] = {"pspnet": {"encoder_depth": 5, "output_stride": 8}}


class SMP(nn.Module):
    """A network of segmentation_models_pytorch that takes images of any size.

    Images are padded at the right and the bottom, by repeating the border, up to a multiple of the stride;
    the logits are cropped back.

    For an ``encoder_depth`` below 5, use an encoder of timm (tu-NAME). Those of smp keep the unused stages, and DDP
    rejects unused parameters.
    """

    aux_weight = 0.0

    def __init__(
        self,
        arch: str,  # one of ARCHITECTURES
        encoder: str,  # name of an smp encoder, or tu-NAME of a timm encoder
        num_classes: int,
        weights: str | Path | None = None,  # pre-trained weights of the encoder
        narrow: int = 1,  # keep one in `narrow` channels, for small test networks
        **options: Any,  # options of the architecture: encoder_depth, decoder_channels, ...
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.network: Any = _build(arch, encoder, num_classes, options)
        allow_batch_of_one(self.network)
        narrow_layers(self.network, narrow, num_classes, weights)
        self.pretrained = weights is not None
        if weights is not None:
            _load_encoder(self.network.encoder, encoder, weights, truncated=options.get("encoder_depth", 5) < 5)

    def forward(self, images: Tensor) -> SegmentationOutput:
        """Map images (N, 3, H, W) to logits (N, C, H, W)."""
        height, width = images.shape[-2:]
        stride = self.network.encoder.output_stride
        padding = (0, -width % stride, 0, -height % stride)
        if any(padding):
            images = F.pad(images, padding, mode="replicate")
        logits = self.network(images)
        if logits.shape[-2:] != images.shape[-2:]:  # some options change the stride but not the upsampling
            logits = resize(logits, images.shape[-2:], align_corners=False)
        return SegmentationOutput(logits[..., :height, :width])

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of a pre-trained encoder. A random encoder has the full learning rate."""
        return list(self.network.encoder.parameters()) if self.pretrained else []


def _build(arch: str, encoder: str, num_classes: int, options: dict[str, Any]) -> nn.Module:
    """Return a network of smp with random weights, because smp would download weights from a hub."""
    key = arch.lower()
    if key not in ARCHITECTURES:
        raise UserError(f"model.arch={arch!r} is unknown: {_suggest(key, ARCHITECTURES)}")
    if encoder not in smp.encoders.encoders:
        of_timm = [f"tu-{name}" for name in timm.list_models()]
        if encoder.split(".")[0] not in of_timm:
            names = of_timm if encoder.startswith("tu-") else [*smp.encoders.encoders, *of_timm]
            raise UserError(f"model.encoder={encoder!r} is unknown: {_suggest(encoder, names)}")
    known = options_of(key)
    unknown = [option for option in options if option not in known]
    if unknown and not encoder.startswith("tu-"):  # smp would ignore it; timm's encoders check their own options
        raise UserError(
            f"model.{unknown[0]} is not an option of architecture {key!r}. Fix: choose from {', '.join(sorted(known))}."
        )
    plain = {name: list(v) if isinstance(v, (list, tuple)) else v for name, v in options.items()}
    try:
        return ARCHITECTURES[key](
            encoder_name=encoder, encoder_weights=None, classes=num_classes, **_DEFAULTS.get(key, {}) | plain
        )
    except (TypeError, ValueError, KeyError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"model.arch={arch} cannot be built on model.encoder={encoder} with {plain or 'its defaults'}: "
            f"{reason[0] if reason else type(error).__name__}. Fix: choose another encoder or other options."
        ) from error


def options_of(arch: str) -> set[str]:
    """Return the options of an architecture that a configuration may set, in addition to the arguments of `SMP`."""
    parameters = signature(ARCHITECTURES[arch.lower()]).parameters.items()
    names = {name for name, parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD}
    return (names - {"encoder_name", "encoder_weights", "in_channels", "classes", "aux_params"}) | {"output_stride"}


def _suggest(name: str, names: Iterable[str]) -> str:
    """Return a hint: the most similar names, or all names if there are few."""
    names = list(names)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"choose one of {', '.join(names)}" if len(names) < 20 else "choose one of smp's, or tu-NAME of timm's"


def _load_encoder(encoder: Any, name: str, weights: str | Path, truncated: bool) -> None:
    """Load pre-trained weights into an encoder. smp wraps timm's networks in an attribute ``model``."""
    if str(weights) == LITE0 and name != "tu-tf_efficientnet_lite0":
        raise UserError(
            f"model.weights={LITE0} fits model.encoder=tu-tf_efficientnet_lite0 only, not {name}. "
            "Fix: choose that encoder, or other weights."
        )
    if not hasattr(encoder, "model"):
        load_backbone(encoder, weights, truncated, source=f"smp/{name}")
        return
    # smp builds some of its older ``timm-NAME`` encoders from timm too.
    timm_name = name.removeprefix("tu-").removeprefix("timm-")
    if name.startswith("timm-mobilenetv3"):
        timm_name = f"tf_{timm_name}"
    load_backbone(encoder.model, weights, truncated, source=f"timm/{timm_name}")
