"""The clock of the benchmarks: seconds of named parts, by the wall or of this process alone."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
