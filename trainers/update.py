"""One update of the weights: forward, backward, step; mixed precision, accumulation and guards.

Letters of shapes: N images, C classes, H × W pixels.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from trainers.distributed import World, any_rank, sum_over_ranks, unwrap
from trainers.errors import TrainingError

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
_REMEDY = "Try a lower optimizer.lr, trainer.clip_norm=1 or trainer.precision=fp32; the last good checkpoint is kept."


class Update:
    """Makes one update from one batch. No second forward pass: what is shown comes from the loss already computed.

    Args:
        model: the network, possibly wrapped; returns an object with ``logits`` and ``aux`` (or None).
        criterion: ``(logits (N, C, H, W), targets (N, H, W)) -> scalar``.
        optimizer: its learning rates are set by the caller.
        where: this process among all.
        precision: ``fp32``, ``bf16`` or ``fp16`` (with loss scaling).
        accumulate: parts that a batch is split into to save memory; the update is that of the whole batch.
        clip_norm: bound of the gradient's norm, or None.
        channels_last: the memory format of the images (faster convolutions on recent GPUs).
        second_forward: run the network again after each update, as the paper's code did to show metrics: BatchNorm
            statistics then move twice a step. Only for emulation.
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
            raise ValueError(f"trainer.precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
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
            TrainingError: a loss or gradient that is not finite, or too little memory. No update was made then.
        """
        self.optimizer.zero_grad(set_to_none=True)
        images = batch.images.to(self.where.device, non_blocking=True, memory_format=self.memory_format)
        targets = batch.targets.to(self.where.device, non_blocking=True)
        try:
            loss = self._backward(images, targets)
            if any_rank(not torch.isfinite(loss).item(), self.where):
                raise TrainingError(f"the loss is {loss.item()} on the batch {', '.join(batch.names)}. {_REMEDY}")
            self._step(batch.names)
            if self.second_forward:
                with torch.no_grad(), self._autocast():
                    self.model(images)
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise TrainingError(
                f"out of memory with a batch of {'x'.join(map(str, images.shape))}: use a smaller batch_size, "
                f"trainer.accumulate={2 * self.accumulate}, trainer.precision=bf16 or a smaller dataset.crop "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
            ) from None
        return loss.item()

    def _backward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Leave the gradient of the mean loss over the batch (that of all ranks) behind, and return that loss."""
        whole = sum_over_ranks(torch.tensor(float(len(images)), device=self.where.device), self.where).item()
        total = torch.zeros((), device=self.where.device)
        parts = list(zip(images.chunk(self.accumulate), targets.chunk(self.accumulate), strict=True))
        for number, (image, target) in enumerate(parts, 1):
            with self._synchronised(number == len(parts)):
                with self._autocast():
                    output = self.model(image)
                loss = self.criterion(output.logits, target)
                if output.aux is not None:
                    loss = loss + unwrap(self.model).aux_weight * self.criterion(output.aux, target)
                # DistributedDataParallel averages over ranks, so each rank's share is scaled by their number.
                self.scaler.scale(loss * (len(image) * self.where.size / whole)).backward()
            total += loss.detach() * (len(image) / whole)
        return sum_over_ranks(total, self.where)

    def _step(self, names: list[str]) -> None:
        self.scaler.unscale_(self.optimizer)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(parameters, self.clip_norm or float("inf"))
        # Under loss scaling an overflow is expected now and then: the scaler skips that update by itself.
        if not self.scaler.is_enabled() and not torch.isfinite(norm):
            raise TrainingError(f"a gradient is not finite on the batch {', '.join(names)}. {_REMEDY}")
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _synchronised(self, yes: bool) -> contextlib.AbstractContextManager[Any]:
        """Exchange gradients between ranks only at the last part of a batch."""
        return contextlib.nullcontext() if yes or self.where.size == 1 else self.model.no_sync()  # type: ignore[operator]

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.where.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None)
