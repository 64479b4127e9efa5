"""The options of `trainer` reach what they name, and a training that goes wrong ends as the documents say."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import train as command
from configs import build
from configs.compose import GROUPS, compose
from models import read_checkpoint
from tests.trainers.forked import SMALL, begin, rows, run_dir, same, state, train, wait_for
from tests.trainers.test_update import ALONE

CHOICES = dict.fromkeys(GROUPS, "default")


class Made(Exception):
    """Thrown where the training would begin."""


@pytest.fixture
def update(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What `train.py` with these overrides would update with: the network and the options."""

    def made(*overrides: str) -> tuple[Any, dict[str, Any]]:
        def update(model: Any, *_: Any, **options: Any) -> None:
            raise Made(model, options)

        monkeypatch.setattr(build, "Update", update)
        cfg = compose("train", [*SMALL, f"save_dir={tmp_path}", *overrides])
        try:
            with pytest.raises(Made) as caught:
                command.fit(cfg, CHOICES, ALONE)
            return caught.value.args
        finally:
            made.deterministic = torch.are_deterministic_algorithms_enabled()
            torch.use_deterministic_algorithms(False)

    return made


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("precision=bf16", "bf16"),
        ("accumulate=2", 2),
        ("clip_norm=0.5", 0.5),
        ("channels_last=true", True),
        ("second_forward=true", True),
    ],
)
def test_each_option_reaches_the_update(override: str, expected: Any, update: Any) -> None:
    name, (_, before), (_, after) = override.partition("=")[0], update(), update(f"trainer.{override}")
    assert after[name] == expected != before[name]
    assert {**before, name: expected} == after


def test_options_of_the_network_and_of_torch(update: Any) -> None:
    plain, _ = update()
    assert not update.deterministic
    last, _ = update("trainer.channels_last=true", "trainer.deterministic=true")
    assert update.deterministic

    def packed(model: Any) -> bool:
        weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1]
        return all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)

    assert packed(last) and not packed(plain)
    compiled, _ = update("trainer.compile=true")
    assert type(compiled._orig_mod) is type(plain)


def test_a_loss_that_is_not_finite_ends_with_code_3_and_the_state_before_it(tmp_path: Path) -> None:
    printed = train(tmp_path, "optimizer=sgd", "optimizer.lr=1e25", "schedule=constant", expect=3)
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "on the batch train_000" in line and "No checkpoint was changed" in line
    found = read_checkpoint(run_dir(tmp_path) / "last.pth")
    assert found["training"]["progress"]["updates"] >= 1
    assert all(torch.isfinite(value).all() for value in found["model"].values())


@pytest.mark.slow
def test_all_options_together_resume_bit_for_bit(tmp_path: Path) -> None:
    words = "precision=fp16 accumulate=2 clip_norm=1 channels_last=true second_forward=true deterministic=true"
    options = [f"trainer.{word}" for word in words.split()]
    assert "BatchNorm over 1 images" in train(tmp_path / "whole", *options)
    process = begin("train.py", *SMALL, f"save_dir={tmp_path}", *options, log=tmp_path / "stopped.txt")
    run, whole = run_dir(tmp_path), run_dir(tmp_path / "whole")
    assert wait_for(lambda: (run / "last.pth").exists(), process)
    os.kill(process.pid or 0, signal.SIGUSR2)
    process.join()
    assert process.exitcode == 75
    assert "resuming after epoch" in train(tmp_path, *options)
    same(state(run / "last.pth"), state(whole / "last.pth"))
    assert rows(run) == rows(whole)
