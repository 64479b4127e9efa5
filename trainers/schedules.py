"""Learning-rate schedules: functions of the global step, so that a resumed run continues exactly.

A schedule receives the 1-based number of the next update and the number of updates of the whole run. It returns the
factor for the base rate of every parameter group.
"""

from __future__ import annotations

import math
from collections.abc import Callable

Schedule = Callable[[int, int], float]  # (step in 1..total, total) -> factor


def polynomial(step: int, total: int, power: float = 0.9) -> float:
    """Return the decay of the paper, (1 - step/total)^power.

    As in the experiments, step runs from 1 to total. So the base rate is never used, and the last update has rate 0.
    """
    return (1 - _share(step, total)) ** power


def constant(step: int, total: int) -> float:
    """Return 1 for every step."""
    _share(step, total)
    return 1.0


def cosine(step: int, total: int, floor: float = 0.0) -> float:
    """Return half a cosine from 1, at the first update, towards `floor` (Loshchilov & Hutter, ICLR 2017, eq. 5)."""
    _share(step, total)
    return floor + (1 - floor) * (1 + math.cos(math.pi * (step - 1) / total)) / 2


def _share(step: int, total: int) -> float:
    if not 1 <= step <= total:
        raise ValueError(f"step is {step} of {total}: updates are numbered from 1 to total")
    return step / total
