"""Checkpoints: there is the old file or the whole new one, even if the write is interrupted."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from models import read_checkpoint
from tests.trainers.forked import run_dir, start, train, wait_for
from trainers.checkpoint import Checkpoints, epoch_of, save


def payload(number: int) -> dict[str, Any]:
    return {"format": 1, "model": {"w": torch.full((1000,), float(number))}, "epoch": number, "training": {"n": number}}


def manage(folder: Path, keep: int = 0) -> Checkpoints:
    return Checkpoints(folder, read_checkpoint, keep)


def number(found: dict[str, Any] | None) -> int | None:
    return None if found is None else found["training"]["n"]


def test_the_newest_whole_one_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    these = manage(tmp_path)
    assert these.newest() is None
    for n in (1, 2, 3):
        these.save_last(payload(n))
    assert number(these.newest()) == 3
    os.truncate(these.last, these.last.stat().st_size // 2)
    assert number(these.newest()) == 2
    assert "last.pth" in capsys.readouterr().err
    these.previous.write_bytes(b"")
    these.save_epoch(payload(1))
    assert number(these.newest()) == 1


def test_what_an_older_version_left_is_found(tmp_path: Path) -> None:
    """It renamed last.pth away before the next one took its place, and could be killed in between."""
    these = manage(tmp_path)
    these.save_last(payload(1))
    save(payload(2), tmp_path / "next.pth")
    os.replace(these.last, these.previous)
    assert number(these.newest()) == 2


def test_there_is_always_a_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    these, replace, seen = manage(tmp_path), os.replace, list[bool]()
    these.save_last(payload(1))

    def watched(source: Path, target: Path) -> None:
        seen.append(these.last.exists())
        replace(source, target)
        seen.append(these.last.exists())

    monkeypatch.setattr(os, "replace", watched)
    these.save_last(payload(2))
    assert seen and all(seen) and epoch_of(these.last) == 2 and epoch_of(these.previous) == 1


def test_without_hard_links_there_is_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    these = manage(tmp_path)
    for n in (1, 2):
        these.save_last(payload(n))
    assert epoch_of(these.last) == 2 and epoch_of(these.previous) == 1


@pytest.mark.parametrize("moment", ["write", "flush", "rename"])
def test_a_full_disk_keeps_the_one_before(moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    these = manage(tmp_path)
    these.save_last(payload(1))

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    where = {"write": (torch, "save"), "flush": (os, "fsync"), "rename": (os, "replace")}[moment]
    with monkeypatch.context() as patch:
        patch.setattr(*where, full)
        with pytest.raises(OSError, match=r"last\.pth could not be written .*disk full"):
            these.save_last(payload(2))
    assert number(these.newest()) == 1 and not list(tmp_path.glob(".*.tmp"))
    these.save_last(payload(3))
    assert number(these.newest()) == 3


def test_a_limit_of_the_file_size_stops_the_write(tmp_path: Path) -> None:
    """A limit of the file size plays a full disk: every user may set one."""
    these = manage(tmp_path)
    these.save_last(payload(1))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (these.last.stat().st_size // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"last\.pth could not be written"):
            these.save_last(payload(2))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert number(these.newest()) == 1 and not list(tmp_path.glob(".*.tmp"))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_disk_that_is_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this machine does not let us mount")
    try:
        printed = train(disk, expect=3)  # the weights fit once, not together with the one before and the best
        assert "error: " in printed and "could not be written" in printed and "Traceback" not in printed
        assert read_checkpoint(run_dir(disk) / "last.pth")["training"]["progress"]["updates"] >= 1
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_so_many_are_kept(tmp_path: Path) -> None:
    these = manage(tmp_path, keep=2)
    for n in (1, 2, 9, 10, 11):
        these.save_epoch(payload(n))
    assert [path.name for path in these.epochs()] == ["checkpoint-epoch11.pth", "checkpoint-epoch10.pth"]
    these.clear()
    assert not list(tmp_path.glob("*.pth"))


def test_the_best_leaves_out_what_only_resuming_needs(tmp_path: Path) -> None:
    these = manage(tmp_path)
    these.save_best(payload(1))
    assert "training" not in read_checkpoint(these.best) and these.newest() is None


def hold(folder: Path, ready: Path, seconds: float = 60) -> None:
    these = manage(folder)
    these.claim()
    ready.touch()
    time.sleep(seconds)


def test_one_process_a_run(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    other = start(hold, tmp_path / "run", ready)
    assert wait_for(ready.exists, other)
    with pytest.raises(ValueError, match=rf"another process \(pid {other.pid}\) is training in .*run"):
        manage(tmp_path / "run").claim(patience=0.1)
    other.kill()
    manage(tmp_path / "run").claim()  # at once, though it takes a moment to be gone
    other.join()


def test_a_process_that_is_about_to_end_is_waited_for(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    other = start(hold, tmp_path / "run", ready, 0.5)
    assert wait_for(ready.exists, other)
    manage(tmp_path / "run").claim()
    other.join()


def test_a_lock_names_its_machine_where_that_is_another(tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    other = start(hold, tmp_path / "run", ready)
    assert wait_for(ready.exists, other)
    for text, named in (("77 far", r" \(pid 77 on far\)"), ("", "")):
        (tmp_path / "run" / ".lock").write_text(text)
        with pytest.raises(ValueError, match=rf"^another process{named} is training"):
            manage(tmp_path / "run").claim(patience=0)
    other.kill()
    other.join()


def test_nothing_is_loaded_that_could_run_code(tmp_path: Path) -> None:
    these = manage(tmp_path)
    these.save_last(payload(1))
    these.save_last(payload(2))
    torch.save({"training": {"n": Path("/")}}, these.last)
    assert number(these.newest()) == 1


def test_leftovers_of_a_killed_writer_are_written_over(tmp_path: Path) -> None:
    (tmp_path / ".last.pth.tmp").write_bytes(b"half")
    manage(tmp_path).save_last(payload(1))
    assert not list(tmp_path.glob(".*.tmp"))
