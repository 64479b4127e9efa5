"""What the Makefile's own targets do: `make demo` on less data, for fewer epochs; `make tables` unchanged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

from PIL import Image

from tests.followed import copy_code, follow

FEW = "epochs=1 trainer.tensorboard=false"
FEW_SYNTHETIC = f"{FEW} 'dataset.num_images={{train: 8, val: 4, test: 4}}'"


def recipe(root: Path, target: str) -> list[str]:
    """The commands of a target."""
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    (lines,) = re.findall(rf"^{target}:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    return [line.strip().replace("$(PY)", "python") for line in lines.splitlines()]


def test_make_tables_changes_nothing(root: Path, tmp_path: Path) -> None:
    copy = copy_code(root, tmp_path)
    shutil.copytree(root / "saved" / "results", copy / "saved" / "results")
    shutil.copy(root / "README.md", copy)
    made = [copy / "README.md", *(copy / "docs").glob("*.md"), *(copy / "saved").rglob("tables.*")]
    made += [path for path in (copy / "saved" / "results").iterdir() if path.is_file()]  # the manifest, too
    before = {path: path.read_bytes() for path in made}
    follow(recipe(root, "tables"), copy)
    assert before == {path: path.read_bytes() for path in made}


def test_make_demo(root: Path, tmp_path: Path) -> None:
    lines = recipe(root, "demo")
    assert [line.split()[1] for line in lines] == [
        "train.py", "test.py", "scripts/overview.py", "scripts/paper_tables.py",
    ]  # fmt: skip
    lines[0] += f" {FEW_SYNTHETIC}"
    said = follow(lines, copy_code(root, tmp_path))
    results = tmp_path / "saved/demo/synthetic/tiny/ce/seed0/results"
    dice = {path.stem: json.loads(path.read_text())["scores"]["mean_dice"] for path in results.glob("*.json")}
    assert set(dice) == {"T", "T_fit", "max", "rankdice", "rankiou", "pooled_dice"}
    assert Image.open(tmp_path / "saved/demo/overview.png").width == 6 * (2 * 96 + 2)
    assert f"({100 * dice['T']:.2f}, " in said.replace("*", "")
