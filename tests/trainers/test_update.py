"""One update: accumulation equals the whole batch, and a batch that must not change the weights is rejected by name."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from configs.errors import TrainingError
from trainers.distributed import World
from trainers.losses import BCE, CrossEntropy, Focal
from trainers.update import Update, to_channels_last

ALONE = World(0, 1, torch.device("cpu"))


class Net(nn.Module):
    """Convolutions without BatchNorm, whose statistics would depend on how a batch is split."""

    aux_weight = 0.4

    def __init__(self, norm: bool = False, aux: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.last, self.side = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1) if aux else None

    def forward(self, images: Tensor) -> Any:
        features = self.norm(self.first(images)).relu()
        return SimpleNamespace(logits=self.last(features), aux=self.side(features) if self.side else None)


def network(**options: Any) -> Net:
    torch.manual_seed(1)
    return Net(**options)


def make(net: nn.Module, criterion: nn.Module | None = None, **options: Any) -> Update:
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    return Update(net, criterion or CrossEntropy(), optimizer, ALONE, **options)


def batch(images: int = 5, seed: int = 0, void: bool = True) -> Any:
    """Random images, the first ones mostly void: parts of unlike weight."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 3, (images, 8, 8), generator=generator)
    if void:
        targets[0, 1:] = 255
        targets[1, :, 1:] = 255
    pixels = torch.randn(images, 3, 8, 8, generator=generator)
    return SimpleNamespace(images=pixels, targets=targets, names=[f"image{k}" for k in range(images)])


@pytest.mark.parametrize("criterion", [CrossEntropy(), Focal(), BCE(), Focal(legacy=True), BCE(legacy=True)])
@pytest.mark.parametrize("parts", [2, 5, 9])
def test_accumulation_is_the_whole_batch(criterion: nn.Module, parts: int) -> None:
    nets = [network(aux=True), network(aux=True)]
    updates = [make(nets[0], criterion), make(nets[1], criterion, accumulate=parts)]
    for seed in range(3):
        given = batch(seed=seed)
        if not criterion.legacy:  # which counts void, except where there is nothing else
            given.targets[2] = 255
        losses = [update(given) for update in updates]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_loss_is_that_of_the_criterion_bit_for_bit() -> None:
    given, net = batch(), network()
    expected = CrossEntropy()(net(given.images).logits, given.targets).item()
    assert make(net)(given) == expected


def test_a_batch_that_is_all_void_moves_nothing() -> None:
    net, given = network(), batch(void=False)
    given.targets[:] = 255
    before = [p.clone() for p in net.parameters()]
    assert make(net, accumulate=2)(given) == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_batch(bad: float) -> None:
    net, given = network(), batch()
    update = make(net)
    update(given)
    before = [p.clone() for p in net.parameters()]
    given.images[3, 0, 0, 0] = bad
    given.targets[3] = 1
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) on the batch image0, .*image4"):
        update(given)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


class NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return gradient * float("nan")


def test_a_gradient_that_is_not_finite_stops_before_the_update() -> None:
    net = network()
    net.first.register_forward_hook(lambda module, given, made: NanGradient.apply(made))
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(TrainingError, match=r"gradient is not finite on the batch image0"):
        make(net)(batch())
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail at alloc.cpp:117] DefaultCPUAllocator: can't allocate memory: you"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_says_what_did_not_fit_and_what_to_change(error: Exception) -> None:
    def fail(*_: Any) -> None:
        raise error

    net = network()
    net.last.register_forward_hook(fail)
    with pytest.raises(TrainingError, match=r"out of memory .*5x3x8x8.*batch_size.*accumulate=4") as caught:
        make(net, accumulate=2)(batch())
    assert "\n" not in str(caught.value)


def test_a_bug_keeps_its_traceback() -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    net = network()
    net.last.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="mat1") as caught:
        make(net)(batch())
    assert type(caught.value) is RuntimeError


def test_deterministic_names_the_operation_that_is_not() -> None:
    def scatter(_module: nn.Module, _given: Any, made: Tensor) -> Tensor:
        made.detach().clone().put_(torch.tensor([0]), torch.tensor([1.0]))
        return made

    net = network()
    net.last.register_forward_hook(scatter)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(TrainingError, match=r"put_.* deterministic.*trainer\.deterministic=false"):
            make(net)(batch())
    finally:
        torch.use_deterministic_algorithms(False)
    make(net)(batch())


def test_clipping_bounds_the_step() -> None:
    net = network()
    before = torch.cat([p.detach().flatten().clone() for p in net.parameters()])
    make(net, clip_norm=1e-3)(batch())
    after = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert float((after - before).norm()) == pytest.approx(0.1 * 1e-3, rel=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_follows_fp32(precision: str) -> None:
    losses = {}
    for name in ("fp32", precision):
        update = make(network(norm=True), precision=name)
        losses[name] = [update(batch(void=False)) for _ in range(8)]
    assert losses[precision] != losses["fp32"]
    assert losses[precision] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses[precision][-1] < losses[precision][0]


def test_channels_last_computes_the_same() -> None:
    plain, last = network(norm=True), network(norm=True).to(memory_format=torch.channels_last)
    seen: list[bool] = []
    last.first.register_forward_pre_hook(
        lambda module, given: seen.append(given[0].is_contiguous(memory_format=torch.channels_last))
    )
    losses = [make(plain)(batch()), make(last, channels_last=True)(batch())]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and seen == [True]


@pytest.mark.parametrize("groups", [96, 32])
def test_gradients_in_bf16_and_channels_last_are_right(groups: int) -> None:
    """torch 2.14 computes others for dilated grouped convolutions on some CPUs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 96, 40, 40, generator=generator)
    plain = nn.Conv2d(96, 96, 3, padding=2, dilation=2, groups=groups)
    last = to_channels_last(copy.deepcopy(plain), torch.device("cpu"), "bf16")
    for layer, given in ((plain, images), (last, images.to(memory_format=torch.channels_last))):
        with torch.autocast("cpu", torch.bfloat16, enabled=layer is last):
            layer(given).float().square().sum().backward()
    assert torch.allclose(last.weight.grad, plain.weight.grad, atol=0.02 * float(plain.weight.grad.abs().max()))


def test_the_second_forward_moves_batch_norm_twice_and_nothing_else() -> None:
    once, twice = network(norm=True), network(norm=True)
    make(once)(batch())
    make(twice, second_forward=True)(batch())
    assert (once.norm.num_batches_tracked, twice.norm.num_batches_tracked) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True))


@pytest.mark.slow
def test_compiled_computes_the_same() -> None:
    plain, compiled = network(), network()
    updates = [make(plain), make(compiled)]
    updates[1].model = torch.compile(compiled)  # type: ignore[assignment]
    for seed in range(3):
        losses = [update(batch(seed=seed)) for update in updates]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert list(compiled.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("options", [{"precision": "fp8"}, {"accumulate": 0}])
def test_unknown_options_are_rejected(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"trainer.{next(iter(options))}=.*expected"):
        make(network(), **options)
