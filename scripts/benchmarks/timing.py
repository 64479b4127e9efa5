"""Time candidates in turn, or the parts of one of them; read the memory of a process; print tables."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm


class Seconds(NamedTuple):
    """Seconds of wall time, and of processor time of all threads together."""

    wall: float
    cpu: float


def read_clocks(device: torch.device) -> Seconds:
    """Wait for the work of the device, then return both clocks. Child processes count only after they have ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Seconds(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu", warm_up: int = 1
) -> dict[str, Seconds]:
    """Return the median seconds of each candidate over the rounds; `warm_up` rounds before them do not count.

    All candidates take turns in every round, so that a change of the machine's speed affects all alike.
    """
    device = torch.device(device)
    seconds: dict[str, list[Seconds]] = {name: [] for name in candidates}
    for number in tqdm(range(rounds + warm_up), desc="rounds", leave=False, disable=None):
        for name, run in candidates.items():
            begin = read_clocks(device)
            run()
            if number >= warm_up:
                end = read_clocks(device)
                seconds[name].append(Seconds(end.wall - begin.wall, end.cpu - begin.cpu))
    return {name: Seconds(*map(median, zip(*spent, strict=True))) for name, spent in seconds.items()}


def add_clock(parser: argparse.ArgumentParser) -> None:
    about = "clock of the times; on a busy machine: cpu, the processor time, with OMP_NUM_THREADS=1 (default wall)"
    parser.add_argument("--clock", choices=Seconds._fields, default="wall", help=about)


class Stopwatch:
    """Sums the seconds of watched calls by part. It waits for the work of the device before and after each call."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.device, self.clock = device, clock
        self.spent: dict[str, float] = {}

    def now(self) -> float:
        """Wait for the work of the device, then return the seconds of the clock."""
        return getattr(read_clocks(self.device), self.clock)

    def call(self, part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function, add its seconds to the part, and return its result."""
        start = self.now()
        result = function(*arguments, **options)
        self.spent[part] = self.spent.get(part, 0.0) + self.now() - start
        return result

    def watch(self, owner: Any, method: str, part: str) -> None:
        """From now on, add the seconds of a method of an object, or of a function of a module, to the part."""
        set_attribute = object.__setattr__ if isinstance(owner, nn.Module) else setattr  # not as a sub-module
        set_attribute(owner, method, partial(self.call, part, getattr(owner, method)))


def print_table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table, each row as soon as it is computed."""
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |", flush=True)


def read_memory(key: str, pid: int | str = "self") -> int:
    """Return a number of /proc/PID/status, such as VmRSS, in bytes; 0 if the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:")), 0)
