"""What every network owes its users. A new one is another line in ``NETWORKS``."""

from __future__ import annotations

import functools
import socket
from collections.abc import Callable

import pytest
import torch
from torch import nn

from models import CheckpointError, load_state
from models.deeplabv3plus import DeepLabV3Plus
from models.fcn8 import FCN8
from models.library import SMP
from models.pspnet import PSPNet
from models.tiny import TinyUNet

slow = pytest.mark.slow
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "tiny": TinyUNet,
    "smp_unet": functools.partial(SMP, "unet", "resnet18"),
    "smp_unet_shallow": functools.partial(SMP, "unet", "tu-resnet18", encoder_depth=3, decoder_channels=(32, 16, 8)),
    "smp_deeplabv3plus": functools.partial(SMP, "deeplabv3plus", "tu-tf_efficientnet_lite0"),
    "smp_pspnet": functools.partial(SMP, "pspnet", "resnet18"),
    "deeplabv3plus": DeepLabV3Plus,
    "pspnet": PSPNet,
    "fcn8": FCN8,
    **{
        f"narrow_{name}": functools.partial(make, narrow=4)
        for name, make in (("deeplabv3plus", DeepLabV3Plus), ("pspnet", PSPNet), ("fcn8", FCN8))
    },
}
WHOLE = ("deeplabv3plus", "pspnet", "fcn8")  # the narrow ones have the same layers
QUICK_OR_SLOW = [pytest.param(n, marks=slow) if n in WHOLE else n for n in NETWORKS]


@pytest.fixture(scope="module", params=QUICK_OR_SLOW)
def network(request) -> nn.Module:
    """One of the networks for three classes."""
    torch.manual_seed(0)
    return NETWORKS[request.param](num_classes=3)


class TestNetwork:
    @torch.no_grad()
    @pytest.mark.parametrize("size", [(64, 32), (33, 65)])
    def test_logits_have_the_size_of_the_images(self, network, size):
        logits, aux = network.eval()(torch.randn(1, 3, *size))
        assert logits.shape == (1, 3, *size) and logits.isfinite().all()
        assert aux is None

    @torch.no_grad()
    def test_an_image_does_not_depend_on_its_batch(self, network):
        images = torch.randn(2, 3, 40, 56)
        together, alone = network.eval()(images).logits, network(images[1:]).logits
        assert (together[1:] - alone).abs().max() <= 1e-4 * alone.abs().max()

    def test_gradients_reach_every_parameter(self, network):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):  # some start at zero, which closes a residual branch
                nn.init.ones_(module.weight)
        logits, aux = network.train()(torch.randn(2, 3, 48, 56))
        loss = logits.square().mean()
        if network.aux_weight:
            assert aux.shape == logits.shape
            loss = loss + network.aux_weight * aux.square().mean()
        else:
            assert aux is None
        network.zero_grad()
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
        network.zero_grad()

    def test_a_training_batch_of_one(self, network):
        """Pooled to a single value a channel, it would have no variance."""
        logits = network.train()(torch.randn(1, 3, 48, 56)).logits
        assert logits.isfinite().all()

    def test_parameter_groups_are_a_partition(self, network):
        slower, everything = network.backbone_parameters(), list(network.parameters())
        ids = [id(parameter) for parameter in slower]
        assert len(set(ids)) == len(ids) and set(ids) < {id(parameter) for parameter in everything}

    def test_a_state_dict_of_other_classes_is_named(self, network):
        state = network.state_dict()
        load_state(network, state, "a.pth")
        last = [key for key, tensor in state.items() if tensor.ndim and tensor.shape[0] == 3][-1]
        state[last] = torch.zeros(7, *state[last].shape[1:])
        with pytest.raises(CheckpointError, match=r"a\.pth was trained for 7 classes and the data set has 3"):
            load_state(network, state, "a.pth")


def test_two_images_use_the_statistics_of_the_batch():
    """Only a single pooled value falls back on running statistics."""
    from models.layers import PooledBatchNorm

    torch.manual_seed(0)
    ours, plain = PooledBatchNorm(4), nn.BatchNorm2d(4)
    for shape in ((2, 4, 1, 1), (1, 4, 2, 1), (3, 4, 5, 5)):
        values = torch.randn(shape)
        assert torch.equal(ours(values), plain(values))
    before = ours.running_mean.clone()
    single = torch.randn(1, 4, 1, 1)
    torch.testing.assert_close(ours(single), plain.eval()(single))
    assert torch.equal(ours.running_mean, before)


def test_padding_leaves_the_image_in_place():
    """An image of a whole number of strides gives what smp itself gives."""
    network = NETWORKS["smp_unet"](num_classes=3).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert torch.equal(network(images).logits, network.network(images))


def test_pspnet_of_smp_runs_every_stage():
    """By default it would stop after the third and leave layer3 and layer4 untrained."""
    network = NETWORKS["smp_pspnet"](num_classes=3)
    assert network.network.decoder.psp.blocks[0].pool[1][0].in_channels == 512
    assert network.network.encoder.output_stride == 8


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("unett", "resnet18"), {}, r"model\.arch='unett' is unknown: did you mean unet"),
        (("?", "resnet18"), {}, r"model\.arch='\?' is unknown: choose one of unet, "),
        (("unet", "resnet19"), {}, r"model\.encoder='resnet19' is unknown: did you mean resnet18"),
        (("unet", "tu-resnet5"), {}, r"model\.encoder='tu-resnet5' is unknown: did you mean tu-resnet50"),
        (("unet", "resnet18"), {"depth": 3}, r"model\.depth is not an option of .*encoder_depth"),
        (("deeplabv3plus", "tu-vit_tiny_patch16_224"), {}, r"cannot be built on model\.encoder=tu-vit_tiny"),
        (("unet", "resnet18"), {"weights": "efficientnet-lite0"}, r"fits model\.encoder=tu-tf_efficientnet_lite0 only"),
    ],
)
def test_what_smp_cannot_build_is_named(arguments, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        SMP(*arguments, num_classes=3, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["smp_unet", "smp_deeplabv3plus", "pspnet"])
def test_building_never_reaches_for_the_network(monkeypatch, name):
    def reject(*_):
        raise AssertionError("a network connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", reject)
    NETWORKS[name](num_classes=3)


def test_new_layers_start_as_in_the_experiments():
    network = PSPNet(2)
    for module in (*network.pyramid.modules(), *network.auxiliary.modules()):
        if isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 1e-4).all()
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 10000:
            fan_in = module.weight[0].numel()
            assert module.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.02)
