"""The paper's networks give the logits that the original gave, at two sizes, for 19 and 2 classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

from models.published import NETWORKS, load_published, translate_state

pytestmark = pytest.mark.golden
SIZES = ((64, 96), (97, 65))
FULL = {"deeplabv3plus": "DeepLab", "pspnet": "PSPNet", "fcn8": "FCN8"}
LAYOUTS = {"deeplabv3plus": "DeepLab_resnet101", "pspnet": "PSPNet_resnet50", "fcn8": "FCN8"}
slow = pytest.mark.slow


def images(height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(7).standard_normal((2, 3, height, width)).astype(np.float32))


def training_path(network: nn.Module) -> nn.Module:
    """Training mode, in which auxiliary heads speak, with normalisation and dropout as in evaluation."""
    network.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d):
            module.eval()
    return network


@pytest.mark.parametrize(
    ("name", "num_classes"),
    [
        ("deeplabv3plus", 19),
        pytest.param("deeplabv3plus", 2, marks=slow),
        pytest.param("pspnet", 19, marks=slow),
        ("pspnet", 2),
        pytest.param("fcn8", 19, marks=slow),
        ("fcn8", 2),
    ],
)
@torch.no_grad()
def test_full_set(released, recordings, name, num_classes):
    golden = np.load(recordings / f"full/model_{FULL[name]}_{num_classes}.npz")
    network, _ = load_published(released(name, num_classes))
    assert network.num_classes == num_classes
    for height, width in SIZES:
        size = f"{height}x{width}"
        outputs = {"eval": network.eval()(images(height, width)).logits}
        if name == "pspnet":
            main, outputs["aux"] = training_path(network)(images(height, width))
            assert torch.equal(main, outputs["eval"])
        for kind, logits in outputs.items():
            logits, key = logits.numpy(), f"{kind}_{size}"
            if num_classes == 2:
                np.testing.assert_allclose(logits, golden[key], rtol=0, atol=1e-4)
                continue
            np.testing.assert_allclose(logits[:, :, ::3, ::3], golden[f"{key}_s3"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(logits[:, :, -1], golden[f"{key}_lastrow"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(logits[..., -1], golden[f"{key}_lastcol"], rtol=0, atol=1e-4)
            np.testing.assert_allclose(logits.std((0, 2, 3)), golden[f"{key}_chan_std"], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_classes"), [(n, c) for n in ("deeplabv3plus", "pspnet", "fcn8") for c in (19, 2)]
)
@torch.no_grad()
def test_short_set(released, recordings, name, num_classes):
    golden = np.load(recordings / f"model_{name}_{num_classes}classes.npz")
    network, _ = load_published(released(name, num_classes, full=False))
    for height, width in SIZES:
        size = f"{height}x{width}"
        logits = network.eval()(images(height, width)).logits.numpy()
        np.testing.assert_allclose(logits[:, :, ::3, ::3], golden[f"logits_{size}_every3"], rtol=0, atol=1e-4)
        if name == "pspnet":
            aux = training_path(network)(images(height, width)).aux.numpy()
            np.testing.assert_allclose(aux[:, :, ::3, ::3], golden[f"aux_{size}_every3"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["deeplabv3plus", "pspnet", "fcn8"])
def test_parameter_groups(recordings, name):
    """The names at a tenth of the rate, and the rest, are the original's two groups."""
    groups = json.loads((recordings / "full/param_groups.json").read_text())[LAYOUTS[name]]
    with torch.device("meta"):  # names only
        network = NETWORKS[name](19)
    slower = {id(parameter) for parameter in network.backbone_parameters()}
    ours = dict(network.named_parameters())
    for key, is_slow in (("group0_decoder_lr", False), ("group1_backbone_lr_div10", True)):
        wanted = set(translate_state(name, dict.fromkeys(groups[key])))
        assert {n for n, p in ours.items() if (id(p) in slower) is is_slow} == wanted
    assert all(parameter.requires_grad for parameter in ours.values())
