"""Schedules against the recorded rates and against what defines each of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from trainers.schedules import Schedule, constant, cosine, polynomial

# Two epochs of four updates at base rate 0.01, as the original trainer set them.
RECORDED = [
    0.008867623542572074,
    0.007718895067235705,
    0.006550764934180986,
    0.005358867312681466,
    0.004136453446582762,
    0.0028717458874925874,
    0.0015389305166811453,
    0.0,
]
SCHEDULES = {"polynomial": polynomial, "constant": constant, "cosine": cosine, "floor": partial(cosine, floor=0.1)}


def rates(schedule: Schedule, total: int) -> list[float]:
    return [schedule(step, total) for step in range(1, total + 1)]


def test_polynomial_is_the_papers() -> None:
    assert [0.01 * factor for factor in rates(polynomial, 8)] == pytest.approx(RECORDED, rel=1e-15, abs=0)


@pytest.mark.golden
def test_polynomial_equals_the_recordings_to_machine_precision(recordings: Path) -> None:
    recorded = np.load(recordings / "poly_schedule.npz")
    total = int(recorded["epochs"]) * int(recorded["iters"])
    ours = np.outer(rates(polynomial, total), [0.01, 0.001])
    np.testing.assert_allclose(ours, recorded["lr"], rtol=4e-16, atol=0)

    full = json.loads((recordings / "full/lr_poly.json").read_text())
    for key, total in {"sequence": 21, "epochs2_iters4": 8, "epochs1_iters1": 1}.items():
        recorded_lr = np.array(full[key])[:, 2:]
        np.testing.assert_allclose(np.outer(rates(polynomial, total), [0.01, 0.001]), recorded_lr, rtol=4e-16, atol=0)


def test_polynomial_power_one_is_a_line() -> None:
    assert rates(partial(polynomial, power=1), 4) == [0.75, 0.5, 0.25, 0.0]


def test_cosine_starts_at_one_and_is_half_way_down_in_the_middle() -> None:
    assert cosine(1, 100) == 1.0
    assert cosine(51, 100) == pytest.approx(0.5)
    assert cosine(51, 100, floor=0.2) == pytest.approx(0.6)
    assert cosine(10**6, 10**6, floor=0.2) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_factors_are_in_the_unit_interval_and_need_no_history(schedule: Schedule) -> None:
    forward = rates(schedule, 17)
    assert all(0 <= factor <= 1 for factor in forward)
    assert [schedule(step, 17) for step in range(17, 0, -1)] == forward[::-1]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("step", [0, -1, 6])
def test_a_step_outside_the_run_is_rejected(schedule: Schedule, step: int) -> None:
    with pytest.raises(ValueError, match=f"step is {step} of 5"):
        schedule(step, 5)
