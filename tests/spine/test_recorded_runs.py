"""What test.py does, against the original's own tester, end to end: eight images in VOC's layout to every score.

The recorded network is a PSPNet of 21 classes, filled by the recipe, in a checkpoint of the released format. Images 4
and 5 are all void and make a batch of their own, which is skipped; image 2 is all void, its neighbour is not.
"""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from configs import build
from configs.checkpoint import load
from models import SegmentationOutput, read_checkpoint
from models.published import load_published
from tests import recipe
from trainers.distributed import World
from trainers.evaluator import evaluate
from trainers.forward import ToProbs
from trainers.metrics import PAPER_EPSILON, Counts, mean_over_classes
from trainers.results import EvalResult

pytestmark = pytest.mark.golden
HERE = World(0, 1, torch.device("cpu"))
LOSSES = {
    "CrossEntropyLoss2d": "ce",
    "BCEWithLogitsLoss2d": "bce",
    "DiceLoss": "soft_dice",
    "FocalLoss": "focal",
    "LovaszSoftmax": "lovasz",
    "CE_DiceLoss": "ce_dice",
}
FAULTS = {"BCEWithLogitsLoss2d": ("legacy_bce_iou",), "DiceLoss": ("legacy_soft_dice_void",)}
# The original's RankDice stops one pixel short of a full image, as many classes are here with BCE, and sums in
# float32. An image has 21 x 64 x 64 pairs of class and pixel; rules that compare single pixels may flip two where
# saturated probabilities tie.
EXACT, PAIRS = ("T", "max"), 21 * 64 * 64
RUNS = {  # (loss, temperature, threshold): the rules that were recorded
    ("CrossEntropyLoss2d", 1.0, 0.5): ("max", "T", "rankdice"),
    ("CrossEntropyLoss2d", 0.05, 0.5): ("max", "T", "rankdice"),
    ("CrossEntropyLoss2d", 0.05, 0.3): ("T",),
    ("BCEWithLogitsLoss2d", 1.0, 0.5): ("max", "T", "rankdice"),
    ("BCEWithLogitsLoss2d", 0.05, 0.5): ("max", "T", "rankdice"),
    ("DiceLoss", 0.05, 0.5): ("max", "T", "rankdice"),
    ("FocalLoss", 0.05, 0.5): ("T",),
    ("LovaszSoftmax", 1.0, 0.5): ("max",),
    ("CE_DiceLoss", 1.0, 0.5): ("max",),
}


class Remembering(nn.Module):
    """A network that computes each batch once; the runs differ in what is done with its logits."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.known = network, {}

    def forward(self, images: Tensor) -> SegmentationOutput:
        key = images.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.network(images)
        return self.known[key]


@pytest.fixture(scope="module")
def recorded(recordings: Path) -> dict[str, Any]:
    return json.loads((recordings / "full/tester_e2e.json").read_text())


@pytest.fixture(scope="module")
def voc(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded images in VOC's layout. They were arrays, so the files called .jpg hold PNG."""
    root = tmp_path_factory.mktemp("voc")
    home = root / "VOCdevkit" / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (home / folder).mkdir(parents=True)
    arrays = np.load(recordings / "full/tester_e2e.npz")
    names = [f"img{i}" for i in range(8)]
    for name in names:
        Image.fromarray(arrays[f"{name}_image"]).save(home / f"JPEGImages/{name}.jpg", format="PNG")
        Image.fromarray(arrays[f"{name}_label"]).save(home / f"SegmentationClass/{name}.png")
    (home / "ImageSets/Segmentation/val.txt").write_text("\n".join(names))
    return root


@pytest.fixture(scope="module")
def checkpoint(recordings: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The network in a file of the released format, whose configuration says how it was tested."""
    loader = {"type": "VOC", "args": {"batch_size": 2, "crop_size": 64}}
    predict = {"temperature": 0.05, "threshold": 0.3, "CoI": list(range(1, 21)), "test": "T"}
    content = recipe.released(recordings, "pspnet", 21, train_loader=loader, test_loader=loader, predict=predict)
    path = tmp_path_factory.mktemp("released") / "checkpoint-epoch150.pth"
    torch.save(content, path)
    yield path
    path.unlink()  # 190 MB


@pytest.fixture(scope="module")
def network(checkpoint: Path) -> Iterator[Remembering]:
    """The network as it is loaded from the file; later loads get the same one, instead of 190 MB again."""
    content = read_checkpoint(checkpoint)
    network, config = load_published(content)
    remembering = Remembering(network)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("configs.checkpoint.read_checkpoint", lambda *_: content)
        patch.setattr("models.published.load_published", lambda *_, **__: (remembering, config))
        yield remembering


def overrides(voc: Path, case: tuple[str, float, float]) -> list[str]:
    """The command line of a recorded run, without checkpoint and rules."""
    loss, temperature, threshold = case
    settings = {"loss": LOSSES[loss], "dataset.root": voc, "temperature": temperature, "threshold": threshold}
    settings |= {f"protocol.{fault}": "true" for fault in FAULTS.get(loss, ())}
    return [f"{key}={value}" for key, value in settings.items()]


def run(checkpoint: Path, voc: Path, case: tuple[str, float, float]) -> dict[str, EvalResult]:
    """What test.py does between reading its arguments and writing results."""
    network, cfg, _ = load(checkpoint, overrides(voc, case))
    assert (cfg.protocol.name, cfg.batch_size, cfg.dataset.eval_crop) == ("paper", 2, 64)
    data = build.dataset(cfg, cfg.split)
    rules = build.rules(RUNS[case], cfg)
    loader = build.eval_loader(cfg, data, HERE)
    scoring = build.scoring(cfg, data.info)
    criterion = build.loss(cfg)
    to_probs = ToProbs(criterion.link, cfg.temperature)
    return evaluate(network, loader, rules, criterion, scoring, HERE, to_probs=to_probs)


def entry(recorded: dict[str, Any], case: tuple[str, float, float], rule: str) -> dict[str, Any]:
    loss, temperature, threshold = case
    return recorded["runs"][f"{loss}__{rule}__temp{temperature}__thr{threshold}"]


def same_scores(ours: dict[str, Any], theirs: dict[str, Any], atol: float) -> None:
    """Every average, each class's too, NaN where theirs is; the loss in any case to its last recorded digit."""
    assert ours["test_loss"] == pytest.approx(theirs["test_loss"], abs=6e-6)
    for key, name in (("pixel_accuracy", "Pixel_Accuracy"), ("mean_iou", "Mean_IoU"), ("mean_dice", "Mean_Dice")):
        assert ours[key] == pytest.approx(theirs[name], abs=atol), key
    for key, name in (("class_iou", "Class_IoU"), ("class_dice", "Class_Dice")):
        wanted = {index: float(value) for index, value in theirs[name].items()}
        got = {index: float("nan") if value is None else value for index, value in ours[key].items()}
        assert got == pytest.approx(wanted, abs=atol, nan_ok=True), key


def same_images(
    counts: Counts,
    scored: tuple[int, ...],
    theirs: dict[str, Any],
    loss: str,
    rule: str,
    names: tuple[str, ...] = ("mDice", "mIoU", "pixAcc"),
) -> None:
    """Every recorded value of every image. Rules that compare single pixels may differ by a few (see PAIRS)."""
    halved = "legacy_bce_iou" in FAULTS.get(loss, ())
    images = {
        "mDice": mean_over_classes(counts.dice(PAPER_EPSILON), scored),
        "mIoU": mean_over_classes(counts.iou(PAPER_EPSILON, legacy_bce_iou=halved), scored),
        "pixAcc": counts.pixel_accuracy(PAPER_EPSILON),
    }
    for key in names:
        ours = images[key]
        pixels = 21 * (1 if key == "pixAcc" and rule not in EXACT else 0) + 2
        wanted = [float(value) for value in theirs["per_image"][key]]
        atol = pixels / PAIRS if key == "pixAcc" else 1e-4
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=atol + 1e-7, err_msg=f"{rule} {key}")


def test_every_recorded_run_is_compared(recorded: dict[str, Any]) -> None:
    keys = {f"{loss}__{rule}__temp{t}__thr{at}" for (loss, t, at), rules in RUNS.items() for rule in rules}
    assert keys == set(recorded["runs"])


@pytest.mark.parametrize("case", RUNS, ids=lambda case: "-".join(map(str, case)))
def test_the_recorded_scores(network, recorded, checkpoint, voc, case) -> None:
    """Three decimals equal for T and max; RankDice may differ in the third, by a pixel a class (see EXACT)."""
    for rule, result in run(checkpoint, voc, case).items():
        theirs = entry(recorded, case, rule)
        assert result.names == ["img0", "img1", "img2", "img3", "img6", "img7"]
        assert (theirs["images_counted"], theirs["skipped_batches"]) == (6, [2])
        same_scores(result.scores, theirs, atol=5e-6 if rule in EXACT else 1.005e-3)

        same_images(result.counts, result.scored, theirs, case[0], rule)


def test_the_checkpoint_says_how_it_is_tested(network, checkpoint) -> None:
    _, cfg, _ = load(checkpoint)
    assert (cfg.dataset.name, cfg.model.name, cfg.loss.name) == ("voc2012", "pspnet", "ce")
    assert (cfg.temperature, cfg.threshold, cfg.batch_size) == (0.05, 0.3, 2)
    assert (cfg.dataset.crop, cfg.dataset.eval_crop) == (64, 64)
    _, other, _ = load(checkpoint, ["dataset=kvasir_seg"])
    assert other.dataset.eval_crop == 320  # another data set keeps its own


def read_counts(path: Path, names: list[str]) -> Counts:
    """The pixels per image and scored class of a result's CSV; it lacks those of the background."""
    parts = {key: torch.zeros(len(names), 21, dtype=torch.int64) for key in ("intersection", "predicted", "actual")}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            for key, part in parts.items():
                part[names.index(row["image"]), int(row["class"])] = int(row[key])
    return Counts(**parts, pixels=torch.zeros(len(names), dtype=torch.int64))


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS, ids=lambda case: "-".join(map(str, case)))
def test_the_command_itself(recorded, checkpoint, voc, tmp_path, case) -> None:
    """The files that test.py writes hold the recorded scores, of all classes and of every image."""
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(root / "test.py"), "-r", str(checkpoint), *overrides(voc, case)]
    rules = [word for rule in RUNS[case] for word in ("-p", rule)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, *rules, "--out", str(tmp_path)], cwd=tmp_path, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in tmp_path.glob("*.json")} == set(RUNS[case])
    for rule in RUNS[case]:
        result, theirs = json.loads((tmp_path / f"{rule}.json").read_text()), entry(recorded, case, rule)
        assert (result["protocol"], result["temperature"], result.get("threshold", 0.5)) == ("paper", *case[1:])
        assert result["images"] == ["img0", "img1", "img2", "img3", "img6", "img7"]
        same_scores(result["scores"], theirs, atol=5e-6 if rule in EXACT else 1.005e-3)
        counts = read_counts(tmp_path / f"{rule}.csv", result["images"])
        same_images(counts, tuple(result["scored"]), theirs, case[0], rule, ("mDice", "mIoU"))
