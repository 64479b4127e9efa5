"""Invalid values are rejected by name, before anything is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from configs import stored
from configs.compose import GROUPS, compose, options
from configs.values import check_values
from tests.trainers.forked import train

CHOICES = {group: options(group)[0] for group in GROUPS}


def with_override(word: str) -> DictConfig:
    """The configuration with an override, set as Hydra sets it."""
    override, cfg = OverridesParser.create().parse_override(word), compose("train")
    OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
    return cfg


@pytest.mark.parametrize(
    "override",
    [
        "epochs=0", "epochs=-1", "epochs=two", "epochs=true", "batch_size=0", "batch_size=1.5", "num_workers=-1",
        "num_workers=1000000", "seed=99999999999999999999", "seed=-1", "seed=[1,2]", "optimizer.lr=-1",
        "optimizer.lr=nan",
        "optimizer.weight_decay=-1", "trainer.accumulate=0", "trainer.clip_norm=-1", "trainer.validate_every=0",
        "trainer.save_every=0", "trainer.keep=-1", "trainer.save_minutes=-1", "trainer.panels=-1",
        "loader_timeout=-1", "dataset.crop=0", "dataset.resize=0", "dataset.resize=[3]", "dataset.resize=[3,0]",
        "dataset.crop=[3,0]", "dataset.eval_crop=[3,4]",
        "schedule.power=-1", "validation=max", "validation=[1]", "optimizer.lr=true", "trainer.clip_norm=abc",
        "verify=maybe", "verify=1", "on_error=maybe", "save_dir=", "epochs=null",
        "trainer.tensorboard=off", "trainer.compile=no", "trainer.channels_last=1", "trainer.deterministic=yes",
        "trainer.second_forward=off", "loss.legacy=no", "protocol.legacy_bce_iou=off", "protocol.void=foo",
        "protocol.label_fill=x", "dataset.rotate=10.5", "protocol.rules=5", "protocol.results=../x",
        "dataset.num_images=0", "dataset.num_images=x",
    ],
)  # fmt: skip
def test_an_invalid_value_is_named_with_what_is_expected(override: str) -> None:
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=rf"^{re.escape(key)}=.* is invalid: expected \w"):
        check_values(with_override(override))
    if key.startswith("dataset."):  # and so is what a checkpoint is tested with
        with pytest.raises(ValueError, match=rf"^{key}="):
            stored.unpack({"choices": {}, "values": {}}, [override])


@pytest.mark.parametrize(
    "override",
    [
        "dataset.resize=[30,40]", "dataset.resize=8", "dataset.crop=[30,40]", "dataset.crop=null",
        "dataset.eval_crop=null", "trainer.clip_norm=1", "optimizer.lr=1",
        "dataset.num_images={test: 0}",
    ],
)  # fmt: skip
def test_valid_values_pass(override: str) -> None:
    check_values(with_override(override))


def test_several_options_of_a_group_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"^model= takes one option.*deeplab"):
        stored.pack(compose("train"), {**CHOICES, "model": ["tiny"]})  # type: ignore[dict-item]


def test_nothing_is_written_for_an_invalid_run(tmp_path: Path) -> None:
    said = train(tmp_path / "saved", "epochs=0", expect=2).splitlines()
    assert len(said) == 1 and said[0].startswith("error: epochs=0 is invalid")
    assert [path.name for path in (tmp_path / "saved").rglob("*") if path.is_file()] == ["log.txt"]
    said = train(tmp_path / "saved", "dataset=", expect=2).splitlines()
    assert len(said) == 1 and said[0].startswith("error: dataset= is unknown; dataset is one of: cityscapes, ")
