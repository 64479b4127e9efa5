"""The report of a run: its numbers against evaluate(), its charts, and the page as a browser sees it."""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor, nn

from configs import build, stored
from configs.checkpoint import load
from configs.compose import compose
from configs.fitting import Fitter
from rankseg import rules
from rankseg.calibration import fit_temperature
from rankseg.expected import confidence
from scripts.analysis import charts
from scripts.analysis import page as pages
from scripts.analysis.measure import (
    EXPECTED,
    Findings,
    assess,
    by_size,
    false_alarms,
    measure,
    smallest_selected,
    variants,
)
from scripts.analysis.selective import MaskRecord, record_masks
from scripts.report import report
from trainers.checkpoint import save
from trainers.distributed import World
from trainers.evaluator import evaluate
from trainers.fitted import fit_calibration_on
from trainers.forward import ToProbs
from trainers.metrics import Scoring

ROOT = Path(__file__).resolve().parents[2]
HERE = World(0, 1, torch.device("cpu"))
SMALL = ("dataset.num_images={train: 16, val: 6, test: 8}", "dataset.size=48")
RULES = ("T", "max", "rankdice")
VOID_TAGS = {"meta", "img", "br"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: the small network after forty steps, with a journal of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    cfg = compose("train", SMALL)
    torch.manual_seed(0)
    network, criterion = build.model(cfg), build.loss(cfg)
    optimizer = torch.optim.AdamW(network.parameters(), 5e-3)
    loader = build.train_loader(cfg, build.dataset(cfg, "train"), HERE)
    for epoch in range(20):
        for batch in loader.epoch(epoch):
            optimizer.zero_grad()
            criterion(network(batch.images).logits, batch.targets).backward()
            optimizer.step()
    named = ("dataset", "model", "loss", "predictor", "protocol")
    choices = {"optimizer": "adamw", "schedule": "poly", "trainer": "default"} | {g: cfg[g].name for g in named}
    payload = {"format": 1, "model": network.state_dict(), "config": stored.pack(cfg, choices), "epoch": 2}
    save(payload, folder / "best_model.pth")
    rows = [{"step": 2 * e, "kind": "train", "epoch": e, "loss": 1 / e} for e in (1, 2)]
    for e, dice in ((1, None), (2, 0.5)):
        rows += [{"step": 2 * e, "kind": f"val_{r}", "epoch": e, "mean_dice": dice, "test_loss": 0.7} for r in RULES]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def page(run: Path) -> Path:
    return write(run, images=2)


def write(run: Path, **options: object) -> Path:
    """Write the report with some options of the command line; return its page."""
    others = {"out": None, "images": 1, "predictor": [], "overrides": []}
    return report(argparse.Namespace(run=run, **others | options), HERE)


class Strict(HTMLParser):
    """Complains about what is not closed, and notes every reference."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []
        self.ids: set[str] = set()
        self.count: dict[str, int] = {}
        self.handlers: list[str] = []
        self.identified = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"<{tag}> has an attribute twice"
        self.handlers += [name for name in names if name.startswith("on")]
        self.count[tag] = self.count.get(tag, 0) + 1
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "action")]
        self.ids |= {value or "" for name, value in attrs if name == "id"}
        self.identified += "id" in names
        if tag not in VOID_TAGS:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes <{self.open[-1:]}>"
        self.open.pop()


def test_the_page_is_whole_and_needs_nothing_else(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    parser = Strict()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and len(parser.ids) == parser.identified
    outside = [ref for ref in parser.references if not ref.startswith(("data:image/", "#"))]
    assert outside == [] and "@import" not in text and "<script" not in text
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert {ref[1:] for ref in parser.references if ref.startswith("#")} <= parser.ids
    assert parser.count["svg"] >= 11 and parser.count["img"] % 6 == 0
    shown = re.sub(r'src="data:[^"]*"', "", text)
    assert not re.search(r"\bnan\b", shown, re.IGNORECASE)
    assert list((page.parent / "images").glob("*.png"))


def test_the_numbers_are_those_of_evaluate(page: Path, run: Path) -> None:
    network, cfg, _ = load(run / "best_model.pth", [])
    data = build.dataset(cfg, "test")
    loader, scoring = build.eval_loader(cfg, data, HERE), build.scoring(cfg, data.info)
    results = evaluate(network, loader, build.rules(RULES), build.loss(cfg), scoring, HERE)
    numbers = json.loads((page.parent / "report.json").read_text())
    assert numbers["images"] == results["T"].names
    for rule, result in results.items():
        for key in ("mean_dice", "mean_iou", "pooled_mean_dice", "pixel_accuracy"):
            assert numbers["scores"][rule][key] == pytest.approx(result.scores[key], abs=1e-12)
        low, high = numbers["scores"][rule]["dice_interval"]
        assert low <= 100 * result.scores["mean_dice"] <= high
    assert numbers["threshold"]["at 0.5"] == pytest.approx(numbers["scores"]["T"]["mean_dice"], abs=1e-12)
    gain = numbers["gains"]["rankdice - T"]
    assert gain["mean"] / 100 == pytest.approx(
        numbers["scores"]["rankdice"]["mean_dice"] - numbers["scores"]["T"]["mean_dice"], abs=1e-9
    )
    assert gain["better"] + gain["worse"] <= 1 and len(gain["differences"]) == gain["images"]


class Given(nn.Module):
    """A network that returns what it is given: images are logits, with a third channel of no meaning."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.scale * images)


def batch_of(probs: Tensor, targets: Tensor) -> SimpleNamespace:
    count = len(targets)
    return SimpleNamespace(
        images=probs.logit(),
        targets=targets,
        names=[f"i{k}" for k in range(count)],
        indices=list(range(count)),
    )


def scoring_of(probs: Tensor) -> Scoring:
    return Scoring(probs.shape[1], tuple(range(1, probs.shape[1])))


def findings_of(probs: Tensor, targets: Tensor) -> Findings:
    rules_of_kind = {"T": rules.threshold, "max": rules.argmax, "rankdice": rules.rankdice}
    compared = {"raw": (ToProbs("sigmoid"), rules_of_kind), "calibrated": (ToProbs("sigmoid"), rules_of_kind)}
    return measure(Given(), [batch_of(probs, targets)], compared, scoring_of(probs), HERE, 1.0)


def record_of(probs: Tensor, targets: Tensor) -> MaskRecord:
    batches = [batch_of(probs, targets)]
    return record_masks(Given(), batches, rules.rankdice, ToProbs("sigmoid"), scoring_of(probs), HERE)


def test_void_is_left_out_and_counted() -> None:
    first = torch.tensor([[0.9, 0.9, 0.9, 0.1]]).view(1, 1, 2, 2)
    findings = findings_of(torch.cat([1 - first, first], 1), torch.tensor([[[1, 1], [255, 0]]]))
    assert findings.mean("T", "raw", "masked") == pytest.approx(100)
    assert findings.mean("T", "raw", "counted") == pytest.approx(80)  # 2·2 / (3 + 2)
    text = pages.render("t", [], {"gain": pages.gain_section(findings, RULES)})
    assert {"<td>80.00</td>", "<td>100.00</td>"} <= set(re.findall(r"<td>[^<]*</td>", text))


def test_thirds_by_size_and_false_alarms() -> None:
    probs = torch.full((4, 2, 3, 4), 0.05)
    targets = torch.zeros(4, 3, 4, dtype=torch.int64)
    for image, size in enumerate((1, 4, 12)):
        targets[image].view(-1)[:size] = 1
        probs[image, 1].view(-1)[:size] = 0.95
    probs[1, 1].view(-1)[2:] = 0.05  # half of the middle one is missed
    probs[3, 1, 0, 0] = 0.95  # and one is seen where there is none
    findings = findings_of(probs, targets)
    rows = by_size(findings, ["T"])
    assert [count for _, count, _ in rows] == [1, 1, 1]
    assert [means["T"] for *_, means in rows] == pytest.approx([100, 200 / 3, 100])
    assert "8.33" in rows[0][0] and "100 %" in rows[2][0]
    assert false_alarms(findings, "T") == (1, 1)


def test_a_cut_off_is_the_smallest_probability_selected() -> None:
    probs = torch.tensor([[[[0.9, 0.4, 0.2]], [[0.1, 0.2, 0.3]]]])
    found = smallest_selected(probs, probs >= 0.35)
    assert found[0, 0] == pytest.approx(0.4) and found[0, 1].isnan()


def test_images_are_picked_by_gain_and_by_dice() -> None:
    torch.manual_seed(0)
    findings = findings_of(torch.rand(8, 2, 6, 6), torch.randint(0, 2, (8, 6, 6)))
    dice = findings.dice("rankdice")
    gain = dice - findings.dice("T")
    groups = pages.choose_images(findings, 2)
    best, worst = groups["Best images of RankDice"], groups["Worst images of RankDice"]
    assert dice[best[0]] == dice.max() and dice[worst[0]] == dice.min()
    assert gain[groups["Largest gains of RankDice over T"][0]] == gain.max()


def test_twice_the_logits_are_twice_the_temperature() -> None:
    torch.manual_seed(0)
    logits = 2 * torch.randn(3, 4, 20, 20)
    targets = torch.distributions.Categorical(logits=logits.movedim(1, -1)).sample()
    targets[:, :3] = 255
    batch = SimpleNamespace(images=logits, targets=targets, names=["a", "b", "c"], indices=[0, 1, 2])
    once, twice = (
        float(fit_calibration_on(fit_temperature, Given(scale), [batch], "softmax", HERE)) for scale in (1.0, 2.0)
    )
    assert once == pytest.approx(1, abs=0.1) and twice == pytest.approx(2 * once, rel=1e-3)


def test_focal_losses_are_corrected_as_well() -> None:
    ce, focal = (OmegaConf.create({"loss": {"name": n}, "calibrate": "none"}) for n in ("ce", "focal"))
    assert list(variants(ce)) == ["raw", "calibrated"]
    ways = variants(focal)
    assert ways["calibrated"]["calibrate"] == "temperature" and ways["focal-corrected"]["correct_focal"]
    logits = torch.randn(2, 3, 4, 4)
    assert torch.allclose(ToProbs("softmax", 2.0)(logits), (logits / 2).softmax(1))
    corrected = ToProbs("softmax", focal_gamma=2.0)(logits)
    assert corrected.amax() > ToProbs("softmax")(logits).amax()  # focal is under-confident


def test_charts_take_any_name_and_what_is_undefined() -> None:
    """Names are neither HTML nor mathematics: an odd number of $ is no error of matplotlib's parser."""
    names = ["<b>&", "$\\frac", "a\nb", "日本"]
    rows = [(name, {"T": math.nan, "rankdice": 50.0}) for name in names]
    undefined = [(name, math.nan, (math.nan, math.nan)) for name in names]
    for chart, *data in (
        (charts.class_bars, rows, "Dice"),
        (charts.intervals, undefined, "gain", True),
        (charts.sorted_differences, [0.0], 0.0, "points"),
        (charts.scatter, [], None, "x", "y"),
    ):
        text = charts.svg("<i>", chart, *data)
        assert "<b>" not in text and "<i>" not in text and "nan" not in text
        assert not set(re.findall(r"#[0-9a-f]{6}\b", text)) & set(charts.PALETTE.values())


HOSTILE = "<script>alert(1)</script>\"' onload=x"


def test_hostile_text_is_escaped_everywhere_on_the_page() -> None:
    gain = pages.compare_rules(findings_of(*random_images()), RULES)
    gain[HOSTILE] = gain["T"]
    picture = {"name": HOSTILE, "tiles": {HOSTILE: "data:image/png;base64,"}, "dice": {HOSTILE: 1.0}}
    rows = [
        {"step": 1, "kind": "train", "epoch": 1, "loss": 1.0},
        {"step": 1, "kind": f"val_{HOSTILE}", "epoch": 1, "mean_dice": 0.5, "test_loss": 0.5},
    ]
    findings = findings_of(*random_images())
    scores = pages.score_rules(findings, RULES)
    scores[HOSTILE] = scores["T"]
    confidence = assess(record_of(*random_images()), None)
    confidence["aurc"][HOSTILE] = confidence["aurc"]["oracle"]
    confidence["no_bound"] = HOSTILE
    by_gain = pages.gain_section(findings, RULES)
    by_gain["blocks"][HOSTILE] = [(HOSTILE, dict.fromkeys(RULES, 1.0))]
    by_gain["rules"] += [HOSTILE]
    by_gain["alarms"][HOSTILE] = 1
    for rows_of_block in by_gain["blocks"].values():
        for _, means in rows_of_block:
            means[HOSTILE] = 1.0
    sections = {
        "scores": pages.score_section(scores),
        "differences": pages.difference_section(gain),
        "classes": pages.class_section(findings, [HOSTILE, HOSTILE], RULES),
        "gain": by_gain,
        "calibration": pages.calibration_section(findings, [HOSTILE, HOSTILE]),
        "confidence": pages.confidence_section(confidence),
        "images": {HOSTILE: [picture]},
        "learning": pages.learning_section(rows),
        "provenance": {HOSTILE: HOSTILE},
    }
    parser = Strict()
    text = pages.render(HOSTILE, [HOSTILE], sections)
    assert text.count("&lt;script&gt;") == 28
    parser.feed(text)
    assert parser.open == [] and "script" not in parser.count and "<script" not in text
    assert not parser.handlers


def random_images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(8, 2, 6, 6, generator=generator)
    return probs, torch.randint(0, 2, (8, 6, 6), generator=generator)


def test_confidence_is_that_of_the_masks_and_the_bound_holds_on_the_images_it_was_fitted_on() -> None:
    probs, _ = random_images()
    record = record_of(*random_images())
    expected = confidence(probs, rules.rankdice(probs))[:, 1]
    signal = record.signals()[EXPECTED]
    assert signal == pytest.approx(expected.numpy(), abs=1e-6)
    found = assess(record, None)
    assert "margin" not in found and "validation images" in found["no_bound"]  # 8 are too few for 90 %
    found = assess(record, (signal.repeat(3), record.dice().repeat(3)))
    assert found["coverage"] >= 0.9 and found["margin_images"] == 24
    assert found["aurc"]["oracle"]["aurc"] == min(one["aurc"] for one in found["aurc"].values())
    text = pages.render("t", [], {"confidence": pages.confidence_section(found)})
    assert "AURC" in text and "24 validation images" in text
    assert text.count("<svg") == 2 and "lower bound" in text


def test_a_run_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match="absent"):
        write(tmp_path / "absent")


@pytest.mark.parametrize("override", ["temperature=2", "temperature=fit", "correct_focal=true"])
def test_what_would_be_ignored_is_rejected(run: Path, override: str) -> None:
    with pytest.raises(ValueError, match="pass temperature=1 correct_focal=false"):
        write(run, overrides=[override])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_the_page(page: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "page.png"
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2400", f"--screenshot={picture}",
    ]  # fmt: skip
    subprocess.run(
        [*command, page.as_uri()], capture_output=True, timeout=240, env={**os.environ, "HOME": str(tmp_path)}
    )
    with Image.open(picture) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
    assert image.size == (width, 2400) and colours is not None
    seen = {colour: number for number, colour in colours}
    # The bars of the three rules are there, each in its colour, on white.
    assert seen[(255, 255, 255)] > 0.5 * width * 2400
    for rule in ((0x77, 0x82, 0x8E), (0x2F, 0x77, 0xC2), (0xD9, 0x56, 0x1F)):
        assert seen.get(rule, 0) > 100, rule


def test_it_says_when_the_images_also_chose_the_checkpoint(run: Path, page: Path, tmp_path: Path) -> None:
    on_validation = write(run, out=tmp_path, overrides=["split=val"]).read_text()
    assert "best_model.pth was chosen" in on_validation and "was chosen" not in page.read_text()


def test_fitted_rules_have_the_scores_of_test_py(run: Path, tmp_path: Path) -> None:
    """T_fit, the pooled rules and auto are fitted for each kind of probabilities, on what test.py fits them on."""
    names = ["T_fit", "pooled_dice", "pooled_iou", "auto"]
    text = write(run, out=tmp_path, predictor=names).read_text()
    numbers = json.loads((tmp_path / "report.json").read_text())
    assert "T_fit: threshold" in text and "auto: " in text
    kept = json.loads((run / "best_model.fitted.json").read_text())["entries"]
    assert {one["settings"]["calibrate"] for one in kept if one["kind"] == "T_fit"} == {"none", "temperature"}
    for kind, override in (("raw", "calibrate=none"), ("calibrated", "calibrate=temperature")):
        network, cfg, _ = load(run / "best_model.pth", [override])
        data, fitter = build.dataset(cfg, "test"), Fitter(cfg, network, run / "best_model.pth", HERE)
        loader, scoring = build.eval_loader(cfg, data, HERE), build.scoring(cfg, data.info)
        fitted, to_probs = fitter.rules(names, data)[0], fitter.to_probs()
        results = evaluate(network, loader, fitted, build.loss(cfg), scoring, HERE, to_probs=to_probs)
        for name, result in results.items():
            shown = numbers["probabilities"][kind]["mean_dice"][name]
            assert shown == pytest.approx(result.scores["mean_dice"], abs=1e-12), (kind, name)
