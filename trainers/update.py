"""One update of the weights: forward pass, backward pass, optimizer step."""

from __future__ import annotations

import contextlib
import math
from dataclasses import KW_ONLY, dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, TrainingError, as_training_error
from trainers.distributed import World, gather_objects, sum_over_ranks, unwrap
from trainers.forward import autocast

SMALLEST_SCALE = 2.0**-14  # of the loss in fp16; below it, a gradient of 1 loses precision


@dataclass(eq=False)
class Update:
    """Update the weights from one batch."""

    model: nn.Module  # possibly wrapped; returns an object with ``logits`` and ``aux`` (or None)
    criterion: nn.Module  # (logits (N, C, H, W), targets (N, H, W)) -> scalar, a mean over `num_terms(targets)` terms
    optimizer: torch.optim.Optimizer  # the caller sets its learning rates
    world: World
    _: KW_ONLY
    precision: str = "fp32"  # or bf16, or fp16 with loss scaling
    accumulate: int = 1  # parts that a batch is split into to save memory
    clip_norm: float | None = None  # bound of the gradient's norm
    channels_last: bool = False  # memory format of the images: faster convolutions on recent GPUs
    # Run the network again after each update, as the paper's code did for its metrics: BatchNorm then updates its
    # statistics twice per step.
    second_forward: bool = False

    def __post_init__(self) -> None:
        autocast(self.world.device, self.precision)  # rejects an unknown precision
        if self.accumulate < 1:
            raise ConfigError(f"trainer.accumulate={self.accumulate} is invalid: expected an integer >= 1")
        self.memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=self.precision == "fp16")

    def __call__(self, batch: Any) -> float:
        """Update the weights on a batch with ``images``, ``targets`` and ``names``; return its loss.

        Raises TrainingError if a loss or gradient is not finite (no update is made), or if memory is too small.
        """
        images = batch.images.to(self.world.device, non_blocking=True, memory_format=self.memory_format)
        targets = batch.targets.to(self.world.device, non_blocking=True)
        remedy = (
            f"use a smaller batch_size (now {len(images)} images per device), "
            f"trainer.accumulate={2 * self.accumulate}, trainer.precision=bf16 or a smaller dataset.crop"
        )
        with as_training_error(f"training on a batch of {'x'.join(map(str, images.shape))}", remedy):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(images, targets).item()
            if not math.isfinite(loss):
                self._fail(f"the loss is {loss}", batch.names)
            self._step(batch.names)
            if self.second_forward:
                with torch.no_grad(), autocast(self.world.device, self.precision):
                    self.model(images)
        return loss

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Compute the gradient of the loss of the batch of all ranks, and return that loss.

        Parts have the weight that the criterion gives them, so a mean over labelled pixels is the mean over the whole
        batch. A loss that is a ratio over the batch (Dice, Lovász) becomes a mean of the ratios of the parts.
        """
        parts = list(zip(images.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True))
        weights = [self._weight(target) for _, target in parts]
        whole = sum_over_ranks(torch.stack(weights).sum(), self.world).clamp(min=1)
        total = torch.zeros((), device=self.world.device)
        for number, ((image, target), weight) in enumerate(zip(parts, weights, strict=True), 1):
            exchange = self.world.size == 1 or number == len(parts)  # gradients between ranks: only at the last part
            with contextlib.nullcontext() if exchange else self.model.no_sync():  # type: ignore[operator]
                with autocast(self.world.device, self.precision):
                    output = self.model(image)
                loss = self.criterion(output.logits, target)
                if output.aux is not None:
                    loss = loss + unwrap(self.model).aux_weight * self.criterion(output.aux, target)
                share = (weight / whole).float()
                # DistributedDataParallel averages over ranks, so each rank's share is scaled by their number.
                self.scaler.scale(loss * (share * self.world.size)).backward()
            total += loss.detach() * share
        return sum_over_ranks(total, self.world)

    def _weight(self, targets: Tensor) -> Tensor:
        """Return the weight of a part of a batch: its number of loss terms, or else its number of images."""
        num_terms = getattr(self.criterion, "num_terms", len)
        wide = torch.float32 if targets.device.type == "mps" else torch.float64  # MPS has no float64
        return torch.as_tensor(num_terms(targets), device=targets.device).to(wide)

    def _step(self, names: list[str]) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # With loss scaling an overflow occurs now and then, and the scaler skips that update.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            self._fail("a gradient is not finite", names)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            self._fail("gradients overflow in fp16 at every scale", names)

    def _fail(self, what: str, names: list[str]) -> NoReturn:
        """Raise TrainingError. All ranks have the same loss and gradient, so all raise it at the same step."""
        all_names = ", ".join(name for share in gather_objects(names, self.world) for name in share)
        raise TrainingError(f"{what} on the batch {all_names}. {divergence_remedy(self.precision)}")


def divergence_remedy(precision: str) -> str:
    """Return the end of the message for a training that diverges."""
    more = "" if precision == "fp32" else ", or trainer.precision=fp32"
    return f"No checkpoint was changed. Fix: use a lower optimizer.lr or trainer.clip_norm=1{more}."


def to_channels_last(network: nn.Module, device: torch.device, precision: str) -> nn.Module:
    """Return the network in the channels-last memory format; its own tensors are changed.

    In bf16 on a CPU, torch 2.14 computes wrong gradients of dilated grouped convolutions in this format. There these
    layers keep the default format.
    """
    network = network.to(memory_format=torch.channels_last)
    for layer in network.modules() if device.type == "cpu" and precision == "bf16" else ():
        if isinstance(layer, nn.Conv2d) and layer.groups > 1 and max(layer.dilation) > 1:
            layer.weight.data = layer.weight.data.clone(memory_format=torch.contiguous_format)
            layer.register_forward_pre_hook(lambda _, given: (given[0].contiguous(),))
    return network
