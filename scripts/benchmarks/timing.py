"""The clocks of the benchmarks: by the wall, and of this process alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class Seconds(NamedTuple):
    """Seconds by the wall, and of the processor, all threads together."""

    wall: float
    cpu: float


def in_turn(
    ways: dict[str, Callable[[], object]], rounds: int, device: torch.device | str = "cpu", warm_up: int = 1
) -> dict[str, Seconds]:
    """Return the median seconds of each way. All take turns in every round, so that drift affects all alike.

    The first `warm_up` rounds do not count.
    """
    watches = {clock: Stopwatch(torch.device(device), clock) for clock in CLOCKS}
    seconds: dict[str, list[Seconds]] = {name: [] for name in ways}
    for number in tqdm(range(rounds + warm_up), desc="rounds", leave=False, disable=None):
        for name, way in ways.items():
            begin = [watch.now() for watch in watches.values()]
            way()
            if number >= warm_up:
                ends = [watch.now() for watch in watches.values()]
                seconds[name].append(Seconds(*(end - start for end, start in zip(ends, begin, strict=True))))
    return {name: Seconds(*map(median, zip(*spent, strict=True))) for name, spent in seconds.items()}


def add_clock(parser: argparse.ArgumentParser) -> None:
    """Declare `--clock`."""
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="what seconds are; cpu, this process's, on a machine that others use too, with "
        "OMP_NUM_THREADS=1 (default wall)",
    )


class Stopwatch:
    """Adds up, part by part, the seconds of the calls that it watches; it waits for the device's work."""

    def __init__(self, device: torch.device, clock: str = "wall") -> None:
        self.device, self.clock = device, CLOCKS[clock]
        self.spent: dict[str, float] = {}

    def now(self) -> float:
        """The time, when all work so far is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def add(self, part: str, start: float) -> None:
        """Count the time since `start` to a part."""
        self.spent[part] = self.spent.get(part, 0.0) + self.now() - start

    def call(self, part: str, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a function and count its seconds."""
        start = self.now()
        result = function(*arguments, **options)
        self.add(part, start)
        return result

    def watch(self, owner: Any, method: str, part: str) -> None:
        """From now on, count the seconds of one method of one object, or of one function of a module."""
        original = getattr(owner, method)

        def measured(*arguments: Any, **options: Any) -> Any:
            return self.call(part, original, *arguments, **options)

        if isinstance(owner, nn.Module):
            object.__setattr__(owner, method, measured)  # past nn.Module's own bookkeeping
        else:
            setattr(owner, method, measured)

    def iterate(self, batches: Iterable[Any], part: str) -> Iterator[Any]:
        """Yield what `batches` yields, and count the seconds of waiting for it."""
        iterator = iter(batches)
        end = object()
        while (batch := self.call(part, next, iterator, end)) is not end:
            yield batch
