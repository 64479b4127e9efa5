"""One process, or the many that ``torchrun`` starts: the calls that trainer and evaluator need."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainers.device import pick_device


@dataclass(frozen=True)
class World:
    """This process's place among all: its rank, how many there are, and its device. Rank 0 alone writes."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started (or stay alone) and leave them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # one waits for another that long
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, without torch.compile and DistributedDataParallel around it."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def wrap(model: nn.Module, where: World) -> nn.Module:
    """Make gradients agree between processes; BatchNorm statistics too where the device can (not on CPU)."""
    if where.size == 1:
        return model
    torch.manual_seed(torch.initial_seed() + where.rank)  # dropout differs between ranks
    if where.device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(synchronised, device_ids=[where.device.index])


def share_buffers(model: nn.Module, where: World) -> None:
    """Give every process rank 0's buffers: on CPU each has moved BatchNorm's statistics by its own images."""
    for buffer in model.buffers() if where.size > 1 else ():
        dist.broadcast(buffer, 0)


def highest(value: int, where: World) -> int:
    """The largest of all processes' values: ranks see a signal at different steps and must stop at one."""
    if where.size == 1:
        return value
    votes = torch.tensor(value, device=where.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return int(votes.item())


def sum_over_ranks(value: Tensor, where: World) -> Tensor:
    """The sum of a tensor over all processes, in place."""
    if where.size > 1:
        dist.all_reduce(value)
    return value


def gather(value: Any, where: World) -> list[Any]:
    """Every process's object, in the order of ranks, at every process."""
    values = [value] * where.size
    if where.size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(where: World) -> None:
    """Wait until every process is here."""
    highest(0, where)
