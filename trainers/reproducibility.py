"""Seeds, deterministic algorithms, the state of random generators, and the provenance of results."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "segmentation-models-pytorch", "timm", "hydra-core", "omegaconf", "pillow")


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seed Python's and torch's generators; with ``deterministic``, forbid non-deterministic algorithms.

    On CPU training is bit-exact either way. On CUDA, torch then raises at an operation without a deterministic
    implementation: in this project the backward pass of adaptive average pooling to more than one bin.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    # Set in both cases: a sweep trains several runs in one process.
    torch.use_deterministic_algorithms(deterministic)


def rng_state() -> dict[str, Any]:
    """Return the state of the generators of this process, as types that ``torch.load(weights_only=True)`` reads."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(state: dict[str, Any]) -> None:
    """Restore the generators from the result of :func:`rng_state`."""
    torch.set_rng_state(state["torch"].cpu())
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def git_sha(root: Path) -> str:
    """Return the current commit, with ``-dirty`` if files differ from it; ``unknown`` outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def provenance(root: Path, **more: Any) -> dict[str, Any]:
    """Return what is needed to reproduce a result: code, versions, command, device, date, and ``more``."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    return {
        "git_sha": git_sha(root),
        "versions": versions(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "hardware": device,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }
