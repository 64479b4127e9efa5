"""The benchmarks' arithmetic: parts add up to the whole, and the original's step does what its row says."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from configs import build
from configs.compose import compose
from scripts.benchmarks import step, test
from scripts.benchmarks.timing import Seconds, Stopwatch, time_in_turn
from tests.trainers.test_update import ALONE, batch, make, network
from trainers.metrics import Scoring

OPTIONS = argparse.Namespace(steps=2, clock="wall", overrides=[])


def test_the_stopwatch_counts_each_part() -> None:
    watch, module = Stopwatch(torch.device("cpu")), nn.Identity()
    watch.watch(module, "forward", "waiting")
    module.register_forward_pre_hook(lambda *_: time.sleep(0))
    owner = SimpleNamespace(rest=lambda seconds: time.sleep(seconds) or seconds)
    watch.watch(owner, "rest", "resting")
    assert module(3) == 3 and owner.rest(0.02) + owner.rest(0.02) == 0.04
    assert watch.call("reading", next, iter([1, 2])) == 1
    assert watch.spent["resting"] >= 0.04 > watch.spent["waiting"] >= 0
    assert watch.spent.keys() == {"waiting", "resting", "reading"}


def test_the_originals_step_runs_the_network_twice_and_scores_it() -> None:
    net, given = network(norm=True), batch()
    update = make(net, second_forward=True)
    dice, iou, accuracy = step.update_and_score(update, Scoring(3, (1, 2)), given)
    assert net.norm.num_batches_tracked == 2
    assert dice.shape == iou.shape == (5, 3) and accuracy.shape == (5,)
    torch.testing.assert_close(iou, dice / (2 - dice), equal_nan=True)
    assert not net._forward_hooks


def test_the_parts_of_a_step_are_all_there() -> None:
    cfg = compose("train", ["experiment=smoke"])
    data = build.dataset(cfg, "train")
    batches = step.repeat_epochs(build.train_loader(cfg, data, ALONE))
    rows = step.measure_parts(cfg, ALONE, batches, OPTIONS)
    assert list(rows) == list(step.PARTS) and min(rows.values()) >= 0 < rows["backward"]
    ways = step.compare_steps(cfg, ALONE, batches, OPTIONS, build.scoring(cfg, data.info))
    assert len(ways) == 3 and min(ways.values()) > 0


def test_a_command_is_measured_and_its_failure_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "import sys\nsum(range(10**6))\nif len(sys.argv) > 1: sys.exit('error: ' + sys.argv[1] + ' is absent')\n"
    (tmp_path / "test.py").write_text(script)
    monkeypatch.setattr(test, "ROOT", tmp_path)
    spent = time_in_turn({"command": lambda: test.call("test.py")}, 1, warm_up=0)["command"]
    assert spent.wall > 0 and spent.cpu > 0
    with pytest.raises(ValueError, match=r"test\.py failed: .*absent\.pth"):
        test.call("test.py", "absent.pth")


def test_ratios_are_to_each_single_rule(capsys: pytest.CaptureFixture[str]) -> None:
    rows = dict.fromkeys((*test.RULES, test.IDLE), Seconds(3.0, 6.0))
    test.print_ratios(rows | {"-p max": Seconds(2.0, 4.0), "-p rankdice": Seconds(1.0, 8.0)})
    last = capsys.readouterr().out.splitlines()[-2]
    assert last == "| `-p T -p max -p rankdice` | 3.00 | 1.50 | 3.00 | 6.00 | 1.50 | 0.75 |"
