"""CONTRIBUTING.md followed to the letter: a rule, a model and a loss of one's own, in a copy of the repository."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.followed import copy_code, follow, typed

LESS = ("trainer.tensorboard=false",)  # what the test adds to training, so that it takes less time


def chapters(root: Path) -> str:
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return text[text.index("## A rule of your own") :]


def files(text: str) -> dict[str, str]:
    """What the text says to write: each block follows a sentence that ends with the file's name."""
    found = {}
    for match in re.finditer(r"```(?:python|yaml)\n(.*?)```", text, re.DOTALL):
        sentence = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        names = re.findall(r"`([\w/]+\.(?:py|yaml))`", sentence)
        assert names, f"no file is named before:\n{match[0]}"
        found[names[-1]] = match[1]
    return found


@pytest.fixture(scope="module")
def followed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of the repository after all that the text says, and what the commands printed."""
    copy, text = tmp_path_factory.mktemp("repository"), chapters(root)
    copy_code(root, copy)
    for name, content in files(text).items():
        assert not (copy / name).exists(), f"{name} would replace a file of the repository"
        (copy / name).write_text(content, encoding="utf-8")
    lines = [" ".join([c, *(LESS if "train.py" in c else ())]) for c in typed(text)]
    return copy, follow(lines, copy)


def test_the_rule_is_scored_with_the_others(followed: tuple[Path, str]) -> None:
    copy, said = followed
    results = copy / "saved/smoke/synthetic/tiny/ce/seed0/results"
    assert {path.stem for path in results.glob("*.json")} == {"hysteresis", "rankdice"}
    assert re.search(r"epoch +2/2 .*hysteresis \d", said) and "predict: hysteresis" in said


def test_model_and_loss_are_trained_and_scored(followed: tuple[Path, str]) -> None:
    copy, _ = followed
    smoke = copy / "saved/smoke/synthetic/plain"
    state = torch.load(smoke / "brier/seed0/last.pth", weights_only=True)
    assert state["config"]["choices"] | {"model": "plain", "loss": "brier"} == state["config"]["choices"]
    assert any(key.startswith("body.") for key in state["model"])
    rules = {"T", "T_fit", "max", "rankdice", "rankiou", "pooled_dice"}
    assert {path.stem for path in (smoke / "brier/seed0/results").glob("*.json")} == rules
    assert (smoke / "ce/seed0/best_model.pth").is_file()


def test_what_is_shown_does_what_it_says(root: Path) -> None:
    spaces: dict[str, dict] = {}
    for name, content in files(chapters(root)).items():
        if name.endswith(".py"):
            spaces[name] = {"__name__": name}
            exec(compile(content, name, "exec"), spaces[name])
    probs = torch.tensor([[0.9, 0.5, 0.3], [0.7, 0.5, 0.3]]).reshape(1, 2, 3, 1)
    kept = spaces["my_rules.py"]["hysteresis"](probs).flatten(2)
    assert kept.tolist() == [[[True, True, False], [False, False, False]]]
    logits, labels = torch.zeros(1, 2, 2, 2), torch.tensor([[[0, 1], [255, 1]]])
    assert spaces["my_losses.py"]["Brier"]()(logits, labels).item() == pytest.approx(0.5)  # 2 · (1/2)²
    assert spaces["my_models.py"]["Plain"](3)(torch.rand(1, 3, 7, 9)).logits.shape == (1, 3, 7, 9)
