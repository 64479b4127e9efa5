"""Every configuration composes, and bad ones are answered in one line."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import DictConfig, OmegaConf

from configs import build, stored
from configs.cli import add_remedy, explain
from configs.compose import CONFIGS, GROUPS, compose, options, quote_overrides, unknown_key, unknown_option
from configs.errors import ConfigError
from configs.fitting import focal_gamma
from configs.values import check_values
from tests.exits import exit_code

OPTIONS = {group: options(group) for group in GROUPS}
CHOICES = {
    "dataset": "synthetic", "model": "tiny", "loss": "ce", "optimizer": "adamw", "schedule": "poly",
    "predictor": "rankdice", "protocol": "corrected", "trainer": "default",
}  # fmt: skip


@pytest.mark.parametrize("number", range(max(map(len, OPTIONS.values()))))
def test_every_option_composes_and_resolves(number: int) -> None:
    """One option of each group at a time, so often that each option is in one of the configurations."""
    chosen = {group: names[number % len(names)] for group, names in OPTIONS.items()}
    cfg = compose("train", [f"{group}={name}" for group, name in chosen.items()])
    OmegaConf.to_container(cfg, resolve=True)
    for group, name in chosen.items():
        assert cfg[group].get("name", name) == name or group in ("optimizer", "schedule", "trainer")


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_of_valid_values(name: str) -> None:
    cfg = compose("train", [f"experiment={name}"])
    check_values(cfg)
    OmegaConf.to_container(cfg, resolve=True)
    header = (CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8")
    for word in ("Claim:", "Cost:", "Command:"):
        assert word in header, f"experiment/{name}.yaml does not say its {word}"


@pytest.mark.parametrize("name", options("loss"))
def test_every_loss_is_built_with_its_protocol(name: str) -> None:
    cfg = compose("train", [f"loss={name}"])
    for protocol, legacy in (("paper", True), ("corrected", False)):
        cfg.protocol = compose("train", [f"protocol={protocol}"]).protocol
        loss = build.loss(cfg)
        assert loss.legacy is legacy and loss.link in ("softmax", "sigmoid")


def test_every_rule_is_built() -> None:
    fitted = {"T_fit": {"at": 0.4, "gated": False}, "pooled_dice": {"at": [0.4]}, "pooled_iou": {"at": [0.4]}}
    with pytest.raises(ConfigError, match="auto"):  # chooses among rules, so test.py has to score them first
        build.rules(["auto"], fitted=fitted)
    rules = build.rules([name for name in options("predictor") if name != "auto"], fitted=fitted)
    masks = {name: rule(torch.full((1, 1, 2, 2), 0.45)) for name, rule in rules.items()}
    assert all(masks[name].all() for name in fitted) and not masks["T"].any()
    assert set(rules) >= {"T", "max", "rankdice"}


def test_the_paper_protocol_puts_its_own_rankdice_behind_the_name() -> None:
    cfg = compose("train", ["protocol=paper"])
    ours, theirs = (build.rules(["rankdice"])["rankdice"], build.rules(["rankdice"], cfg)["rankdice"])
    assert theirs.keywords["app"] == 2 and theirs.keywords["truncate_mean"] is True
    assert ours.keywords.get("app", 0) == 0


def test_a_threshold_is_that_of_the_rule_and_an_override_of_it_is_not_lost() -> None:
    packed = {"choices": {"predictor": "T"}, "values": {"predictor": {"at": 0.3}}}
    cfg = stored.unpack(packed)
    assert build.rules(["T"], cfg)["T"].keywords == {"at": 0.3} and build.threshold(cfg) == 0.3
    assert build.threshold(stored.unpack(packed, ["threshold=0.4"])) == 0.4
    assert build.threshold(stored.unpack(packed, ["predictor=rankdice"])) == 0.5


@pytest.mark.parametrize("protocol", ["paper", "corrected"])
def test_the_correction_of_the_focal_loss_has_the_exponent_of_the_training(protocol: str) -> None:
    def gamma(loss: str, **values: object) -> float:
        packed = {"choices": {**CHOICES, "loss": loss, "protocol": protocol}, "values": {"loss": values}}
        cfg = stored.unpack(packed, ["correct_focal=true"])
        return focal_gamma(cfg, build.loss(cfg))

    assert gamma("focal") == 2 and gamma("focal", gamma=0) == 0 and gamma("focal", gamma=1.5) == 1.5
    for other in ("ce", "bce", "bce_focal"):
        with pytest.raises(ConfigError, match=f"correct_focal=true needs .*loss={other}"):
            gamma(other)


def test_an_unknown_rule_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"predictor=rankdise is unknown \(did you mean rankdice\?\).*max"):
        build.rules(["rankdise"])
    with pytest.raises(ConfigError, match="predictor=best is unknown"):  # the name that the protocol gives to T
        build.rules(["T"], compose("train", ["+protocol.rules.T=best"]))


PATHS = ["~/data", "/x/Bilder für alle", "/x/(new)", "it's", "/x=1/#2", "ü\\'a\\", "ü\\\\", "C:\\x", "/plain/a b"]


@pytest.mark.parametrize("path", PATHS)
def test_any_path_may_be_the_value_of_an_override(path: str) -> None:
    (word,) = quote_overrides([f"dataset.root={path}"])
    assert OverridesParser.create().parse_override(word).value() == path
    assert quote_overrides([word]) == [word]
    assert compose("train", [f"dataset.root={path}"]).dataset.root == path
    unpacked = stored.unpack({"choices": {"dataset": "folder"}, "values": {}}, [f"dataset.root={path}"])
    assert unpacked.dataset.root == path


def test_what_hydra_reads_stays_as_it_is() -> None:
    words = ["-m", "--cfg", "job", "loss=ce,focal", "validation=[T,max]", "seed=range(3)", "x='a,b'", "[T,"]
    assert quote_overrides(words) == words
    with pytest.raises(OverrideParseException) as caught:
        compose("train", ["validation=[T,"])
    assert explain(caught.value) == "validation=[T, cannot be read. Fix: write key=value, and lists as 'key=[a,b]'."


def test_what_the_system_says_comes_with_a_remedy() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/last.pth")
    assert add_remedy(full).startswith("/disk/last.pth: No space left on device: make room")
    assert "change its permissions" in add_remedy(PermissionError(errno.EACCES, "Permission denied", "/root/x"))
    assert add_remedy(OSError(errno.ENOSPC, "No space left on device")).startswith("No space left on device: make")
    assert add_remedy(OSError("the line is broken")) == "the line is broken"
    assert add_remedy(FileNotFoundError("x does not exist: fix it")) == "x does not exist: fix it"


def test_unknown_names_are_explained_in_one_line() -> None:
    assert "did you mean lr?" in unknown_key("optimizer.lrr")
    assert "did you mean optimizer?" in unknown_key("optimiser.lr")
    assert unknown_key("dataset.sourc.root").startswith(
        "dataset.sourc is not a key of the configuration (did you mean source?); in dataset there are: name, "
    )
    assert "did you mean focal?" in unknown_option("loss", "focla")
    with pytest.raises(Exception) as caught:
        compose("train", ["los=ce"])
    assert "los is not a key" in explain(caught.value) and "loss" in explain(caught.value)
    with pytest.raises(Exception) as caught:
        compose("train", ["loss=cee"])
    assert "loss is one of: b_soft_dice, bce" in explain(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\nb: c: d\n", "bad.yaml, line 2: invalid YAML: "),
        ("a: \x01\n", r'invalid YAML: .*"\S*bad.yaml", position 3'),
    ],
)
def test_an_invalid_yaml_file_is_named_in_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    assert exit_code(lambda: OmegaConf.load(path)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(words, line) and line.endswith("Fix: correct the file.")


def test_a_stored_configuration_comes_back_with_overrides_on_top() -> None:
    cfg = compose("train", ["loss=focal", "protocol=paper", "batch_size=3", "optimizer.lr=0.5"])
    packed = stored.pack(cfg, {**CHOICES, "loss": "focal", "protocol": "paper"})
    back = stored.unpack(packed, ["split=val"])
    assert (back.batch_size, back.loss.name, back.protocol.void, back.split) == (3, "focal", "counted", "val")
    assert back.loss.legacy is True
    corrected = stored.unpack(packed, ["protocol=corrected", "seed=7"])
    assert (corrected.protocol.void, corrected.loss.legacy, corrected.seed) == ("masked", False, 7)
    with pytest.raises(ValueError, match="did you mean split"):
        stored.unpack(packed, ["splitt=val"])


def test_options_belong_to_the_rule_that_is_applied() -> None:
    packed = {"choices": CHOICES, "values": {}}

    def unpack(*overrides: str, rules: tuple[str, ...], **values: object) -> DictConfig:
        return stored.unpack({**packed, "values": values}, overrides, rules)

    assert build.rules(["T"], unpack("predictor.at=0.3", rules=("T",)))["T"].keywords == {"at": 0.3}
    both = unpack("predictor=T", "predictor.at=0.3", rules=("T", "max"))
    assert build.rules(["T"], both)["T"].keywords == {"at": 0.3}
    released = unpack("predictor.at=0.3", rules=("T",), threshold=0.6)
    assert build.threshold(released) == 0.3 and build.threshold(unpack(rules=("T",), threshold=0.6)) == 0.6
    paper = unpack("protocol=paper", "predictor.app=1", rules=("rankdice",))
    assert build.rules(["rankdice"], paper)["rankdice"].keywords["app"] == 1


def test_stored_options_of_the_applied_rule_are_kept() -> None:
    packed = {"choices": {**CHOICES, "predictor": "pooled_dice"}, "values": {"predictor": {"pruning": False}}}
    cfg = stored.unpack(packed, ["predictor.score=iou"], ["pooled_dice"])
    assert (cfg.predictor.pruning, cfg.predictor.score) == (False, "iou")


@pytest.mark.parametrize(
    ("overrides", "rules", "words"),
    [
        (["predictor.at=0.3"], ["T", "max"], "predictor.at is an option of one rule.*T, max.*add predictor=RULE"),
        (["predictor.at=0.3"], [], "predictor.at is an option of one rule. Fix: add predictor=RULE"),
        (["predictor=T"], ["max"], "predictor=T sets a rule that is not applied: the rules are max. Fix: add -p T"),
        (["predictor.at=0.3"], ["rankdice"], "predictor.at is not a key .*Rules with this key: T.*-p"),
        (["predictor.at=0.3"], ["rankdise"], "predictor=rankdise is unknown"),
    ],
)
def test_an_option_that_no_applied_rule_has_is_rejected(overrides: list[str], rules: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        stored.unpack({"choices": CHOICES, "values": {}}, overrides, rules)


@pytest.mark.parametrize(
    ("override", "fix"),
    [("device=cuda", "pass --device cuda instead"), ("epochs=3", "remove it"), ("optimizer.lr=1", "remove it"),
     ("schedule=cosine", "remove it"), ("trainer.accumulate=2", "remove it"), ("save_dir=x", "remove it")],
)  # fmt: skip
def test_an_override_without_effect_is_rejected(override: str, fix: str) -> None:
    with pytest.raises(ConfigError, match=f"{override} has no effect on this command. Fix: {fix}"):
        stored.unpack({"choices": CHOICES, "values": {}}, [override])
    stored.unpack({"choices": CHOICES, "values": {"epochs": 3, "optimizer": {"lr": 1.0}}}, ["trainer.precision=bf16"])


def test_options_of_a_rule_that_differ_from_its_file() -> None:
    def options(*overrides: str, rules: tuple[str, ...]) -> dict[str, dict[str, object]]:
        return build.rule_options(rules, stored.unpack({"choices": CHOICES, "values": {}}, overrides))

    fit = ("predictor=T_fit", "predictor.per_class=true")
    assert options(*fit, rules=("T", "T_fit")) == {"T_fit": {"per_class": True}}
    assert options(*fit, rules=("T",)) == options("predictor=T_fit", rules=("T_fit",)) == {}
    assert options("predictor=T", "predictor.at=0.3", rules=("T",)) == {}  # it is the threshold
    paper = ("protocol=paper", "predictor=rankdice_paper", "predictor.app=1")
    assert options(*paper, rules=("rankdice",)) == {"rankdice_paper": {"app": 1}}


def test_options_of_a_protocol_that_differ_from_its_file() -> None:
    def options(*overrides: str) -> dict[str, dict[str, object]]:
        return build.changed_options(["T"], stored.unpack({"choices": CHOICES, "values": {}}, overrides))

    assert options() == options("protocol=paper") == options("protocol.results=elsewhere") == {}
    halved = ("protocol=paper", "protocol.legacy_bce_iou=true")
    assert options(*halved) == {"protocol": {"legacy_bce_iou": True}}
    assert options("protocol.void=counted", "predictor=T_fit") == {"protocol": {"void": "counted"}}
    assert options("protocol.name=mine", "protocol.void=counted") == {}  # another name marks the results


def test_what_is_not_a_stored_configuration_is_named() -> None:
    packed = {"choices": {"model": "tiny"}, "values": {}}
    for wrong in ({"choices": ["model"]}, {"values": ["model"]}):
        with pytest.raises(ValueError, match="no configuration of this project"):
            stored.unpack({**packed, **wrong})
    for name in ("../../evil", "tiny\n", "", None, ["tiny"]):
        with pytest.raises(ValueError, match="unknown"):
            stored.unpack({"choices": {"model": name}, "values": {}})


@pytest.mark.parametrize("given", ["7", "{train: 3, val: 7, test: 2}", "null"])
def test_a_number_of_images_that_training_takes_is_read_from_the_checkpoint(given: str) -> None:
    cfg = compose("train", [f"dataset.num_images={given}"])
    packed = stored.pack(cfg, CHOICES)
    assert len(build.dataset(stored.unpack(packed), "val")) == len(build.dataset(cfg, "val"))
    for wrong in (0, "abc", 1.5, [7], 10**12, {"val": -1}):
        packed["values"]["dataset"]["num_images"] = wrong
        with pytest.raises(ConfigError, match="num_images"):
            stored.unpack(packed)


def test_differences_name_what_changes_numbers_and_nothing_else() -> None:
    old = {"seed": 0, "num_workers": 0, "optimizer": {"lr": 0.1}, "dataset": {"root": "a"}, "trainer": {"keep": 1}}
    new = {"seed": 0, "num_workers": 4, "optimizer": {"lr": 0.2}, "dataset": {"root": "b"}, "trainer": {"keep": 2}}
    assert stored.differences(old, new) == ["optimizer.lr: 0.1 -> 0.2"]


def test_a_run_of_a_version_with_other_names_of_code_is_the_same_run() -> None:
    """Schedules once were classes and are functions now. Names of code outside this project are settings."""
    old = {"schedule": {"_target_": "trainers.schedules.Polynomial", "power": 0.9}}
    new = {"schedule": {"_target_": "trainers.schedules.polynomial", "_partial_": True, "power": 0.9}}
    assert stored.differences(old, new) == []
    new["schedule"]["power"] = 1.0
    assert stored.differences(old, new) == ["schedule.power: 0.9 -> 1.0"]
    own = {"schedule": {"_target_": "my_schedules.warm", "power": 0.9}}
    assert stored.differences(old, own) == ["schedule._target_: None -> my_schedules.warm"]
    other = {"schedule": {"_target_": "my_schedules.cold", "power": 0.9}}
    assert stored.differences(own, other) == ["schedule._target_: my_schedules.warm -> my_schedules.cold"]


@pytest.mark.parametrize("group", [group for group in GROUPS if len(OPTIONS[group]) > 1])
def test_two_options_of_a_group_are_different_settings(group: str) -> None:
    built = [OmegaConf.to_container(compose("train", [f"{group}={name}"]), resolve=True) for name in OPTIONS[group]]
    for number, one in enumerate(built):
        for other in built[number + 1 :]:
            assert stored.differences(one, other)
