"""The report as one HTML page: the numbers and charts of each section. The text is in page.html.j2.

jinja2 escapes every text of a checkpoint, a data set or a journal; only the SVG charts are inserted as they are.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from configs.errors import one_line
from configs.fitting import Fitter
from rankseg import Predictor
from rankseg.calibration import Reliability
from scripts.analysis import charts
from scripts.analysis.measure import EXPECTED, THRESHOLDS, Findings, by_size, chosen_cutoffs, false_alarms
from scripts.analysis.scores import HARM, describe_differences, mean, mean_interval
from trainers import panels
from trainers.forward import ToProbs
from trainers.metrics import mean_over_classes

Section = dict[str, Any]
SQUARE = (4.4, 4.1)  # inches
_WIDTH = 320  # tiles of images are stored at most this wide


def render(title: str, lead: Sequence[str], sections: Mapping[str, Section]) -> str:
    """Return the page with these sections; it refers to no other file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: one_line(value) if type(value) is str else value,  # the charts are Markup
    )
    environment.filters |= {"points": format_signed, "ends": format_interval}
    template = environment.get_template("page.html.j2")
    return template.render(
        title=title, lead=lead, sections=sections, palette=charts.PALETTE, harm=HARM, expected=EXPECTED
    )


def format_signed(value: float) -> str:
    """Return a signed number with two decimals."""
    return f"{value:+.2f}".replace("-", "−")


def format_interval(interval: Sequence[float], scale: float = 1) -> str:
    """Return an interval as text."""
    return f"{scale * interval[0]:.2f} to {scale * interval[1]:.2f}".replace("-", "−")


def mean_and_interval(values: Tensor) -> tuple[float, tuple[float, float]]:
    """Return the mean of fractions over images, and its 95 % interval, in percent. NaN values are left out."""
    defined = (100 * values[~values.isnan()]).tolist()
    return mean(defined), mean_interval(defined)


def score_rules(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the averages of each rule as `test.py` prints them, with intervals over images."""
    found = {}
    for rule in rules:
        counts = findings.counts_of(rule)
        iou = counts.iou(legacy_bce_iou=findings.scoring.legacy_bce_iou)
        found[rule] = {
            **findings.scoring.summary(counts),
            "dice_interval": mean_and_interval(findings.dice(rule))[1],
            "iou_interval": mean_and_interval(mean_over_classes(iou, findings.scoring.scored))[1],
        }
    return found


def compare_rules(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the statistics of RankDice minus each other rule, image by image, in points."""
    rankdice, found = findings.dice("rankdice"), {}
    for rule in rules:
        difference = 100 * (rankdice - findings.dice(rule))
        if rule != "rankdice":
            found[rule] = describe_differences(difference[~difference.isnan()].tolist())
    return found


def score_section(scores: Mapping[str, Any]) -> Section:
    """Return the averages and a chart of their intervals."""
    dots = [(rule, 100 * one["mean_dice"], one["dice_interval"]) for rule, one in scores.items()]
    title, size = "mDice of each rule with its interval", (5.8, 0.6 + 0.35 * len(dots))
    return {"rules": scores, "chart": charts.svg(title, charts.intervals, dots, "mDice, %", size=size)}


def difference_section(gains: Mapping[str, Any]) -> Section:
    """Return the paired differences and a chart of each."""
    drawn = {}
    for rule, one in gains.items():
        title, ylabel = f"rankdice − {rule}, image by image in order", f"rankdice − {rule}, points of Dice"
        drawn[rule] = charts.svg(title, charts.sorted_differences, one["differences"], one["mean"], ylabel)
    return {"gains": gains, "charts": drawn}


def class_section(findings: Findings, names: Sequence[str], rules: Sequence[str]) -> Section:
    """Return charts of the Dice of each class and rule, and of the gain of RankDice over T in each class."""
    scored = findings.scoring.scored
    dice = {rule: findings.counts_of(rule).dice() for rule in rules}
    rows = [(names[c], {rule: 100 * float(one[:, c].nanmean()) for rule, one in dice.items()}) for c in scored]
    half = math.ceil(len(rows) / 2) if len(rows) > 8 else len(rows)
    drawn: list[Markup] = []
    for part in filter(None, (rows[:half], rows[half:])):
        title, size = f"Dice of each class and rule, part {len(drawn) + 1}", (5.8, 1 + 0.45 * len(part))
        drawn.append(charts.svg(title, charts.class_bars, part, "Dice, %", size=size))
    gained = [(names[c], *mean_and_interval((dice["rankdice"] - dice["T"])[:, c])) for c in scored]
    title, size = "gain of RankDice over T, class by class", (5.8, 1 + 0.25 * len(gained))
    xlabel = "rankdice − T, points of Dice"
    return {"charts": drawn, "gain": charts.svg(title, charts.intervals, gained, xlabel, signed=True, size=size)}


def gain_section(findings: Findings, rules: Sequence[str]) -> Section:
    """Return the scores with void masked or counted, by size of the object, and by kind of probabilities.

    Each block of the table has a heading and rows. A row has a label and the mean Dice of each rule in percent.
    """

    def means(probs: str = "raw", void: str = findings.scoring.void) -> dict[str, float]:
        return {rule: findings.mean(rule, probs, void) for rule in rules}

    pixels = findings.counts_of("T").pixels
    if all(findings.counts_of("T", "raw", v).pixels.equal(pixels) for v in ("masked", "counted")):
        void = [("this split has none", means())]
    else:
        void = [
            ("left out (the corrected protocol)", means(void="masked")),
            ("predictions on them count as false (the paper)", means(void="counted")),
        ]
    texts = {
        "raw": "from the network",
        "calibrated": f"temperature {findings.temperature:.3f}, fitted on validation images",
        "focal-corrected": "corrected for the focal loss (closed form)",
    }
    curve = [(at, findings.mean(f"at {at:.1f}")) for at in THRESHOLDS]
    cutoffs, rankdice = chosen_cutoffs(findings).tolist(), findings.mean("rankdice")
    title = "mean Dice against threshold, and cut-offs of RankDice"
    return {
        "rules": [rule for rule in rules if rule != "rankdice"],
        "blocks": {
            "Void pixels": void,
            "Size of the object: mean over pairs of image and class": [
                (f"{name}, {count} pairs", row) for name, count, row in by_size(findings, rules)
            ],
            "Probabilities": [(texts.get(kind, kind), means(kind)) for kind in findings.reliability],
        },
        "absent": false_alarms(findings, "rankdice")[1],
        "alarms": {rule: false_alarms(findings, rule)[0] for rule in rules},
        "best": max(curve, key=lambda point: point[1]),
        "rankdice": rankdice,
        "masks": len(cutoffs),
        "chart": charts.svg(title, charts.cutoffs, cutoffs, curve, {"rankdice": rankdice}, size=(7.0, 3.4)),
    }


def calibration_section(findings: Findings, names: Sequence[str]) -> Section:
    """Return reliability curves, calibration errors and volume ratios of each kind of probabilities."""
    scored = findings.scoring.scored
    curves = {kind: curve_points(one, scored) for kind, one in findings.reliability.items()}
    ratios = {kind: one.volume_ratio().tolist() for kind, one in findings.reliability.items()}
    return {
        "temperature": findings.temperature,
        "chart": charts.svg("reliability diagram", charts.reliability, curves, size=SQUARE),
        "errors": {
            kind: (100 * one.ece(), 100 * float(one.classwise_ece().nanmean()))
            for kind, one in findings.reliability.items()
        },
        "volumes": [(names[c], [ratio[c] for ratio in ratios.values()]) for c in scored],
    }


def curve_points(reliability: Reliability, scored: Sequence[int]) -> list[tuple[float, float, float]]:
    """Return (mean probability, frequency, share) of each filled bin, over all scored classes."""
    confidence, frequency, pixels = (part[list(scored)] for part in reliability.curve())
    number = pixels.sum(0)
    filled = number > 0
    predicted, observed = ((pixels * part.nan_to_num()).sum(0) / number for part in (confidence, frequency))
    rows = torch.stack((predicted, observed, number / number.sum()), 1)[filled]
    return [(predicted, observed, share) for predicted, observed, share in rows.tolist()]


def confidence_section(found: Mapping[str, Any]) -> Section:
    """Return the result of `measure.assess`, with the risk-coverage chart and the chart of the lower bound."""
    if not found["images"]:
        return dict(found)
    title, labels = "achieved against expected Dice", ("expected Dice (confidence)", "achieved Dice")
    return {
        **found,
        "risk": charts.svg("risk against coverage", charts.risk_coverage, found["curves"]),
        "scatter": charts.svg(title, charts.scatter, found["points"], found.get("margin"), *labels, size=SQUARE),
    }


def learning_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Return charts of loss and scores by epoch, from the run's journal."""
    train = [(row["epoch"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None]
    scores: dict[str, list[tuple[float, float]]] = {}
    losses: dict[int, float] = {}
    for row in rows:
        if row["kind"].startswith("val_"):
            if row["mean_dice"] is not None:
                scores.setdefault(row["kind"][4:], []).append((row["epoch"], 100 * row["mean_dice"]))
            if row["test_loss"] is not None:
                losses[row["epoch"]] = row["test_loss"]
    if not train or not scores:
        return {"charts": []}
    drawn = [
        ("loss by epoch", {"training": train, "validation": list(losses.items())}, "loss"),
        ("validation mDice by epoch", scores, "validation mDice, %"),
    ]
    colours = {"training": "soft", "validation": "other"}
    return {
        "charts": [
            charts.svg(title, charts.lines, series, "epoch", ylabel, colours, integers=True)
            for title, series, ylabel in drawn
        ]
    }


def choose_images(findings: Findings, number: int = 3) -> dict[str, list[int]]:
    """Choose images by their scores: largest gains and losses against T, lowest and highest Dice."""
    dice = findings.dice("rankdice")
    gain = dice - findings.dice("T")
    order = [i for i in gain.argsort(stable=True).tolist() if gain[i] == gain[i]]
    by_dice = [i for i in dice.argsort(stable=True).tolist() if dice[i] == dice[i]]
    groups = {
        "Largest gains of RankDice over T": [i for i in order[::-1][:number] if gain[i] > 0],
        "Largest losses of RankDice against T": [i for i in order[:number] if gain[i] < 0],
        "Worst images of RankDice": by_dice[:number],
        "Best images of RankDice": by_dice[::-1][:number],
    }
    return {title: picked for title, picked in groups.items() if picked}


def draw_strips(
    fitter: Fitter,
    data: Any,
    rules: Mapping[str, Predictor],
    findings: Findings,
    indices: Iterable[int],
    folder: Path,
) -> dict[int, dict[str, Any]]:
    """Draw these images with the network of a fitter, and write each to ``folder`` as a PNG file.

    Returns:
        index -> "name", "tiles" (data URIs by title), and "dice" (of each rule, in percent).
    """
    positions = {name: index for index, name in enumerate(data.names)}
    picked = list(dict.fromkeys(indices))
    places = [positions[findings.names[index]] for index in picked]
    transform = cast(Any, fitter.batches(data)).transform
    to_probs, precision = ToProbs(fitter.link), fitter.precision
    seen = panels.panels(fitter.network, data, transform, rules, to_probs, fitter.world, places, precision)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    for index, (name, panel) in zip(picked, seen, strict=True):
        titles = ("image", "truth", "probability", *rules)
        uris = {title: data_uri(tile) for title, tile in zip(titles, panels.tiles(panel).values(), strict=True)}
        dice = {rule: 100 * float(findings.dice(rule)[index]) for rule in rules}
        drawn[index] = {"name": name, "tiles": uris, "dice": dice}
        stem = re.sub(r"[^\w.-]", "_", Path(name).stem)[:80]
        width = max(1, 160 // panel.image.shape[2]) * panel.image.shape[2]
        picture = panels.sheet(panel, columns=len(uris), width=width, font_size=11)
        to_pil_image(picture).save(folder / f"{len(drawn):02}-{stem}.png")
    return drawn


def data_uri(tile: Tensor) -> str:
    """Return a tile (3, H, W) uint8 as a data URI, at most as wide as it is shown."""
    picture = to_pil_image(tile)
    picture.thumbnail((_WIDTH, picture.height))
    small = picture.width * picture.height <= 1 << 14
    buffer, kind = io.BytesIO(), "png" if small else "jpeg"
    picture.save(buffer, kind, **({"optimize": True} if small else {"quality": 88}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
