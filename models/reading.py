"""Read a checkpoint without executing anything in it, and copy it into a network only if it fits exactly.

``torch.load(weights_only=True)`` builds tensors and plain containers only. The checkpoints that the authors released
also hold the best score as a NumPy scalar; only the functions that rebuild this scalar are allowed in addition. torch
writes checksums but does not compare them. They are compared here first, so that a flipped bit is an error. Files of
torch before 1.6 have no checksums. Such a file is compared with the SHA-256 in PATH.sha256 or in its name; if neither
confirms it, a warning is printed.

`trainers/checkpoint.py` writes checkpoints, and `configs/checkpoint.py` builds the network of one.
"""

from __future__ import annotations

import pickle
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from configs.errors import UserError, one_line
from configs.files import check_plain, file_sha256, read_text

MAX_PICKLE_BYTES = 256 << 20  # everything but the values of the tensors
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[a-z]+$")  # the start of the SHA-256, as in files of torchvision
WRAPPERS = ("_orig_mod.", "module.")  # prefixes of torch.compile and DistributedDataParallel


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message names it, the reason and a remedy."""


def read_checkpoint(path: str | Path, verified: bool = False) -> dict[str, Any]:
    """Read a checkpoint, ours or a published one, onto the CPU, without running anything in it.

    ``verified``: the caller has compared the file with its SHA-256. Raises FileNotFoundError if there is no file, and
    CheckpointError if it is empty, cut short, damaged, not a checkpoint, nested too deeply, or if it holds Python
    objects, or tensors that are sparse, quantized or incomplete.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist. Fix: give the path of a .pth file.")
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} is a folder or a device. Fix: give the path of a .pth file.")
    try:
        verified = _check_archive(path) or verified
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
                f"checkpoint {path} holds a tensor of {tuple(tensor.shape)} that is sparse, quantized or lacks a "
                "part of its values. Fix: choose a checkpoint with ordinary tensors."
            )
    if not verified:
        check_sha256(path)
    return content


def check_sha256(path: Path) -> None:
    """Compare a file that holds no checksums with the SHA-256 in ``PATH.sha256`` or in its name, or print a warning.

    Raises:
        CheckpointError: ``PATH.sha256`` holds another one.
    """
    known, found, named = path.with_name(f"{path.name}.sha256"), file_sha256(path), HASH_IN_NAME.search(path.name)
    if known.exists():
        if read_text(known, 4096).split()[:1] != [found]:
            raise CheckpointError(
                f"checkpoint {path} is damaged, or {known.name} belongs to another file: its SHA-256 is {found}. "
                "Fix: download or copy both again."
            )
    elif not (named and found.startswith(named[1])):  # a mismatch is not an error: the digits may be a date
        text = (
            f"warning: {path} is in a format without checksums, so damage cannot be noticed; its SHA-256 is {found}. "
            f"Fix: compare it with the publisher's, then keep it: sha256sum {path.name} > {known.name}"
        )
        print(one_line(text), file=sys.stderr)


class _Rejected(Exception):
    """The archive is damaged, too large, or not written by PyTorch."""


def _check_archive(path: Path) -> bool:
    """Compare the checksums in a zip archive with its contents; return False for an older format, without any."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or len(set(names)) < len(names):
            raise _Rejected("it is not an archive that PyTorch writes")
        if any(e.filename.endswith(".pkl") and e.file_size > MAX_PICKLE_BYTES for e in entries):
            raise _Rejected(f"its pickled part is larger than {MAX_PICKLE_BYTES >> 20} MiB")
        damaged = archive.testzip()
    if damaged is not None:
        raise _Rejected(f"it is damaged: the checksum of {damaged!r} is wrong")
    return True


def _tensors(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, (dict, list, tuple)):
        for item in content.values() if isinstance(content, dict) else content:
            yield from _tensors(item)


def check_epoch(value: Any, source: str | Path) -> None:
    """Raise CheckpointError unless the epoch of a checkpoint is an integer from 0 to 999 999 999."""
    if type(value) is not int or not 0 <= value < 10**9:
        raise CheckpointError(
            f"{source}: epoch={str(value)[:100]!r} is invalid: expected an integer from 0 to 999999999. "
            "Fix: choose another file."
        )


def plain_key(key: str) -> str:
    """Return a tensor's name without the prefixes of torch.compile and DistributedDataParallel."""
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


def load_state(
    model: nn.Module,
    state: dict[str, Tensor],
    source: str | Path,
    remedy: str = "Fix: choose the model that it was made with.",
) -> None:
    """Copy a state dict into a network that has exactly these tensors, of the same shapes and dtypes.

    A network on the meta device has no memory and takes the tensors themselves. Raises CheckpointError for tensors
    that are missing, unknown or of another shape or dtype, and for numbers that are not finite. A different number of
    classes is reported as such.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{source} does not hold a dictionary of tensors. Fix: choose a checkpoint that train.py wrote."
        )
    state = {plain_key(str(key)): tensor for key, tensor in state.items()}
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unknown = [key for key in state if key not in own]
    if missing or unknown:
        kind, keys = ("lacks", missing) if missing else ("has unknown", unknown)
        raise CheckpointError(
            f"{source} does not fit the network {type(model).__name__}: it {kind} {keys[0]!r} "
            f"({len(keys)} such tensors). {remedy}"
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
        raise CheckpointError(f"{source} does not fit the network {type(model).__name__}: {key!r} is {what}. {remedy}")
    broken = [key for key, tensor in state.items() if tensor.is_floating_point() and not tensor.isfinite().all()]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN or infinity in {broken[0]!r} ({len(broken)} such tensors). "
            "Fix: choose a checkpoint from before the training diverged."
        )
    model.load_state_dict(state, assign=any(tensor.is_meta for tensor in own.values()))


def _numpy_scalar() -> list[Any]:
    """Return what torch.load has to allow for a float64 NumPy scalar, under the names of NumPy 1 and of NumPy 2."""
    scalar = numpy.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), numpy.dtype, numpy.dtypes.Float64DType]


def _reason(path: Path, error: Exception) -> str:
    """Return why a file could not be read."""
    if isinstance(error, _Rejected):
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
