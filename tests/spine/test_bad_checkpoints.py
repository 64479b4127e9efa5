"""Checkpoints that are damaged, or whose training went astray, are named with what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from configs import build, stored
from configs.checkpoint import load, read_state
from configs.cli import run_cli
from configs.compose import compose
from configs.errors import TrainingError, UserError
from configs.fitting import Fitter
from tests.trainers.forked import begin
from tests.trainers.test_update import ALONE
from trainers.checkpoint import save
from trainers.evaluator import evaluate

CHOICES = {
    "dataset": "synthetic", "model": "tiny", "loss": "ce", "optimizer": "adamw", "schedule": "poly",
    "predictor": "rankdice", "protocol": "corrected", "trainer": "default",
}  # fmt: skip
FIRST = "down.0.0.0.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network, stored as train.py stores one."""
    cfg = compose("train", ["experiment=smoke", "run_dir=x"])
    path = tmp_path_factory.mktemp("run") / "best_model.pth"
    state = build.model(cfg).state_dict()
    save({"format": 1, "model": state, "config": stored.pack(cfg, CHOICES), "epoch": 1}, path)
    return path


def nan(checkpoint: dict[str, Any]) -> None:
    checkpoint["model"][FIRST][0, 0] = float("nan")


def text(checkpoint: dict[str, Any]) -> None:
    checkpoint["model"][FIRST] = "weights"


def listed(checkpoint: dict[str, Any]) -> None:
    checkpoint["config"]["values"] = [1]


def number(checkpoint: dict[str, Any]) -> None:
    checkpoint["config"]["choices"]["model"] = 3


def classes(checkpoint: dict[str, Any]) -> None:
    checkpoint["config"]["values"]["model"]["num_classes"] = "many"


def argument(checkpoint: dict[str, Any]) -> None:
    checkpoint["config"]["values"]["model"]["depth"] = 3


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (nan, rf"bad\.pth holds NaN or infinity in '{FIRST}' \(1 such tensors\)"),
        (text, r"bad\.pth does not hold a dictionary of tensors"),
        (listed, "the checkpoint holds no configuration of this project"),
        (number, "model=3 is unknown; model is one of"),
        (classes, r"model\.num_classes='many'"),
        (argument, r"model\.depth='3'"),
    ],
)
def test_damage_is_named(spoil: Callable[[dict[str, Any]], None], message: str, whole: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(whole, weights_only=True)
    spoil(checkpoint)
    torch.save(checkpoint, tmp_path / "bad.pth")
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "bad.pth")


@pytest.mark.parametrize("override", ["temperature=0", "temperature=inf", "threshold=2", "threshold=nan", "=1"])
def test_invalid_overrides_are_named(override: str, whole: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{override} (is invalid: expected|names no key)"):
        load(whole, [override])


@pytest.mark.parametrize("training", [None, {}, {"optimizer": {}, "scaler": {}, "progress": {"x": 1}, "rng": []}, [1]])
def test_what_is_not_the_state_of_a_training_cannot_be_resumed(training: Any, tmp_path: Path) -> None:
    torch.save({"model": {}, **({} if training is None else {"training": training})}, tmp_path / "last.pth")
    with pytest.raises(ValueError, match=r"last\.pth does not hold the state of a training"):
        read_state(tmp_path / "last.pth")


@pytest.mark.parametrize("content", [b"", b"[1", b"- a", b"a: ${b", b"a: 1", b"\xff\xfe"])
def test_a_damaged_config_yaml_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml is damaged: .*Fix: remove it"):
        stored.read_config(tmp_path / "config.yaml")


def test_an_argument_that_a_network_does_not_take_is_named() -> None:
    with pytest.raises(ValueError, match=r"TinyUNet: .*unexpected keyword argument 'narrow'"):
        build.model(compose("train", ["experiment=grid_smoke", "model=tiny"]))


def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_scored(whole: Path, tmp_path: Path) -> None:
    out, errors, place = tmp_path / "out.txt", tmp_path / "errors.txt", tmp_path / "taken"
    place.touch()
    process = begin("test.py", "-r", str(whole), "--out", str(place), log=out, errors=errors, cwd=tmp_path)
    process.join()
    assert (process.exitcode, out.read_text()) == (2, "")
    assert errors.read_text() == f"error: {place}: File exists: it is a file; choose another folder\n"


@pytest.mark.parametrize(
    "error", [FileExistsError(17, "File exists", "a"), IsADirectoryError(21, "Is a directory", "a")]
)
def test_a_path_of_the_wrong_kind_is_bad_input(error: OSError, capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as done:
        run_cli(main)
    assert done.value.code == 2 and capsys.readouterr().err.startswith("error: a: ")


@pytest.mark.parametrize(
    ("options", "kind", "values"),
    [
        (("calibrate=temperature",), "temperature", {"temperature": 0}),
        (("calibrate=temperature",), "temperature", {"temperature": None}),
        (("calibrate=temperature",), "temperature", {"temperature": [1.0] * 5}),
        (("calibrate=temperature",), "temperature", {}),
        (("calibrate=class",), "class", {"temperature": [1.0] * 4, "bias": [0.0] * 4}),
        (("calibrate=class",), "class", {"temperature": [-1.0] * 5, "bias": [0.0] * 5}),
        (("calibrate=class",), "class", {"temperature": [1.0] * 5}),
        ((), "T_fit", {"at": 2.0, "gated": False}),
        ((), "T_fit", {"at": [0.5] * 4, "gated": False}),
        ((), "T_fit", {"gated": True}),
        ((), "pooled_dice", {"at": "0.5"}),
        ((), "auto", {"why": "because"}),
        ((), "auto", {"rule": ["T"]}),
        (("gate=fit",), "rankdice", {"least": "x"}),
        (("gate=fit",), "rankdice", {"least": 7}),
        (("gate=fit",), "rankdice", {"mean_dice": 0.5}),
    ],
)
def test_invalid_fitted_values_are_named(whole: Path, options, kind: str, values: dict[str, Any]) -> None:
    network, cfg, _ = load(whole, options)

    def fitter() -> Fitter:
        return Fitter(cfg, network, whole, ALONE, may_fit=False)

    one = fitter()
    is_calibration = kind in ("temperature", "class")
    one.file.put(kind, one.settings() if is_calibration else one.rule_settings(kind), values, {})
    one.save()
    try:
        with pytest.raises(UserError, match=r"best_model\.fitted\.json.*Fix: delete"):
            fitter().to_probs() if is_calibration else fitter().rules([kind])
    finally:
        one.file.path.unlink()


def test_a_rule_that_needs_no_fit_may_have_any_name(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, cfg, _ = load(whole)
    node = OmegaConf.create({"name": "pooled_mine", "_target_": "rankseg.rules.argmax", "_partial_": True})
    monkeypatch.setattr(build, "rule_node", lambda name, cfg: node)
    assert Fitter(cfg, network, whole, ALONE).rules(["pooled_mine"])[1] == {}


def test_a_network_that_overflows_is_named(whole: Path) -> None:
    """All weights are finite, and the scores are not."""
    network, cfg, _ = load(whole)
    for parameter in network.parameters():
        parameter.data.mul_(1e30)
    data = build.dataset(cfg, "val")
    fitter = Fitter(cfg, network, whole, ALONE)
    with pytest.raises(TrainingError, match="NaN"):
        evaluate(
            network, build.eval_loader(cfg, data, ALONE), fitter.rules(["T"])[0], build.loss(cfg),
            build.scoring(cfg, data.info), ALONE,
        )  # fmt: skip
    with pytest.raises(TrainingError, match="NaN"):
        fitter.calibration("temperature")
