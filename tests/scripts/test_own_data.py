"""The tutorial docs/own-data.md, followed to the letter on generated images."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.errors import UserError

LESS = ("epochs=2", "trainer.tensorboard=false")  # what the test adds to training, so that it takes seconds


def scene(generator: np.random.Generator) -> tuple[Image.Image, Image.Image]:
    """A bright disc and a blue stripe, and their mask of 0, 1 and 2."""
    y, x = np.mgrid[:72, :88]
    cy, cx, radius, column = generator.integers((20, 20, 8, 60), (50, 50, 16, 80))
    mask = np.zeros((72, 88), dtype=np.uint8)
    mask[(y - cy) ** 2 + (x - cx) ** 2 < radius**2] = 1
    mask[abs(x - column) < 4] = 2
    colours = np.array([[80, 60, 60], [220, 160, 150], [70, 90, 220]])
    pixels = colours[mask] + generator.normal(0, 12, (72, 88, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


@pytest.fixture
def here(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with ``mine`` and ``new`` in it, as the reader would have them."""
    generator = np.random.default_rng(0)
    for folder in ("mine/images", "mine/masks", "new"):
        (tmp_path / folder).mkdir(parents=True)
    for patient in range(10):
        for letter in "ab":
            image, mask = scene(generator)
            image.save(tmp_path / "mine" / "images" / f"p{patient:02d}_{letter}.jpg", quality=95)
            mask.save(tmp_path / "mine" / "masks" / f"p{patient:02d}_{letter}.png")
    for name in ("first", "second"):
        scene(generator)[0].save(tmp_path / "new" / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def run(command: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a line of the tutorial as Python would, but in this process: starting one costs seconds."""
    python, script, *arguments = shlex.split(command)
    assert python == "python"
    monkeypatch.setattr(sys, "argv", [script, *arguments, *(LESS if script == "train.py" else ())])
    try:
        runpy.run_path(str(root / script), run_name="__main__")
    except SystemExit as done:
        assert not done.code, command


def test_the_tutorial(
    here: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (root / "docs" / "own-data.md").read_text()
    (classes,) = blocks(text, "yaml")
    (here / "mine" / "classes.yaml").write_text(classes)
    commands = [line for block in blocks(text, "bash") for line in block.splitlines() if line.strip()]
    for command in commands:
        run(command, root, monkeypatch)
    said = capsys.readouterr().out
    assert "train 12, val 4, test 4 images, 3 classes, no fault" in said
    assert "dataset.num_classes=3" in said

    patients = {}
    for split in ("train", "val", "test"):
        patients[split] = {line[:3] for line in (here / "mine" / f"{split}.txt").read_text().split()}
    assert len(set.union(*patients.values())) == sum(map(len, patients.values())) == 10
    for rule in ("T", "max", "rankdice"):
        result = json.loads((here / f"saved/mine/tiny/ce/seed0/results/{rule}.json").read_text())
        assert len(result["images"]) == 4 and result["classes"] == ["background", "lesion", "vessel"]
    for name in ("first", "second"):
        labels = Image.open(here / "predicted" / f"{name}.png")
        assert labels.mode == "P" and labels.size == (88, 72) and np.asarray(labels).max() <= 2
        assert labels.getpalette()[3:9] == [230, 60, 60, 60, 120, 230]
        assert (here / "predicted" / "overlay" / f"{name}.png").exists()
        for part in ("background", "lesion", "vessel"):
            assert Image.open(here / "predicted-windows" / "classes" / name / f"{part}.png").size == (88, 72)


def test_prediction_needs_the_classes_and_not_the_images(here: Path, root: Path) -> None:
    from configs.compose import compose
    from scripts.inference.files import dataset_info

    (here / "classes.yaml").write_text("classes: [background, cell]\nmean: [0.1, 0.2, 0.3]\n")
    cfg = compose("train", ["dataset=folder", "dataset.root=gone"])
    with pytest.raises(UserError, match=r"gone/classes\.yaml.*--classes"):
        dataset_info(cfg)
    info = dataset_info(cfg, here / "classes.yaml")
    assert info.classes == ("background", "cell") and info.mean == (0.1, 0.2, 0.3) and info.scored == (1,)
    inline = compose("train", ["dataset=folder", "dataset.classes=[background,nucleus]"])
    assert dataset_info(inline).classes == ("background", "nucleus")
    assert dataset_info(compose("train", ["dataset=cityscapes"])).num_classes == 19
    assert dataset_info(compose("train", ["dataset.num_classes=4"])).num_classes == 4
