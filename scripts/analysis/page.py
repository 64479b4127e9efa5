"""The report as one HTML page: its sections as plain data, rendered by jinja2 with autoescape.

Every text of a checkpoint, a data set or a journal is escaped by the template; only the SVG charts are inserted as
they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from configs.errors import UserError
from rankseg.calibration import Reliability
from scripts.analysis import charts
from scripts.analysis.measure import (
    CONFIDENCES,
    EXPECTED,
    THRESHOLDS,
    Findings,
    Key,
    by_size,
    chosen_cutoffs,
    false_alarms,
)
from scripts.analysis.pictures import Strip
from scripts.analysis.statistics import HARM, describe_differences, mean_interval
from trainers.metrics import mean_over_classes
from trainers.selective import compare_aurc, conformal_margin, resplit_coverages, risk_coverage

ALPHA = 0.1  # of the conformal bound
Block = dict[str, Any]
Section = dict[str, Any]


class Signed(str):
    """A difference in points; the page colours it by its sign."""

    sign: str

    def __new__(cls, value: float) -> Signed:
        text = super().__new__(cls, points(value))
        text.sign = "" if not abs(value) >= 0.005 else "gain" if value > 0 else "loss"
        return text


def render(
    title: str, lead: Sequence[str], cards: Sequence[Mapping[str, str]], sections: Sequence[Section]
) -> str:
    """Return the page; it refers to no other file."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.get_template("page.html.j2")
    return template.render(title=title, lead=lead, cards=cards, sections=sections, palette=charts.PALETTE)


def section(anchor: str, heading: str, *blocks: Block) -> Section:
    """Return a section of the page."""
    return {"anchor": anchor, "heading": heading, "blocks": blocks}


def text(words: str) -> Block:
    """Return a paragraph."""
    return {"kind": "text", "text": words}


def table(head: Sequence[str], rows: Sequence[Sequence[str]], style: str = "") -> Block:
    """Return a table; a row of one cell is a heading within it."""
    return {"kind": "table", "head": head, "rows": rows, "style": style}


def figures(*drawn: Any) -> Block:
    """Return charts next to each other; each is an SVG element or a pair of an SVG element and its caption."""
    return {"kind": "charts", "charts": [one if isinstance(one, tuple) else (one, "") for one in drawn]}


def points(value: float) -> str:
    """Return a signed number with two decimals."""
    return f"{value:+.2f}".replace("-", "−")


def ends(interval: Sequence[float]) -> str:
    """Return an interval as text."""
    return f"{interval[0]:.2f} to {interval[1]:.2f}".replace("-", "−")


def percent_interval(values: Tensor) -> tuple[float, tuple[float, float]]:
    """Return mean and 95 % interval over images of fractions, in percent; undefined ones are left out."""
    defined = (100 * values[~values.isnan()]).tolist()
    if not defined:
        return math.nan, (math.nan, math.nan)
    return math.fsum(defined) / len(defined), mean_interval(defined)


# --- numbers


def score_rules(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the averages of each rule as `test.py` prints them, with intervals over images."""
    found = {}
    for rule in rules:
        counts = findings.counts[findings.key(rule)]
        iou = counts.iou(legacy_bce_iou=findings.scoring.legacy_bce_iou)
        found[rule] = {
            **findings.scoring.summary(counts),
            "dice_interval": percent_interval(findings.dice(findings.key(rule)))[1],
            "iou_interval": percent_interval(mean_over_classes(iou, findings.scoring.scored))[1],
        }
    return found


def compare_rules(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the statistics of RankDice minus each other rule, image by image, in points."""
    best, found = findings.dice(findings.key("rankdice")), {}
    for rule in rules:
        difference = 100 * (best - findings.dice(findings.key(rule)))
        if rule != "rankdice":
            found[rule] = describe_differences(difference[~difference.isnan()].tolist())
    return found


def assess_confidence(findings: Findings, held_out: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    """Return what the confidences are worth on the images with a score: AURC, and the conformal bound.

    ``held_out`` holds expected and achieved Dice of the validation images; None if the scored images are these.
    """
    dice = findings.dice(findings.key("rankdice"))
    known = ~dice.isnan()
    dice, values = dice[known], {name: findings.confidences[name][known] for name in CONFIDENCES}
    found: dict[str, Any] = {"images": len(dice), "alpha": ALPHA, "bound": None}
    if not len(dice):
        return found
    estimates = compare_aurc({**values, "oracle": dice}, 1 - dice, EXPECTED)
    found["aurc"] = {name: one._asdict() for name, one in estimates.items()}
    found["risk_coverage"] = {
        name: torch.stack(risk_coverage(one, 1 - dice), 1).tolist()
        for name, one in {**values, "oracle": dice}.items()
    }
    expected = values[EXPECTED]
    found["points"] = torch.stack((expected, dice), 1).tolist()
    found["mean_expected"], found["mean_achieved"] = float(expected.mean()), float(dice.mean())
    try:
        if held_out is None:
            half = len(dice) // 2
            margin = conformal_margin(expected, dice, ALPHA)
            resplits = resplit_coverages(expected, dice, half, ALPHA)
            found["bound"] = {
                "margin": margin,
                "coverage": float(resplits.mean()),
                "resplits": len(resplits),
            }
        else:
            margin = conformal_margin(*held_out, ALPHA)
            coverage = float((dice >= expected - margin).double().mean())
            found["bound"] = {"margin": margin, "coverage": coverage, "validation_images": len(held_out[0])}
    except UserError as error:
        found["no_bound"] = str(error)
    return found


# --- sections


def lead_cards(scores: Mapping[str, Any], gains: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the numbers to see first: scores and gains with their intervals."""
    cards = [
        {
            "name": f"{rule}, mDice in %",
            "value": f"{100 * one['mean_dice']:.2f}",
            "range": f"95 %: {ends(one['dice_interval'])}",
            "colour": rule,
        }
        for rule, one in scores.items()
    ]
    for rule, one in gains.items():
        low, high = one["interval"]
        side = "soft" if low <= 0 <= high else "gain" if one["mean"] > 0 else "loss"
        name, value = f"rankdice − {rule}, points", points(one["mean"])
        cards.append(
            {"name": name, "value": value, "range": f"95 %: {ends(one['interval'])}", "colour": side}
        )
    return cards


def score_section(scores: Mapping[str, Any]) -> Section:
    """Present all averages, with the intervals as a chart."""
    rows = []
    for rule, one in scores.items():
        cells = [
            f"{100 * one[f'mean_{name}']:.2f} [{ends(one[f'{name}_interval'])}]" for name in ("dice", "iou")
        ]
        cells += [
            f"{100 * one[key]:.2f}" for key in ("pooled_mean_dice", "pooled_mean_iou", "pixel_accuracy")
        ]
        rows.append([rule, *cells])
    head = ["rule", "mDice [95 %]", "mIoU [95 %]", "pooled Dice", "pooled IoU", "pixel accuracy"]
    dots = [(rule, 100 * one["mean_dice"], one["dice_interval"]) for rule, one in scores.items()]
    chart = charts.svg(
        "mDice of each rule with its interval",
        charts.intervals(dots, "mDice, %"),
        (5.8, 0.6 + 0.35 * len(dots)),
    )
    note = (
        "All rules see the same probabilities. Scores are in percent. mDice and mIoU are means over images; pooled "
        "scores count the whole split as one image. The intervals (BCa bootstrap) cover the choice of images, not the "
        "training run. The scores of the rules rise and fall together, so compare rules by their differences below."
    )
    return section("scores", "Scores", table(head, rows), figures((chart, note)))


def difference_section(gains: Mapping[str, Any]) -> Section:
    """Present the paired differences, sorted, and how often RankDice harms."""
    drawn, rows = [], []
    for rule, one in gains.items():
        part = charts.sorted_differences(
            one["differences"], one["mean"], f"rankdice − {rule}, points of Dice"
        )
        p = "" if math.isnan(one["wilcoxon_p"]) else f", Wilcoxon p {one['wilcoxon_p']:.2g}"
        caption = (
            f"Against {rule}: better on {100 * one['better']:.1f} % of {one['images']} images, worse on "
            f"{100 * one['worse']:.1f} %. Mean {points(one['mean'])} (95 %: {ends(one['interval'])}), "
            f"rank-biserial {points(one['rank_biserial'])}{p}."
        )
        drawn.append((charts.svg(f"rankdice − {rule}, image by image in order", part), caption))
        shares = [f"{100 * one['harm'][str(k)]:.1f}" for k in HARM]
        extremes = [points(0.0 - one["worst_loss"]), points(one["best_gain"])]
        rows.append([f"rankdice − {rule}", *shares, *extremes])
    head = ["", *(f"images that lose > {k}, %" for k in HARM), "worst loss", "best gain"]
    return section(
        "differences",
        "RankDice against the others, image by image",
        figures(*drawn),
        table(head, rows),
        text("All numbers are points of Dice, the mean over the classes of an image."),
    )


def class_section(findings: Findings, names: Sequence[str], rules: Sequence[str]) -> Section:
    """Present the Dice of each class and rule, and the gain of RankDice over T in each class."""
    scored = findings.scoring.scored
    means = {rule: 100 * findings.counts[findings.key(rule)].dice().nanmean(0) for rule in rules}
    rows = [(names[c], {rule: float(mean[c]) for rule, mean in means.items()}) for c in scored]
    half = math.ceil(len(rows) / 2) if len(rows) > 8 else len(rows)
    drawn = [
        charts.svg(
            f"Dice of each class and rule, part {k}", charts.class_bars(part, "Dice, %"), _tall(part, 0.45)
        )
        for k, part in enumerate((rows[:half], rows[half:]), 1)
        if part
    ]
    best, least = (findings.counts[findings.key(rule)].dice() for rule in ("rankdice", "T"))
    gained = [(names[c], *percent_interval((best - least)[:, c])) for c in scored]
    part = charts.intervals(gained, "rankdice − T, points of Dice", signed=True)
    caption = "Over the images in which both rules have a score for the class, with 95 % intervals."
    chart = charts.svg("gain of RankDice over T, class by class", part, _tall(gained, 0.25))
    return section("classes", "Classes", figures(*drawn, (chart, caption)))


def _tall(rows: Sequence[Any], inches: float) -> tuple[float, float]:
    """Return the size of a chart with one row for each class."""
    return 5.8, 1 + inches * len(rows)


def gain_section(findings: Findings, rules: Sequence[str]) -> Section:
    """Present the same run scored in other ways: what the gain depends on."""

    def means(row: Mapping[str, float]) -> list[str]:
        cells = [f"{value:.2f}" for value in row.values()]
        return cells + [Signed(row["rankdice"] - value) for rule, value in row.items() if rule != "rankdice"]

    rows: list[list[str]] = [["Void pixels"]]
    void = {v: {rule: findings.mean(Key(rule, "raw", v)) for rule in rules} for v in ("masked", "counted")}
    pixels = findings.counts[findings.key("T")].pixels
    if all(findings.counts[Key("T", "raw", v)].pixels.equal(pixels) for v in void):
        rows.append(["this split has none", *means(void[findings.scoring.void])])
    else:
        rows.append(["left out (the corrected protocol)", *means(void["masked"])])
        rows.append(["predictions on them count as false (the paper)", *means(void["counted"])])
    rows.append(["Size of the object: mean over pairs of image and class"])
    rows += [[f"{name}, {count} pairs", *means(row)] for name, count, row in by_size(findings, rules)]
    rows.append(["Probabilities"])
    texts = {
        "raw": "from the network",
        "calibrated": f"temperature {findings.temperature:.3f}, fitted on validation images",
        "focal-corrected": "corrected for the focal loss (closed form)",
    }
    for kind in findings.reliability:
        row = {rule: findings.mean(findings.key(rule, kind)) for rule in rules}
        rows.append([texts.get(kind, kind), *means(row)])
    head = ["mDice, %", *rules, *(f"rankdice − {rule}" for rule in rules if rule != "rankdice")]
    blocks = [table(head, rows)]
    absent = false_alarms(findings, "rankdice")[1]
    if absent:
        alarms = ", ".join(f"{rule} {false_alarms(findings, rule)[0]}" for rule in rules)
        blocks.append(
            text(
                f"Predicted classes that are absent, of {absent} absent pairs of image and class: {alarms}. Each has a "
                "Dice of 0; an empty mask would have no score."
            )
        )
    return section("gain", "What explains the gain", *blocks, _threshold_charts(findings))


def _threshold_charts(findings: Findings) -> Block:
    """Present Dice against a fixed threshold, and the cut-offs of RankDice."""
    curve = [(at, findings.mean(findings.key(f"at {at:.1f}"))) for at in THRESHOLDS]
    best = max(curve, key=lambda point: point[1])
    ours = findings.mean(findings.key("rankdice"))
    cut = chosen_cutoffs(findings).tolist()
    chart = charts.svg(
        "mean Dice against threshold, and cut-offs of RankDice",
        charts.cutoffs(cut, curve, {"rankdice": ours}),
        (7.0, 3.4),
    )
    caption = (
        f"The best threshold, {best[0]:.1f}, chosen on this split, reaches {best[1]:.2f}. RankDice reaches {ours:.2f}: "
        "it chooses a cut-off for each image and class from the probabilities alone. The best cut-off is about half "
        f"the expected Dice, so it is lower for vaguer objects. Bars: the cut-offs of {len(cut)} masks."
    )
    return figures((chart, caption))


def calibration_section(findings: Findings, names: Sequence[str]) -> Section:
    """Present how far the probabilities can be trusted, before and after calibration."""
    curves = {name: curve_points(one, findings.scoring.scored) for name, one in findings.reliability.items()}
    rows = [
        [name, f"{100 * one.ece():.2f}", f"{100 * float(one.classwise_ece().nanmean()):.2f}"]
        for name, one in findings.reliability.items()
    ]
    note = (
        "RankDice maximises the expected Dice under the given probabilities, so it needs calibrated ones. The "
        f"temperature, {findings.temperature:.3f}, was fitted on the validation split; above 1 the network is "
        "over-confident. Bars: the share of decisions in each bin, on a log scale."
    )
    chart = charts.svg("reliability diagram", charts.reliability(curves), (4.4, 4.1))
    ratios = {name: one.volume_ratio().tolist() for name, one in findings.reliability.items()}
    volumes = [
        [names[c], *("no pixel" if math.isnan(ratio[c]) else f"{ratio[c]:.2f}" for ratio in ratios.values())]
        for c in findings.scoring.scored
    ]
    return section(
        "calibration",
        "Calibration",
        figures((chart, note)),
        table(["probabilities", "ECE, %", "mean over classes, %"], rows),
        table(["Σp / Σy of the class", *ratios], volumes),
        text(
            "Σp / Σy is the predicted over the true volume of a class, 1 if its probabilities are right on average. "
            "ECE can be small while a rare class is far from 1."
        ),
    )


def curve_points(reliability: Reliability, scored: Sequence[int]) -> list[tuple[float, float, float]]:
    """Return (mean probability, frequency, share) of each filled bin, over all scored classes."""
    confidence, frequency, pixels = (part[list(scored)] for part in reliability.curve())
    number = pixels.sum(0)
    filled = number > 0
    predicted, observed = ((pixels * part.nan_to_num()).sum(0) / number for part in (confidence, frequency))
    rows = torch.stack((predicted, observed, number / number.sum()), 1)[filled]
    return [(predicted, observed, share) for predicted, observed, share in rows.tolist()]


def confidence_section(found: Mapping[str, Any]) -> Section:
    """Present the order that each confidence gives to the images, and the bound on their Dice."""
    if not found["images"]:
        return section("confidence", "Confidence", text("No image has a score."))
    rows = []
    for name, one in found["aurc"].items():
        gain = (
            ""
            if name == EXPECTED
            else f"{points(100 * one['gain'])} [{ends([100 * v for v in one['gain_interval']])}]"
        )
        rows.append([name, f"{100 * one['aurc']:.2f} [{ends([100 * v for v in one['interval']])}]", gain])
    shades = dict(zip((*CONFIDENCES, "oracle"), ("rankdice", "max", "T", "other", "ink"), strict=True))
    curves = {name: [(x, 100 * y) for x, y in line] for name, line in found["risk_coverage"].items()}
    risk = charts.lines(
        curves, "coverage: share of images kept", "mean risk, 100 − Dice, %", shades, marker=""
    )
    bound = found["bound"]
    part = charts.scatter(
        found["points"], bound and bound["margin"], "expected Dice (confidence)", "achieved Dice"
    )
    drawn = (
        (
            charts.svg("risk against coverage", risk),
            "Mean risk of the most confident images. A good confidence keeps the curve low. The oracle orders images "
            "by their true Dice.",
        ),
        (charts.svg("achieved against expected Dice", part, (4.4, 4.1)), "One point for each image."),
    )
    return section(
        "confidence",
        "Confidence",
        text(
            "The confidence of a mask is its expected Dice under the network's probabilities. That of an image is "
            f"the mean over its predicted classes. The mean expected Dice is {100 * found['mean_expected']:.2f}, "
            f"the mean achieved Dice {100 * found['mean_achieved']:.2f}, both of RankDice on raw probabilities."
        ),
        figures(*drawn),
        table(["order of images by", "AURC, % [95 %]", "expected Dice − this [95 %]"], rows),
        text(_describe_bound(found)),
    )


def _describe_bound(found: Mapping[str, Any]) -> str:
    """Return the conformal bound in words, or why there is none."""
    bound, level = found["bound"], f"{100 * (1 - found['alpha']):g} %"
    if bound is None:
        return f"There is no lower bound of the Dice: {found['no_bound']}"
    words = f"Lower bound: with probability at least {level}, the Dice of a new image is at least its confidence minus "
    words += f"{bound['margin']:.3f} (split conformal prediction; it holds if the images are exchangeable). "
    if "resplits" in bound:
        return words + (
            "The margin comes from the scored images themselves, which are the validation images. Over "
            f"{bound['resplits']} random splits of them in halves, one half is covered by the bound of the other in "
            f"{100 * bound['coverage']:.1f} % of the cases."
        )
    return words + (
        f"The margin comes from {bound['validation_images']} validation images. On this split the bound holds for "
        f"{100 * bound['coverage']:.1f} % of the images."
    )


def picture_section(groups: Mapping[str, Sequence[int]], strips: Mapping[int, Strip]) -> Section:
    """Present images at the ends of the distribution."""
    blocks = [
        {"kind": "strips", "heading": title, "strips": [strips[i] for i in picked]}
        for title, picked in groups.items()
    ]
    note = text(
        "Numbers are the mean Dice of the image in percent. The probability is the largest of all scored classes: "
        "black 0, red ⅓, yellow ⅔, white 1."
    )
    return section("images", "Images", note, *blocks)


def learning_section(rows: Sequence[Mapping[str, Any]]) -> Section:
    """Present loss and scores by epoch, from the run's journal."""
    train = [
        (row["epoch"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None
    ]
    scores: dict[str, list[tuple[float, float]]] = {}
    losses: dict[int, float] = {}
    for row in rows:
        if row["kind"].startswith("val_"):
            if row["mean_dice"] is not None:
                scores.setdefault(row["kind"][4:], []).append((row["epoch"], 100 * row["mean_dice"]))
            if row["test_loss"] is not None:
                losses[row["epoch"]] = row["test_loss"]
    if not train or not scores:
        return section("learning", "Learning", text("The run has no journal (metrics.jsonl)."))
    series = {"training": train, "validation": list(losses.items())}
    shades = {"training": "soft", "validation": "other"}
    loss = charts.lines(series, "epoch", "loss", shades, integers=True)
    dice = charts.lines(
        scores, "epoch", "validation mDice, %", {rule: rule for rule in scores}, integers=True
    )
    return section(
        "learning",
        "Learning",
        figures(charts.svg("loss by epoch", loss), charts.svg("validation mDice by epoch", dice)),
    )


def fact_section(facts: Mapping[str, Any]) -> Section:
    """Present where the numbers came from."""
    rows = [[name, str(value)] for name, value in facts.items() if value not in (None, "")]
    return section("provenance", "Provenance", table([], rows, "facts"))
