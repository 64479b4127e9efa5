"""The one way this project opens a checkpoint: nothing in the file is ever executed.

``torch.load(weights_only=True)`` builds tensors and plain containers only. The checkpoints that the authors
released hold one thing more, the best score as a NumPy scalar; exactly what that needs is admitted by name.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from configs.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message says which, why and what to do."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or a published one, onto the CPU, without running anything that it contains.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is empty, cut short, no checkpoint at all, or wants Python objects built.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist; give the path of a .pth file")
    if path.is_dir():
        raise CheckpointError(f"checkpoint {path} is a folder; give the path of a .pth file in it")
    try:
        with torch.serialization.safe_globals(_numpy_scalar()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes fail in the unpickler in a dozen ways, all of them this one
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {_reason(path, error)}; nothing in it was run; "
            "download or copy it again, or choose another"
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary; "
            "choose one that train.py wrote"
        )
    return content


def load_state(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy a state dict into a network that has exactly these tensors.

    Raises:
        CheckpointError: it is no state dict; or a tensor is missing, is not the network's, has another shape or
            numbers that are not finite; a different number of classes is said as such.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source} holds no tensors by name; choose a checkpoint that train.py wrote")
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    if missing or unknown:
        kind, keys = ("lacks", missing) if missing else ("has unknown", unknown)
        raise CheckpointError(
            f"{source} does not fit the network {type(model).__name__}: it {kind} {keys[0]!r} "
            f"({len(keys)} tensors in all); choose the model that it was made with"
        )
    num_classes = getattr(model, "num_classes", None)
    for key, tensor in own.items():
        if state[key].shape == tensor.shape:
            continue
        found, wanted = tuple(state[key].shape), tuple(tensor.shape)
        if found and wanted and found[1:] == wanted[1:] and wanted[0] == num_classes:
            raise CheckpointError(
                f"{source} was trained for {found[0]} classes and the data set has {num_classes}; "
                "choose the data set that it was trained on"
            )
        raise CheckpointError(
            f"{source} does not fit the network {type(model).__name__}: {key!r} is {found}, not {wanted}; "
            "choose the model that it was made with"
        )
    broken = [
        key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    ]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {broken[0]!r} ({len(broken)} tensors in all); "
            "choose a checkpoint from before its training went astray"
        )
    model.load_state_dict(state)


def _numpy_scalar() -> list[Any]:
    """What unpickling a float64 NumPy scalar calls, under NumPy's present and former names; nothing else."""
    scalar = numpy.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), numpy.dtype, numpy.dtypes.Float64DType]


def _reason(path: Path, error: Exception) -> str:
    """Why a file could not be read, in the words of whoever has to mend it."""
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "it is empty"
    if head.startswith(b"<"):
        return "it is a web page, not a checkpoint (a download that failed?)"
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if wanted:
        return f"it wants the Python object {wanted[1]} built, which only a trusted program may do"
    return "it is cut short, damaged or no PyTorch file"
