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
from datasets.synthetic import Synthetic
from models.tiny import TinyUNet
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
    "model._target_=own.Model",
    "loss._target_=own.Loss",
    "dataset.source._target_=own.Data",
    "predictor._target_=own.rule",
]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder from which Python imports; tests write modules called `own` into it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    return tmp_path


def fit(*overrides: str) -> None:
    cfg = compose("train", [*SMALL, "save_dir=saved", "epochs=1", "num_workers=0", *overrides])
    train.fit(cfg, CHOICES, ALONE)


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.split(".")[0])
@pytest.mark.parametrize("error", ["ValueError('mine')", "ImportError('mine')", "KeyError('mine')"])
def test_a_bug_keeps_its_traceback(place: str, error: str, here: Path) -> None:
    (here / "own.py").write_text(OWN.format(error=error))
    with pytest.raises(Exception, match="mine") as caught:
        run_cli(lambda: fit(place))
    assert caught.type.__name__ == error.partition("(")[0]
    assert any(str(entry.path).endswith("own.py") for entry in caught.traceback)


def test_an_import_that_fails_inside_a_module_keeps_its_traceback(here: Path) -> None:
    (here / "own.py").write_text("import a_package_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        run_cli(lambda: fit("model._target_=own.Model"))


@pytest.mark.parametrize(
    "override",
    [
        "model._target_=models.Absent",
        "model._target_=absent.Model",
        "predictor=rankdice_ba predictor.app=7",
        "epochs=0",
    ],
)
def test_bad_input_is_one_line(override: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(fit, *override.split()) == 2
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
