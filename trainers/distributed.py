"""The device of a process, and the communication between processes that ``torchrun`` started."""

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

from configs.errors import ConfigError


@dataclass(frozen=True)
class World:
    """This process: its rank, the number of processes, and its device. Only rank 0 writes files."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps`` into a device; raise ConfigError if there is none.

    ``cuda`` is the GPU of this local rank. ``auto`` is ``cuda`` if there is one, else ``cpu``.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device={name} is not supported. Fix: choose one of auto, cpu, cuda, cuda:N or mps.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"device={name}: this machine has no Apple GPU that torch can use. Fix: pass device=cpu.")
    if device.type != "cuda":
        return torch.device(device.type)
    if not torch.cuda.is_available():
        raise ConfigError(f"device={name}: no CUDA device was found. Fix: pass device=cpu or device=auto.")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ConfigError(
            f"device=cuda:{index}: there are only {torch.cuda.device_count()} CUDA devices. "
            "Fix: choose another device, or start fewer processes."
        )
    return torch.device("cuda", index)


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started, if it did, and leave them at the end."""
    size, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    chosen = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if size > 1:
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))  # the longest wait for another process
    try:
        yield World(rank, size, chosen)
    finally:
        if size > 1:
            dist.destroy_process_group()


def unwrap(model: nn.Module) -> nn.Module:
    """Return the network inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "_orig_mod", model)
    return model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model


def wrap(model: nn.Module, world: World) -> nn.Module:
    """Wrap a network, so that gradients and, on GPUs, BatchNorm statistics are averaged over processes."""
    if world.size == 1:
        return model
    torch.manual_seed(torch.initial_seed() + world.rank)  # dropout differs between ranks
    if world.device.type == "cpu":
        return nn.parallel.DistributedDataParallel(model)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return nn.parallel.DistributedDataParallel(synchronised, device_ids=[world.device.index])


def share_buffers(model: nn.Module, world: World) -> None:
    """Copy the buffers of rank 0 to every process: on CPU, each has BatchNorm statistics of its own images."""
    for buffer in model.buffers() if world.size > 1 else ():
        dist.broadcast(buffer, 0)


def max_over_ranks(value: int, world: World) -> int:
    """Return the largest value of all processes, so that a signal to one of them stops all at the same step."""
    if world.size == 1:
        return value
    largest = torch.tensor(value, device=world.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest.item())


def sum_over_ranks(value: Tensor, world: World) -> Tensor:
    """Add a tensor up over all processes, in place."""
    if world.size > 1:
        dist.all_reduce(value)
    return value


def gather_objects(value: Any, world: World) -> list[Any]:
    """Return every process's object, in the order of ranks, at every process."""
    values = [value] * world.size
    if world.size > 1:
        dist.all_gather_object(values, value)
    return values


def barrier(world: World) -> None:
    """Wait until every process is here."""
    max_over_ranks(0, world)
