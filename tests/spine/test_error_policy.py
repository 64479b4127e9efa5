"""A bug in somebody's own model, rule, loss or data set keeps its traceback; bad input is one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import train
from configs.cli import run_cli
from configs.compose import GROUPS, compose
from configs.errors import UserError
from tests.exits import exit_code
from tests.trainers.forked import SMALL
from tests.trainers.test_update import ALONE

CHOICES = dict.fromkeys(GROUPS, "default")
OWN = """
import torch
from datasets import Synthetic
from models import TinyUNet
from trainers.losses import CrossEntropy


class Model(TinyUNet):
    def forward(self, images):
        raise {error}


class Loss(CrossEntropy):
    def compute(self, *batch):
        raise {error}


class Data(Synthetic):
    def read(self, index):
        raise {error}


def rule(probs, **options):
    raise {error}
"""
PLACES = [
    "model._target_={}.Model",
    "loss._target_={}.Loss",
    "dataset.source._target_={}.Data",
    "predictor._target_={}.rule",
]


def fit(tmp_path: Path, *overrides: str) -> None:
    cfg = compose("train", [*SMALL, f"save_dir={tmp_path}/saved", "epochs=1", "num_workers=0", *overrides])
    train.fit(cfg, CHOICES, ALONE)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.split(".")[0])
@pytest.mark.parametrize("error", ["ValueError('mine')", "ImportError('mine')", "KeyError('mine')"])
def test_a_bug_keeps_its_traceback(place: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"own_{error[:3].lower()}_{place.split('.')[0]}"
    (tmp_path / f"{name}.py").write_text(OWN.format(error=error))
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(Exception, match="mine") as caught:
        run_cli(lambda: fit(tmp_path, place.format(name)))
    assert caught.type.__name__ == error.partition("(")[0]
    assert any(str(entry.path).endswith(f"{name}.py") for entry in caught.traceback)


def test_an_import_that_fails_inside_a_module_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        run_cli(lambda: fit(tmp_path, "model._target_=own_broken.Model"))


@pytest.mark.parametrize(
    "override",
    [
        "model._target_=models.Absent",
        "model._target_=absent.Model",
        "predictor=rankdice_ba predictor.app=7",
        "epochs=0",
    ],
)
def test_bad_input_is_one_line(override: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(fit, tmp_path, *override.split()) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: ")


def test_a_traceback_may_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def main() -> None:
        raise UserError("n=0 is invalid")

    monkeypatch.setenv("RANKSEG_TRACEBACK", "0")
    monkeypatch.setattr(sys, "argv", ["x.py", "--traceback"])
    with pytest.raises(UserError):
        run_cli(main)
    assert sys.argv == ["x.py"]
