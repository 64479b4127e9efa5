"""The file of fitted values: what is found again, and what is rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import rankseg
from configs.errors import UserError
from trainers.fitted import FittedFile, fitted_threshold, gated_rule

SETTINGS = {"protocol": "corrected", "calibrate": "none"}
IMAGES = {"split": "val", "fingerprint": "abc", "num_images": 3}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.pth"
    path.write_bytes(b"weights")
    return path


def test_values_are_found_again_by_kind_settings_and_images(checkpoint: Path) -> None:
    file = FittedFile(checkpoint)
    for at in (0.3, 0.4):  # the second replaces the first
        file.put("T_fit", SETTINGS, {"at": at}, IMAGES)
    file.put("T_fit", {**SETTINGS, "calibrate": "class"}, {"at": 0.2}, IMAGES)
    file.save()
    again = FittedFile(checkpoint)
    assert len(again.entries) == 2
    assert again.find("T_fit", SETTINGS) == again.find("T_fit", SETTINGS, IMAGES) == {"at": 0.4}
    assert again.find("auto", SETTINGS) is None
    assert again.find("T_fit", {**SETTINGS, "protocol": "paper"}) is None
    assert again.find("T_fit", SETTINGS, {**IMAGES, "fingerprint": "other"}) is None
    again.save()  # nothing was added: nothing is written
    assert json.loads(again.path.read_text())["checkpoint"] == again.sha256


def test_file_of_another_checkpoint(checkpoint: Path) -> None:
    file = FittedFile(checkpoint)
    file.put("T_fit", SETTINGS, {"at": 0.3}, IMAGES)
    file.save()
    checkpoint.write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"last\.fitted\.json was fitted for another checkpoint.*Fix:"):
        FittedFile(checkpoint)
    assert FittedFile(checkpoint, replace=True).entries == []


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"entries": [{"kind": "T_fit"}]}', '{"entries": 3, "checkpoint": null}']
)
def test_damaged_file(checkpoint: Path, text: str) -> None:
    checkpoint.with_name("last.fitted.json").write_text(text)
    with pytest.raises(UserError, match=r"last\.fitted\.json"):
        FittedFile(checkpoint)


def test_rules_with_fitted_values() -> None:
    probs = torch.tensor([[[0.4, 0.3, 0.1]], [[0.6, 0.3, 0.1]]])
    assert fitted_threshold(probs, at=0.3, gated=False)[:, 0].tolist() == [[True, True, False]] * 2
    assert fitted_threshold(probs, at=0.3, gated=True).flatten(1).any(1).tolist() == [False, True]
    full = rankseg.rank_dice(probs, pruning=False).predict
    scores = rankseg.expected_dice(probs, full)[:, 0]
    between = float(scores.mean())
    kept = gated_rule(probs, rule=lambda p: rankseg.rank_dice(p, pruning=False).predict, least=between)
    assert torch.equal(kept.flatten(1).any(1), scores >= between) and kept.any() and not kept.all()
