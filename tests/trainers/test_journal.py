"""What TensorBoard is given: tags by score and class, charts of all rules, panels, the table of runs."""

from __future__ import annotations

import os
import re
import resource
import time
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from configs.cli import run_cli
from configs.files import write_text
from datasets import DatasetInfo
from tests.trainers.forked import start
from trainers.journal import Journal, read_rows
from trainers.panels import Panel, sheet, tiles

CLASSES = ("background", "traffic light", "car (1)")
INFO = DatasetInfo("three", ("background", "a", "b"), ((0, 0, 0), (255, 0, 0), (0, 0, 255)), (1, 2))


def scores(dice: float) -> dict[str, object]:
    return {"mean_dice": dice, "ece": float("nan"), "class_dice": {"0": 1.0, "1": dice, "2": float("nan")}}


@pytest.fixture
def events(tmp_path: Path) -> EventAccumulator:
    journal = Journal(tmp_path, classes=CLASSES)
    for epoch in (1, 2):
        journal.log(3 * epoch, "train", epoch=epoch, loss=1 / epoch, lr0=0.1)
        for rule in ("T", "rankdice_nonoverlap"):
            journal.log(3 * epoch, f"val_{rule}", epoch=epoch, **scores(epoch / 4))
    journal.log_image(6, "val/a", torch.zeros(3, 8, 8, dtype=torch.uint8))
    journal.log_hparams({"loss": "ce", "lr": 0.1}, 0.7)
    journal.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    return accumulator


def test_rules_are_side_by_side_and_classes_have_their_names(events: EventAccumulator, tmp_path: Path) -> None:
    rules, classes = ("T", "rankdice_nonoverlap"), ("background", "traffic_light")
    expected = {f"val/mean_dice/{rule}" for rule in rules} | {"train/epoch", "train/loss", "train/lr0"}
    expected |= {f"val_class_dice/{name}/{rule}" for name in classes for rule in rules}
    found = events.Tags()["scalars"]
    assert {tag for tag in found if not tag.startswith("hparam/")} == expected
    assert [(e.step, e.value) for e in events.Scalars("val/mean_dice/T")] == [(3, 0.25), (6, 0.5)]
    assert events.Tags()["images"] == ["val/a"]
    row = read_rows(tmp_path / "metrics.jsonl")[1]  # the file keeps the numbers of the classes
    assert row["kind"] == "val_T" and row["class_dice"] == {"0": 1.0, "1": 0.25, "2": None}


def test_a_run_that_starts_over_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for dice, epochs in ((0.25, 3), (0.5, 1)):
        journal = Journal(tmp_path, classes=CLASSES)
        for epoch in range(1, epochs + 1):
            journal.log(epoch, "val_T", epoch=epoch, **scores(dice))
        journal.close()
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(e.step, e.value) for e in accumulator.Scalars("val/mean_dice/T")] == [(1, 0.5)]
    assert [row["mean_dice"] for row in read_rows(tmp_path / "metrics.jsonl")] == [0.5]


def test_charts_hold_every_rule_of_one_score(events: EventAccumulator) -> None:
    layout = Layout.FromString(events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag[0] for part in layout.category for chart in part.chart}
    tags = events.Tags()["scalars"]
    for title, prefix in (("mean_dice", "val/mean_dice/"), ("traffic_light", "val_class_dice/traffic_light/")):
        chosen = [tag for tag in tags if re.search(charts[title], tag)]
        assert chosen == [prefix + "T", prefix + "rankdice_nonoverlap"]
    assert "car__1_" in charts


def test_the_table_of_runs_has_settings_and_the_last_scores(events: EventAccumulator) -> None:
    assert events.Scalars("hparam/best_mean_dice")[0].value == pytest.approx(0.7)
    assert events.Scalars("hparam/val_T_mean_dice")[0].value == 0.5
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = HParamsPluginData.FromString(content).session_start_info.hparams
    assert hparams["loss"].string_value == "ce" and hparams["lr"].number_value == pytest.approx(0.1)


def fill(folder: Path, log: Path) -> None:
    """A limit of the file size plays a full disk: every user may set one."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    def write() -> None:
        journal = Journal(folder)
        for step in range(50):
            journal.log_image(step, "val/a", torch.randint(256, (3, 64, 64), dtype=torch.uint8))
            time.sleep(0.01)

    run_cli(write)


def test_a_full_disk_is_one_line_though_a_thread_writes(tmp_path: Path) -> None:
    process = start(fill, tmp_path / "run", tmp_path / "log")
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 3 and len(said.splitlines()) == 1, said
    assert said.startswith(f"error: {tmp_path}/run/tensorboard") and "choose a folder on another disk" in said


@pytest.mark.parametrize("line", [b"[1]", b"{}", b"5", b'{"step": 2, "ki', b"\xff\xfe"])
def test_rows_end_where_a_line_is_none(line: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "kind": "train"}\n' + line + b"\n")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1]
    Journal(tmp_path, step=1, tensorboard=False).log(2, "train")
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_what_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"rows\.json"):
            write_text(tmp_path / "rows.json", "x" * 2000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_classes_of_one_name_stay_apart(tmp_path: Path) -> None:
    assert Journal(None, classes=("a", "b", "a")).classes == ["a_0", "b", "a_2"]


@pytest.mark.parametrize(("height", "width"), [(12, 16), (700, 900)])
def test_a_sheet_has_the_tiles_of_a_row_at_a_readable_size(height: int, width: int) -> None:
    torch.manual_seed(0)
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    target, probs = torch.randint(3, (height, width)), torch.rand(3, height, width)
    masks = {name: probs > level for name, level in (("T", 0.5), ("max", 0.6), ("rankdice", 0.3))}
    panel = Panel(image, target, probs, masks, INFO)
    picture = sheet(panel)
    tall, heading = round(320 * height / width), round(1.3 * (320 // 10)) + 2 + 2
    assert picture.shape == (3, 2 * (tall + heading), 3 * 322) and picture.dtype == torch.uint8
    assert list(tiles(panel))[:3] == ["image", "truth", "probability"]
    one_row = sheet(panel, columns=6, width=width, font_size=11)
    assert one_row.shape == (3, height + 18, 6 * (width + 2))
    first = picture[:, heading - 2 : heading - 2 + tall, 1:321].float()
    same = torch.nn.functional.interpolate(image[None].float(), (tall, 320), mode="area")[0]
    assert (first - same).abs().mean() < 12


def test_a_clock_that_was_set_back_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard reads event files in the order of the dates in their names."""
    first = Journal(tmp_path)
    for step in (1, 2, 3):
        first.log(step, "train", loss=1.0)
    first.close()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 3600)
    resumed = Journal(tmp_path, step=2)
    for step in (3, 4):
        resumed.log(step, "train", loss=2.0)
    resumed.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 1.0),
        (3, 2.0),
        (4, 2.0),
    ]
