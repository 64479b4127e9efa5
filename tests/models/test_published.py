"""Released checkpoints: recognised, translated, and rejected if they contradict themselves."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs import build, stored
from configs.fitting import focal_gamma
from models import CheckpointError, read_checkpoint
from models.pspnet import PSPNet
from models.published import is_published, load_published, translate_config, translate_state

LOADER = {"type": "VOC", "args": {"batch_size": 8, "crop_size": 380}}
CONFIG = {
    "name": "DeepLab",
    "arch": {"type": "DeepLab", "args": {"backbone": "resnet50"}},
    "train_loader": LOADER,
    "test_loader": {"type": "VOC", "args": {"batch_size": 8, "crop_size": 448}},
    "loss": "BCEDiceLoss",
    "predict": {
        "temperature": 0.05,
        "CoI": [1, 2],
        "train": "T",
        "val": "T",
        "test": "rankdice",
        "threshold": 0.4,
    },
    "trainer": {"epochs": 300},
}


def test_configuration_in_our_names():
    assert translate_config(CONFIG) == {
        "choices": {
            "dataset": "voc2012",
            "model": "deeplabv3plus",
            "loss": "b_soft_dice",
            "predictor": "rankdice",
            "optimizer": "sgd",
            "schedule": "poly",
            "protocol": "paper",
            "trainer": "default",
        },
        "values": {
            "temperature": 0.05,
            "threshold": 0.4,
            "epochs": 300,
            "batch_size": 8,
            "dataset": {"crop": 380, "eval_crop": 448},
        },
    }


def test_a_converted_configuration_says_all_that_the_released_one_says():
    theirs = translate_config(CONFIG)
    ours = stored.pack(stored.unpack(theirs), theirs["choices"])
    for one in (theirs, ours):
        cfg = stored.unpack(one)
        assert (cfg.temperature, cfg.threshold, cfg.epochs, cfg.batch_size) == (0.05, 0.4, 300, 8)
        assert (cfg.dataset.crop, cfg.dataset.eval_crop) == (380, 448)
        assert (cfg.protocol.name, cfg.predictor.name, cfg.optimizer.momentum) == ("paper", "rankdice", 0.9)


def test_configurations_older_than_two_settings():
    """One of the released configurations lacks temperature and threshold."""
    old = CONFIG | {"predict": {"CoI": "all", "train": "T", "val": "T", "test": "max"}}
    values = translate_config(old)["values"]
    assert values["temperature"] == 1.0 and values["threshold"] == 0.5


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("CrossEntropyLoss2d", "ce"),
        ("FocalLoss", "focal"),
        ("BCEWithLogitsLoss2d", "bce"),
        ("DiceLoss", "soft_dice"),
        ("BDiceLoss", "b_soft_dice"),
        ("LovaszSoftmax", "lovasz"),
        ("CE_DiceLoss", "ce_dice"),
    ],
)
def test_every_published_loss(root, theirs, ours):
    assert translate_config(CONFIG | {"loss": theirs})["choices"]["loss"] == ours
    assert (root / f"configs/loss/{ours}.yaml").exists()


def test_a_released_focal_checkpoint_can_be_corrected():
    cfg = stored.unpack(translate_config(CONFIG | {"loss": "FocalLoss"}), ["correct_focal=true"])
    assert focal_gamma(cfg, build.loss(cfg)) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": "Dice"}, r"unknown loss 'Dice'.*CrossEntropyLoss2d, "),
        ({"arch": {"type": "UNet"}}, r"unknown model 'UNet'.*DeepLab, PSPNet, FCN8"),
        (
            {"train_loader": {}, "test_loader": {}},
            r"unknown data set None.*CityScapes, VOC, kvasirSEG",
        ),
    ],
)
def test_names_of_other_projects(change, message):
    with pytest.raises(CheckpointError, match=message):
        translate_config(CONFIG | change)


def test_what_is_not_a_released_checkpoint(tmp_path):
    assert not is_published({"format": 1, "model": {}, "config": {}})
    assert not is_published({"arch": "DataParallel", "state_dict": {}, "config": "a text"})
    torch.save({"weights": torch.zeros(1)}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a\.pth.*arch, state_dict and config"):
        load_published(read_checkpoint(tmp_path / "a.pth"), "a.pth")


@pytest.mark.parametrize("shape", [(2, 2, 16, 16), (2, 16, 16), ()])
def test_a_trained_upsampling_of_fcn8_is_rejected(shape):
    with pytest.raises(CheckpointError, match=r"'up_final\.weight'"):
        translate_state("fcn8", {"up_final.weight": torch.randn(shape)})


def test_an_unknown_tensor_is_named():
    with pytest.raises(CheckpointError, match=r"'head\.weight'.*pspnet"):
        translate_state("pspnet", {"head.weight": torch.zeros(1)})


@pytest.mark.golden
class TestReleasedFile:
    @pytest.fixture(scope="class")
    def checkpoint(self, released):
        return released("pspnet", 2)

    def test_reads_from_the_file(self, checkpoint, tmp_path):
        torch.save(checkpoint, tmp_path / "checkpoint-epoch150.pth")
        content = read_checkpoint(tmp_path / "checkpoint-epoch150.pth")
        assert is_published(content) and content["monitor_best"] == 2.6
        network, config = load_published(content)
        assert isinstance(network, PSPNet) and not network.training
        assert (config["choices"]["dataset"], network.num_classes, content["epoch"]) == ("kvasir_seg", 2, 150)
        theirs = checkpoint["state_dict"]["module.master_branch.0.bottleneck.0.weight"]
        assert torch.equal(network.pyramid.merge[0].weight, theirs)

    @pytest.mark.parametrize("epoch", [-1, 1.5, True, None, "3", 10**30])
    def test_an_invalid_epoch_is_rejected(self, checkpoint, epoch):
        with pytest.raises(CheckpointError, match=r"a\.pth: epoch=.* is invalid"):
            load_published(checkpoint | {"epoch": epoch}, source="a.pth")

    def test_every_key_has_its_place(self, checkpoint):
        state = {key.removeprefix("module."): tensor for key, tensor in checkpoint["state_dict"].items()}
        with torch.device("meta"):
            wanted = PSPNet(2).state_dict()
        translated = translate_state("pspnet", state)
        assert translated.keys() == wanted.keys() and len(translated) == len(state)

    def test_the_prefix_may_be_absent(self, checkpoint):
        bare = {key.removeprefix("module."): tensor for key, tensor in checkpoint["state_dict"].items()}
        load_published(checkpoint | {"state_dict": bare})

    def test_classes_that_do_not_fit_the_data_set(self, checkpoint):
        config = copy.deepcopy(checkpoint["config"])
        config["train_loader"]["type"] = "VOC"
        with pytest.raises(CheckpointError, match=r"for 2 classes, but its data set voc2012 has 21"):
            load_published(checkpoint | {"config": config})

    def test_another_model_than_it_says(self, checkpoint):
        config = checkpoint["config"] | {"arch": {"type": "FCN8"}}
        with pytest.raises(CheckpointError, match=r"a\.pth is of a fcn8 but has no tensor"):
            load_published(checkpoint | {"config": config}, source="a.pth")

    def test_a_tensor_is_missing(self, checkpoint):
        state = dict(checkpoint["state_dict"])
        del state["module.layer3.0.conv1.weight"]
        with pytest.raises(CheckpointError, match=r"it lacks 'backbone\.layer3\.0\.conv1\.weight'"):
            load_published(checkpoint | {"state_dict": state})


@pytest.mark.golden
@pytest.mark.slow
def test_conversion_gives_the_same_scores(released, real_data, root, tmp_path):
    """test.py reads the released file and the converted one, and finds the same in both."""
    torch.save(released("pspnet", 2), tmp_path / "theirs.pth")
    tree = tmp_path / "Kvasir-SEG"
    for kind in ("images", "masks"):
        (tree / kind).mkdir(parents=True)
        for index in range(2):
            name = f"val_{index:03}.jpg"
            (tree / kind / name).symlink_to(real_data / "Kvasir-SEG" / kind / name)
    for split in ("train", "val", "test"):
        (tree / f"{split}.txt").write_text("val_000\nval_001\n")

    def run(*command: str | Path) -> None:
        done = subprocess.run([sys.executable, *map(str, command)], cwd=root, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run("scripts/convert_checkpoint.py", tmp_path / "theirs.pth", tmp_path / "ours.pth")
    converted = torch.load(tmp_path / "ours.pth", weights_only=True)
    assert converted["epoch"] == 150 and converted["config"]["choices"]["protocol"] == "paper"
    scores = []
    for name in ("theirs", "ours"):
        out = tmp_path / name
        run("test.py", "-r", f"{out}.pth", "-p", "T", "--device", "cpu", "--out", out, f"dataset.root={tree}")
        scores.append(json.loads(next(out.rglob("T.json")).read_text())["scores"])
    assert scores[0] == scores[1]
