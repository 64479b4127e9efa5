"""Read a checkpoint without executing anything in it, and copy it into a network only if it fits exactly.

``torch.load(weights_only=True)`` builds tensors and plain containers only. The checkpoints that the authors released
also hold the best score as a NumPy scalar; only the names that this needs are allowed in addition. torch writes
checksums but does not compare them. They are compared here first, so that a flipped bit is an error.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from configs.errors import UserError
from configs.files import check_plain

MAX_PICKLE_BYTES = 256 << 20  # of the containers, without tensors
WRAPPERS = ("_orig_mod.", "module.")  # prefixes of torch.compile and DistributedDataParallel


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names it, the reason and a remedy."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, ours or a published one, onto the CPU, without running anything in it.

    Raises:
        FileNotFoundError: the file does not exist.
        CheckpointError: the file is empty, cut short, damaged, not a checkpoint, nested without end, or needs Python
            objects to be built.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist. Fix: give the path of a .pth file.")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is a folder or a device. Fix: give the path of a .pth file.")
    try:
        _check_archive(path)
        with torch.serialization.safe_globals(_numpy_scalar()):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged bytes fail in the unpickler in a dozen ways
        raise CheckpointError(
            f"checkpoint {path} cannot be read: {_reason(path, error)}. Nothing in it was run. "
            "Fix: download or copy it again, or choose another."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"checkpoint {path} holds a {type(content).__name__}, not a dictionary. "
            "Fix: choose one that train.py wrote."
        )
    check_plain(content, f"checkpoint {path}")
    for tensor in _tensors(content):
        held = tensor.untyped_storage().nbytes() if tensor.layout == torch.strided else -1
        if tensor.is_quantized or tensor.numel() * tensor.element_size() > held:
            raise CheckpointError(
                f"checkpoint {path} holds a tensor of {tuple(tensor.shape)} that is sparse, quantized or larger than "
                "its data. Fix: choose a checkpoint with ordinary tensors."
            )
    return content


class _Damaged(Exception):
    """The archive is damaged."""


def _check_archive(path: Path) -> None:
    """Compare the checksums in a zip archive with its contents; older formats have none."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(set(names)) < len(names):
            raise _Damaged("it is not an archive that PyTorch writes")
        if any(e.filename.endswith(".pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
            raise _Damaged("its description is too large")
        damaged = archive.testzip()
    if damaged is not None:
        raise _Damaged(f"it is damaged: the checksum of {damaged!r} is wrong")


def _tensors(content: Any) -> Iterator[Tensor]:
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))
            stack.extend(item.values() if isinstance(item, dict) else item)


def plain_key(key: str) -> str:
    """Return a tensor's name without the prefixes of torch.compile and DistributedDataParallel."""
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def load_state(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy a state dict into a network that has exactly these tensors, of the same shapes and dtypes.

    Raises:
        CheckpointError: it is not a state dict; or a tensor is missing, is not the network's, has another shape or
            dtype, or numbers that are not finite. A different number of classes is reported as such.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{source} holds no tensors by name. Fix: choose a checkpoint that train.py wrote.")
    state = {plain_key(str(key)): tensor for key, tensor in state.items()}
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    if missing or unknown:
        kind, keys = ("lacks", missing) if missing else ("has unknown", unknown)
        raise CheckpointError(
            f"{source} does not fit the network {type(model).__name__}: it {kind} {keys[0]!r} "
            f"({len(keys)} tensors in all). Fix: choose the model that it was made with."
        )
    num_classes = getattr(model, "num_classes", None)
    for key, tensor in own.items():
        found, wanted = tuple(state[key].shape), tuple(tensor.shape)
        if found == wanted and state[key].dtype == tensor.dtype:
            continue
        if found and wanted and found[1:] == wanted[1:] and wanted[0] == num_classes != found[0]:
            raise CheckpointError(
                f"{source} was trained for {found[0]} classes and the data set has {num_classes}. "
                "Fix: choose the data set that it was trained on."
            )
        what = f"{found}, not {wanted}" if found != wanted else f"{state[key].dtype}, not {tensor.dtype}"
        raise CheckpointError(
            f"{source} does not fit the network {type(model).__name__}: {key!r} is {what}. "
            "Fix: choose the model that it was made with."
        )
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {broken[0]!r} ({len(broken)} tensors in all). "
            "Fix: choose a checkpoint from before the training diverged."
        )
    model.load_state_dict(state)


def _numpy_scalar() -> list[Any]:
    """Return what unpickling a float64 NumPy scalar calls, under NumPy's present and former names."""
    scalar = numpy.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), numpy.dtype, numpy.dtypes.Float64DType]


def _reason(path: Path, error: Exception) -> str:
    """Return why a file could not be read."""
    if isinstance(error, _Damaged):
        return str(error)
    with path.open("rb") as file:
        head = file.read(64).lstrip()
    if not head:
        return "it is empty"
    if head.startswith(b"<"):
        return "it is a web page, not a checkpoint (a download that failed?)"
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if wanted:
        return f"it needs the Python object {wanted[1]}, which could run code"
    return "it is cut short, damaged or not a PyTorch file"
