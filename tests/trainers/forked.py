"""Commands of the project in processes of their own, forked from one that has imported torch already.

A process started from nothing spends seconds on imports; tests that kill and restart a training need many.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import forkserver, resource_tracker, util
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from configs.compose import compose

ROOT = Path(__file__).resolve().parents[2]
# What the commands import, some of it only when they need it.
PRELOADED = (
    "torch._dynamo", "torch.utils.tensorboard", "torchvision", "timm", "segmentation_models_pytorch", "scipy.stats",
    "matplotlib.pyplot", "configs.build", "datasets.synthetic", "datasets.transforms", "models.published",
    "trainers.panels", "tests.trainers.forked",
)  # fmt: skip
# Five steps an epoch, two epochs, a state after every step: all that can be interrupted, in a second or two.
SMALL = (
    "experiment=smoke",
    "verify=false",
    "batch_size=2",
    "epochs=2",
    "dataset.size=32",
    "dataset.num_images={train: 10, val: 3, test: 3}",
    "validation=[max]",
    "predictor=max",
    "trainer.tensorboard=false",
    "trainer.save_minutes=1e-9",
    "trainer.save_every=1",
    "device=cpu",
)


def context() -> ForkServerContext:
    """A server that has imported what the commands import, and forks."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(list(PRELOADED))
    return found


def fork_server() -> None:
    """Make this process's server a fork of it: what tests import, the server need not import again."""

    def spawn(path: str, arguments: list[str], keep: list[int]) -> int:
        """Fork, and do what the command of the server's own program would do."""
        if pid := os.fork():
            return pid
        try:
            for fd in map(int, os.listdir("/proc/self/fd")):
                if fd > 2 and fd not in keep:
                    with contextlib.suppress(OSError):
                        os.close(fd)
            sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__  # pytest has others
            exec(arguments[-1], {})
        finally:
            os._exit(0)

    context()
    compose("train")  # finds Hydra's plugins, once for all commands
    resource_tracker.ensure_running()
    with mock.patch.object(util, "spawnv_passfds", spawn):
        forkserver.ensure_running()


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """Begin a function in a forked process."""
    process = context().Process(target=target, args=arguments)
    process.start()
    return process


def redirect(out: Path, errors: Path) -> None:
    """Be a process that was started from nothing, with its output in files."""
    multiprocessing.set_start_method("fork", force=True)
    torch.set_num_threads(1)
    with out.open("ab") as file, errors.open("ab") as error_file:
        os.dup2(file.fileno(), 1)
        os.dup2(error_file.fileno(), 2)


def command(
    name: str, arguments: list[str], log: Path, environment: dict[str, str], errors: Path | None, cwd: Path
) -> None:
    """Be `python train.py ...`: standard output and error, and the traces of a crash, go to the logs."""
    os.environ.update(environment)
    redirect(log, errors or log)
    os.chdir(cwd)
    script = ROOT / name
    sys.argv, sys.path[:0] = [str(script), *arguments], [str(script.parent)]
    runpy.run_path(sys.argv[0], run_name="__main__")


def begin(
    name: str,
    *arguments: str,
    log: Path,
    environment: dict[str, str] | None = None,
    errors: Path | None = None,
    cwd: Path = ROOT,
) -> ForkServerProcess:
    """Start a command of the project; `errors` takes the standard error out of the log."""
    log.parent.mkdir(parents=True, exist_ok=True)
    return start(command, name, list(arguments), log, environment or {}, errors, cwd)


def train(save_dir: Path, *more: str, expect: int = 0, **options: Any) -> str:
    """Train the small run to its end, or to the exit code that is expected; return what it printed."""
    log = save_dir / "log.txt"
    log.unlink(missing_ok=True)
    process = begin("train.py", *SMALL, f"save_dir={save_dir}", *more, log=log, **options)
    process.join()
    printed = log.read_text()
    assert process.exitcode == expect, f"exit code {process.exitcode}\n{printed}"
    return printed


def run_dir(save_dir: Path) -> Path:
    return save_dir / "synthetic" / "tiny" / "ce" / "seed0"


def wait_for(condition: Callable[[], bool], process: ForkServerProcess, seconds: float = 120) -> bool:
    """Wait until something holds; False where the process ended before."""
    deadline = time.monotonic() + seconds
    while not condition():
        if not process.is_alive():
            return False
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.002)
    return True


def state(path: Path) -> dict[str, Any]:
    """A checkpoint without the time that it took to make."""
    found = torch.load(path, weights_only=True)
    found["training"]["progress"].pop("seconds")
    for key in ("save_dir", "num_workers", "run_dir"):
        found["config"]["values"].pop(key, None)
    return found


def same(a: Any, b: Any, path: str = "") -> None:
    """Assert that two checkpoints are equal bit for bit, and name where they are not."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), f"{path} differs"
    elif isinstance(a, dict):
        assert list(a) == list(b), f"{path}: {list(a)} and {list(b)}"
        for key in a:
            same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{path}/{number}")
    else:
        assert a == b, f"{path}: {a} and {b}"


def rows(run: Path) -> list[dict[str, Any]]:
    """The journal of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def ranks(size: int) -> list[dict[str, str]]:
    """The environments that torchrun would give to the processes of one machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]
