"""One process or many: the few calls that the trainer and the evaluator need.

Started by ``torchrun``, every process finds its place in the environment variables that torchrun sets;
started by hand there is one process, and every function here is the identity.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's place among all: its rank, how many there are, and its device."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and draws progress bars."""
        return self.rank == 0


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device.

    Raises:
        ValueError: a device that is unknown, or that this machine does not have.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device={name} asked for, but no CUDA device was found here; use device=cpu or device=auto")
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(f"device=cuda:{index} asked for, but there are only {torch.cuda.device_count()} CUDA devices")
        device = torch.device("cuda", index)
    return device


@contextmanager
def world(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[World]:
    """Join the processes that torchrun started (or stay alone) and leave them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size == 1:
        yield World(0, 1, chosen)
        return
    backend = "nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout_minutes))
    try:
        yield World(rank, size, chosen)
    finally:
        dist.destroy_process_group()


def unwrap(model: nn.Module) -> nn.Module:
    """The network itself, without DistributedDataParallel or torch.compile around it."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def wrap(model: nn.Module, where: World) -> nn.Module:
    """Make gradients agree between processes; BatchNorm statistics too where the device can (not on CPU)."""
    if where.size == 1:
        return model
    if where.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    ids = [where.device.index] if where.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)


def any_rank(flag: bool, where: World) -> bool:
    """Whether the flag is set anywhere: ranks see a signal at different steps and must stop at the same one."""
    if where.size == 1:
        return flag
    votes = torch.tensor(int(flag), device=where.device)
    dist.all_reduce(votes, op=dist.ReduceOp.MAX)
    return bool(votes.item())


def sum_over_ranks(value: Tensor, where: World) -> Tensor:
    """The sum of a tensor over all processes."""
    if where.size > 1:
        dist.all_reduce(value)
    return value


def gather(value: Any, where: World) -> list[Any]:
    """Every process's object, in the order of ranks, at every process."""
    if where.size == 1:
        return [value]
    values: list[Any] = [None] * where.size
    dist.all_gather_object(values, value)
    return values


def barrier(where: World) -> None:
    """Wait until every process is here."""
    if where.size > 1:
        dist.barrier()
