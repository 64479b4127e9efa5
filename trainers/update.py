"""One update of the weights: forward, backward, step; mixed precision, accumulation and guards.

Letters of shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from configs.errors import TrainingError
from trainers.distributed import World, gather, sum_over_ranks, unwrap
from trainers.errors import explained

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALLEST_SCALE = 2.0**-14  # of the loss in fp16; below it, a gradient of 1 is lost
_REMEDY = (
    "The last checkpoint is good. Try a lower optimizer.lr, trainer.clip_norm=1 or trainer.precision=fp32"
)


class Update:
    """Makes one update from one batch, by one forward pass.

    Args:
        model: the network, possibly wrapped; returns an object with ``logits`` and ``aux`` (or None).
        criterion: ``(logits (N, C, H, W), targets (N, H, W)) -> scalar``; its ``weight_of(targets)``, if any,
            says over how many terms that is a mean.
        optimizer: its learning rates are set by the caller.
        where: this process among all.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with loss scaling).
        accumulate: parts that a batch is split into to save memory; the update is that of the whole batch.
        clip_norm: bound of the gradient's norm, or None.
        channels_last: the memory format of the images (faster convolutions on recent GPUs).
        second_forward: run the network again after each update, as the paper's code did to show metrics:
            BatchNorm's statistics then move twice a step. Only for emulation.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        optimizer: torch.optim.Optimizer,
        where: World,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float | None = None,
        channels_last: bool = False,
        second_forward: bool = False,
    ) -> None:
        if precision not in PRECISIONS:
            raise ValueError(
                f"trainer.precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}"
            )
        if accumulate < 1:
            raise ValueError(f"trainer.accumulate={accumulate} is not a number of parts; use 1 or more")
        self.model, self.criterion, self.optimizer, self.where = model, criterion, optimizer, where
        self.accumulate, self.clip_norm, self.second_forward = accumulate, clip_norm, second_forward
        self.dtype = PRECISIONS[precision]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.scaler = torch.amp.GradScaler(where.device.type, enabled=precision == "fp16")

    def __call__(self, batch: Any) -> float:
        """Update the weights on a batch with ``images``, ``targets`` and ``names``; return its loss.

        Raises:
            TrainingError: a loss or gradient that is not finite (no update was made), or too little memory.
        """
        images = batch.images.to(self.where.device, non_blocking=True, memory_format=self.memory_format)
        targets = batch.targets.to(self.where.device, non_blocking=True)
        remedy = (
            f"{len(images)} images a device did not fit; use a smaller batch_size, "
            f"trainer.accumulate={2 * self.accumulate}, trainer.precision=bf16 or a smaller dataset.crop"
        )
        with explained(f"training on a batch of {'x'.join(map(str, images.shape))}", remedy):
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(images, targets).item()
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss}", batch.names)
            self._step(batch.names)
            if self.second_forward:
                with torch.no_grad(), self._autocast():
                    self.model(images)
        return loss

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Leave the gradient of the loss of the batch (that of all ranks) behind, and return that loss.

        Parts are averaged by the weight that the criterion gives them, so that a mean over labelled pixels is
        that of the whole batch. A loss that is a ratio over the batch (Dice, Lovász) is a mean of ratios.
        """
        parts = list(zip(images.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True))
        weights = [self._weight(target) for _, target in parts]
        whole = sum_over_ranks(torch.stack(weights).sum(), self.where).clamp(min=1)
        total = torch.zeros((), device=self.where.device)
        for number, ((image, target), weight) in enumerate(zip(parts, weights, strict=True), 1):
            with self._synchronised(number == len(parts)):
                with self._autocast():
                    output = self.model(image)
                loss = self.criterion(output.logits, target)
                if output.aux is not None:
                    loss = loss + unwrap(self.model).aux_weight * self.criterion(output.aux, target)
                share = (weight / whole).float()
                # DistributedDataParallel averages over ranks, so each rank's share is scaled by their number.
                self.scaler.scale(loss * (share * self.where.size)).backward()
            total += loss.detach() * share
        return sum_over_ranks(total, self.where)

    def _weight(self, targets: Tensor) -> Tensor:
        """How much a part of a batch counts, float64: what its criterion says, else its number of images."""
        weight = getattr(self.criterion, "weight_of", None)
        return torch.as_tensor(weight(targets) if weight else len(targets), device=targets.device).double()

    def _step(self, names: list[str]) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [
            p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None
        ]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        # Under loss scaling an overflow is expected now and then: the scaler skips that update by itself.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            self._refuse("a gradient is not finite", names)
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            self._refuse("gradients overflow in fp16 at every scale", names)

    def _refuse(self, what: str, names: list[str]) -> NoReturn:
        """Every rank ends here together, as losses and gradients are those of all of them."""
        everyone = ", ".join(name for share in gather(names, self.where) for name in share)
        raise TrainingError(f"{what} on the batch {everyone}. {_REMEDY}")

    def _synchronised(self, yes: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients between ranks only at the last part of a batch."""
        return contextlib.nullcontext() if yes or self.where.size == 1 else self.model.no_sync()  # type: ignore[operator]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(
            self.where.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None
        )
