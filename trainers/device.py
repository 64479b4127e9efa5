"""Which device a process computes on."""

from __future__ import annotations

import torch


def pick_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """Turn ``auto``, ``cpu``, ``cuda`` or ``cuda:N`` into a device; ``cuda`` is the one of this local rank.

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
            raise ValueError(
                f"device={name} asked for, but no CUDA device was found here; use device=cpu or device=auto"
            )
        index = local_rank if device.index is None else device.index
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device=cuda:{index} asked for, but there are only {torch.cuda.device_count()} devices; "
                "use another, or start fewer processes"
            )
        device = torch.device("cuda", index)
    return device
