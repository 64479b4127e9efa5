"""Published ImageNet weights by name: downloaded when asked for, checked, and kept in the usual cache.

torchvision's files, and those of timm that have an address, go to ``$TORCH_HOME/hub/checkpoints``; their names hold the
start of their SHA-256. The files of smp, and the other ones of timm, go to the Hugging Face cache (``$HF_HOME``), which
names each file by its SHA-256.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import torch

from configs.files import file_sha256
from models.reading import HASH_IN_NAME, CheckpointError

IMAGENET = "imagenet"
_HUB_FILE = "model.safetensors"


def download(source: str) -> Path:
    """Return the local file of published weights, downloaded if it is not in the cache.

    ``source`` is ``torchvision/NAME``, ``timm/NAME`` or ``smp/NAME``. Raises CheckpointError if no such weights are
    published, they cannot be downloaded, or their checksum is wrong.
    """
    address = published(source)
    return _from_url(address) if isinstance(address, str) else _from_hub(*address)


def published(source: str) -> str | tuple[str, str | None]:
    """Return where weights are published: an address, or a Hugging Face repository and its revision."""
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
    """Download into torch's cache, and check against the hash in the file's name."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    match = HASH_IN_NAME.search(path.name)
    expected = match[1] if match else ""
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), expected, progress=sys.stderr.isatty())
        except (OSError, RuntimeError) as error:  # RuntimeError: another hash
            raise CheckpointError(
                f"model.weights=imagenet: {url} cannot be downloaded ({_reason(error)}). "
                f"Fix: download that file on another machine and put it at {path}"
            ) from error
    _check(path, expected)
    return path


def _from_hub(repository: str, revision: str | None) -> Path:
    """Download into the Hugging Face cache, and check against the hash that it names the file by."""
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
    _check(path, name if re.fullmatch(r"[0-9a-f]{64}", name) else "")
    return path


def _check(path: Path, expected: str) -> None:
    """Raise CheckpointError if the SHA-256 of a file does not start with ``expected``."""
    found = file_sha256(path)
    if not found.startswith(expected):
        raise CheckpointError(f"{path}: SHA-256 {found}, expected {expected}... Fix: remove the file.")


def _reason(error: Exception) -> str:
    return (" ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__)[:160]
