"""Learning-rate schedules: stateless functions of the global step.

A schedule receives the 1-based number of the next update and the number of updates of the whole run. It returns the
factor for the base rate of every parameter group. A schedule has no state, so a resumed run continues exactly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Map (step in 1..total, total) to the factor of the base learning rate."""

    def __call__(self, step: int, total: int) -> float: ...


@dataclass(frozen=True)
class Polynomial:
    """The decay of the paper, (1 - step/total)^power.

    As in the experiments, step runs from 1 to total. So the base rate is never used, and the last update has
    rate 0.
    """

    power: float = 0.9

    def __call__(self, step: int, total: int) -> float:
        _check(step, total)
        return (1 - step / total) ** self.power


@dataclass(frozen=True)
class Constant:
    """A constant rate."""

    def __call__(self, step: int, total: int) -> float:
        _check(step, total)
        return 1.0


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from 1, at the first update, towards `floor` (Loshchilov & Hutter, ICLR 2017, eq. 5)."""

    floor: float = 0.0

    def __call__(self, step: int, total: int) -> float:
        _check(step, total)
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * (step - 1) / total)) / 2


def _check(step: int, total: int) -> None:
    if not 1 <= step <= total:
        raise ValueError(f"step is {step} of {total}: updates are numbered from 1 to total")
