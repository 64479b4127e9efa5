"""Checkpoints are read, never run."""

from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from models import CheckpointError, load_state, read_checkpoint
from models.tiny import TinyUNet
from models.weights import read_weights


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def rename_in_pickle(source: Path, target: Path, old: bytes, new: bytes) -> None:
    """Copy a checkpoint with a module's name replaced, as another version of NumPy would have written it."""
    with zipfile.ZipFile(source) as read, zipfile.ZipFile(target, "w") as write:
        for entry in read.namelist():
            data = read.read(entry)
            if entry.endswith("data.pkl"):
                assert old in data
                data = data.replace(old, new)
            write.writestr(entry, data)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_containers_and_a_numpy_scalar(tmp_path, zipped):
    content = {"weights": torch.arange(3.0), "best": np.float64(2.5), "config": {"loss": "ce", "list": [1, None]}}
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    read = read_checkpoint(str(tmp_path / "a.pth"))
    assert torch.equal(read["weights"], content["weights"])
    assert read["best"] == 2.5 and read["config"] == content["config"]


def flipped(source: Path, target: Path, tensor: torch.Tensor) -> Path:
    """Copy a file with one bit of a tensor flipped."""
    content = bytearray(source.read_bytes())
    content[content.index(tensor.numpy().tobytes()) + 5] ^= 4
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_without_checksums_is_reported_unless_its_sha256_is_there(tmp_path, kind, capfd):
    """torch's older format and safetensors: a flipped bit loads."""
    tensors, path = {"a": torch.arange(9.0)}, tmp_path / f"old.{kind}"
    if kind == "pth":
        torch.save(tensors, path, _use_new_zipfile_serialization=False)
    else:
        save_file(tensors, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert torch.equal(read_weights(path)["a"], tensors["a"])
    (warning,) = capfd.readouterr().err.splitlines()
    assert str(path) in warning and digest in warning and "sha256sum" in warning
    named = path.rename(tmp_path / f"resnet-{digest[:8]}.{kind}")
    read_weights(named)
    assert not capfd.readouterr().err
    assert not torch.equal(read_weights(flipped(named, path, tensors["a"]))["a"], tensors["a"])
    read_weights(flipped(named, tmp_path / f"of-20231125.{kind}", tensors["a"]))  # a date is not a hash
    assert len(capfd.readouterr().err.splitlines()) == 2
    path.with_name(f"{path.name}.sha256").write_text(f"{digest}  old\n")
    with pytest.raises(CheckpointError, match=rf"old\.{kind} is damaged"):
        read_weights(path)
    named.replace(path)
    read_weights(path)
    assert not capfd.readouterr().err


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_a_numpy_scalar_under_the_former_and_the_present_name(tmp_path, module):
    torch.save({"best": np.float64(2.5)}, tmp_path / "a.pth")
    own = type(np.float64(0).__reduce__()[0]).__name__ and np.float64(0).__reduce__()[0].__module__.encode()
    rename_in_pickle(tmp_path / "a.pth", tmp_path / "b.pth", b"c" + own + b"\n", b"c" + module + b"\n")
    assert read_checkpoint(tmp_path / "b.pth") == {"best": 2.5}


@pytest.mark.parametrize("value", [np.zeros(2), np.int64(3), np.float32(1), Path("a"), print])
def test_nothing_else_is_admitted(tmp_path, value):
    torch.save({"value": value}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="Nothing in it was run"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("place", [lambda x: x, lambda x: {"state_dict": x}, lambda x: {"config": [1, {"a": x}]}])
def test_an_attack_is_rejected_and_named(tmp_path, zipped, place):
    marker = tmp_path / "owned"
    path = tmp_path / "a.pth"
    torch.save(place(Attack(marker)), path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"a\.pth cannot be read: it needs the Python object \w+\.mkdir"
    ) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value) and not marker.exists()


def test_a_bare_pickle_is_rejected(tmp_path):
    (tmp_path / "a.pth").write_bytes(pickle.dumps(Attack(tmp_path / "owned"), protocol=2))
    with pytest.raises(CheckpointError):
        read_checkpoint(tmp_path / "a.pth")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"\n<html><body>404</body></html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "cut short, damaged or not a PyTorch file"),
        (b"PK\x03\x04" + bytes(100), "cut short, damaged or not a PyTorch file"),
        (bytes(range(256)) * 8, "cut short, damaged or not a PyTorch file"),
    ],
)
def test_unreadable_files_share_a_message(tmp_path, content, message):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"a\.pth cannot be read: [\w ]*{message}.*copy it again") as caught:
        read_checkpoint(tmp_path / "a.pth")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("zipped", [True, False])
def test_cut_short_anywhere(tmp_path, zipped):
    torch.save({"weights": torch.randn(500)}, tmp_path / "whole.pth", _use_new_zipfile_serialization=zipped)
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in range(0, len(whole) - 1, len(whole) // 40):
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.pth cannot be read"):
            read_checkpoint(tmp_path / "cut.pth")


def test_missing_files_folders_and_other_contents(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_checkpoint(tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="is a folder"):
        read_checkpoint(tmp_path)
    torch.save([1, 2], tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="holds a list, not a dictionary"):
        read_checkpoint(tmp_path / "a.pth")


def test_what_is_not_a_state_dict_is_rejected():
    network = TinyUNet(2)
    for state in (3, [1, 2], dict.fromkeys(network.state_dict(), 1)):
        with pytest.raises(CheckpointError, match=r"a\.pth does not hold a dictionary of tensors"):
            load_state(network, state, "a.pth")
