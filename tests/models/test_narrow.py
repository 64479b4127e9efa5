"""Narrow networks: the same layers and wiring as the whole ones, with a share of their channels."""

from __future__ import annotations

import functools

import pytest
import torch

from models.deeplabv3plus import DeepLabV3Plus
from models.fcn8 import FCN8
from models.library import SMP
from models.pspnet import PSPNet

NETWORKS = {
    "deeplabv3plus": functools.partial(DeepLabV3Plus, 5),
    "pspnet": functools.partial(PSPNet, 5),
    "fcn8": functools.partial(FCN8, 5),
    **{
        f"smp_{arch}": functools.partial(SMP, arch, "resnet34", 5)
        for arch in ("deeplabv3plus", "pspnet", "unet", "fpn")
    },
    "grouped": functools.partial(SMP, "unet", "se_resnext50_32x4d", 5),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_narrow_network_is_the_whole_one_with_fewer_channels(name):
    make = NETWORKS[name]
    with torch.device("meta"):  # shapes only
        whole = make().state_dict()
    small = make(narrow=16)
    assert list(small.state_dict()) == list(whole)
    for key, tensor in small.state_dict().items():
        for ours, theirs in zip(tensor.shape[:2], whole[key].shape[:2], strict=True):
            assert ours in (theirs // 16, theirs), key
    count = sum(parameter.numel() for parameter in small.parameters())
    assert count < sum(tensor.numel() for tensor in whole.values()) / 100

    logits = small.train()(torch.randn(2, 3, 40, 56)).logits
    assert logits.shape == (2, 5, 40, 56)
    logits.square().mean().backward()
    for key, parameter in small.named_parameters():
        assert parameter.grad is not None or "auxiliary" in key, key


def test_the_seed_decides_the_weights():
    def build() -> dict[str, torch.Tensor]:
        torch.manual_seed(3)
        return NETWORKS["smp_fpn"](narrow=8).state_dict()

    first, second = build(), build()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("unet", "resnet18", 5), {"narrow": 7}, "narrow=7 does not divide a layer of 64 channels"),
        (("unet", "resnet18", 5), {"narrow": 0}, "narrow=0 does not divide"),
        (("unet", "resnet18", 5, "x.pth"), {"narrow": 16}, "weights=x.pth .*narrow=16"),
        (("segformer", "mit_b0", 5), {"narrow": 16}, "cannot divide a layer of type LayerNorm"),
    ],
)
def test_what_cannot_be_narrowed_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        SMP(*arguments, **options)
