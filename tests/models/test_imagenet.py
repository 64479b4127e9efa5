"""model.weights=imagenet against a server on the loopback address; nothing else is contacted."""

from __future__ import annotations

import contextlib
import hashlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import timm
import torch
import torchvision

from models import CheckpointError, weights
from models.deeplabv3plus import DeepLabV3Plus
from models.fcn8 import FCN8
from models.library import SMP
from models.pspnet import PSPNet


@contextlib.contextmanager
def server(files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Serve files by path as torch's and Hugging Face's servers do; give the address and the list of requests."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            asked.append(f"{self.command} {path}")
            body = files.get(path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.send_header("ETag", f'"{hashlib.sha256(body or b"").hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.end_headers()
            if self.command == "GET" and body:
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", asked
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


def saved(state: dict, folder: Path) -> bytes:
    torch.save(state, folder / "state.pth")
    return (folder / "state.pth").read_bytes()


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet", "smp"])
def test_weights_are_downloaded_once_and_loaded(
    name: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(3)
    if name == "deeplabv3plus":
        source, state = "torchvision/resnet101", torchvision.models.resnet101().state_dict()
    elif name == "pspnet":
        source, state = "timm/resnet50s", timm.create_model("resnet50s").state_dict()
    else:
        source, state = "timm/resnet18.tv_in1k", timm.create_model("resnet18").state_dict()
    content = saved(state, tmp_path)
    file = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with server({f"/{file}": content}) as (address, asked):
        wanted: list[str] = []

        def published(given: str) -> str:
            wanted.append(given)
            return f"{address}/{file}"

        monkeypatch.setattr(weights, "find_published", published)
        with torch.device("meta"):  # only what is loaded gets memory
            if name == "smp":
                network = SMP("unet", "tu-resnet18.tv_in1k", 2, weights="imagenet").network.encoder.model
            else:
                network = (DeepLabV3Plus if name == "deeplabv3plus" else PSPNet)(2, "imagenet").backbone
        assert weights.download(source) == own_cache / file
        assert wanted == [source] * 2
        assert asked == [f"GET /{file}"]
    assert (own_cache / file).is_file()
    own = network.state_dict()
    assert own and all(torch.equal(own[key], state[key]) for key in own if key in state)
    assert sum(key in state for key in own) == len(own)


def test_fcn8_gets_the_layers_of_vgg16(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear layers of VGG16 become convolutions."""
    torch.manual_seed(5)
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in torchvision.models.vgg16().state_dict().items()}
    # Every layer is a view of the same values, but starts at another one: the file has 200 MB instead of 550.
    values = (torch.randn(1_000_003) / 100).half().repeat(103)
    state = {key: values[n : n + shape.numel()].view(shape) for n, (key, shape) in enumerate(shapes.items())}
    content = saved(state, tmp_path)
    file = f"vgg16-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    with server({f"/{file}": content}) as (address, asked):
        wanted: list[str] = []
        monkeypatch.setattr(weights, "find_published", lambda source: wanted.append(source) or f"{address}/{file}")
        with torch.device("meta"):
            network = FCN8(2, "imagenet")
    assert wanted == ["torchvision/vgg16"] and asked == [f"GET /{file}"]
    own = network.state_dict()
    for key in ("classifier.0", "classifier.3"):
        assert torch.equal(own[f"{key}.weight"].flatten(1), state[f"{key}.weight"].float()), key
        assert torch.equal(own[f"{key}.bias"], state[f"{key}.bias"].float())
    convolutions = [key for key in state if key.startswith("features")]
    assert len(convolutions) == 26 and all(torch.equal(own[key], state[key].float()) for key in convolutions)


def test_a_wrong_checksum_is_rejected(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server({"/a-00000000.pth": b"something else"}) as (address, _):
        monkeypatch.setattr(weights, "find_published", lambda source: f"{address}/a-00000000.pth")
        with pytest.raises(CheckpointError, match=r"a-00000000\.pth"):
            weights.download("torchvision/resnet101")
    assert not list(own_cache.glob("*"))
    own_cache.mkdir(parents=True, exist_ok=True)
    (own_cache / "a-00000000.pth").write_bytes(b"put there by hand")
    with pytest.raises(CheckpointError, match="SHA-256"):
        weights.download("torchvision/resnet101")


def test_offline_says_which_file_to_put_where(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with server({}) as (address, _):
        pass  # a port that nobody listens on
    monkeypatch.setattr(weights, "find_published", lambda source: f"{address}/vgg16-397923af.pth")
    with pytest.raises(CheckpointError) as caught:
        weights.download("torchvision/vgg16")
    message = str(caught.value)
    assert f"{address}/vgg16-397923af.pth" in message and "\n" not in message
    assert str(own_cache / "vgg16-397923af.pth") in message


@pytest.mark.parametrize("offline", [False, True])
def test_hugging_face_files(offline: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import segmentation_models_pytorch as smp
    from huggingface_hub import constants
    from safetensors.torch import save

    torch.manual_seed(4)
    state = smp.encoders.get_encoder("resnet18").state_dict()
    state = {key: torch.randn_like(v) if v.is_floating_point() else v for key, v in state.items()}
    content = save(state)
    repository, revision = weights.find_published("smp/resnet18")
    path = f"/{repository}/resolve/{revision}/model.safetensors"
    with server({} if offline else {path: content}) as (address, asked):
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        if offline:
            with pytest.raises(CheckpointError, match=rf"{path}.*model\.weights=PATH") as caught:
                SMP("unet", "resnet18", 2, weights="imagenet")
            assert "\n" not in str(caught.value)
            return
        network = SMP("unet", "resnet18", 2, weights="imagenet")
    assert f"GET {path}" in asked
    own = network.network.encoder.state_dict()
    assert own and all(torch.equal(own[key], state[key]) for key in own)


def test_published_places() -> None:
    """The paper's networks have an address with a checksum; unknown encoders are named."""
    for source in ("torchvision/resnet101", "torchvision/vgg16", "timm/resnet50s", "timm/tf_efficientnet_lite0"):
        address = weights.find_published(source)
        assert isinstance(address, str) and re.search(r"^https://.*-[0-9a-f]{8}\.pth$", address)
    repository, revision = weights.find_published("smp/efficientnet-b0")
    assert repository and len(revision) == 40
    for source in ("smp/resnext101_32x4d", "timm/test_vit_none"):
        with pytest.raises(CheckpointError, match=source.partition("/")[2]):
            weights.find_published(source)
