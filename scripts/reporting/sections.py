"""The sections of the report, from findings to HTML."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import torch

from scripts.paired.inference import bca_of_mean, wilcoxon
from scripts.reporting import charts, page
from scripts.reporting.measure import Findings
from scripts.reporting.pictures import Strip
from scripts.reporting.svg import Range
from trainers.metrics import mean_over_classes

Interval = tuple[float, Range]


def interval(values: torch.Tensor) -> Interval:
    """Mean and 95 % bootstrap interval over images of fractions, in percent; undefined ones are left out."""
    defined = (100 * values[~values.isnan()]).tolist()
    if not defined:
        return math.nan, (math.nan, math.nan)
    return math.fsum(defined) / len(defined), bca_of_mean(defined, resamples=4000)


def scores(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The averages of each rule as `test.py` prints them, with intervals over images."""
    found = {}
    for rule in rules:
        counts = findings.counts[findings.key(rule)]
        iou = counts.iou(legacy_bce_iou=findings.scoring.legacy_bce_iou)
        found[rule] = {
            **findings.scoring.summary(counts),
            "dice_interval": interval(findings.dice(findings.key(rule)))[1],
            "iou_interval": interval(mean_over_classes(iou, findings.scoring.scored))[1],
        }
    return found


def gains(findings: Findings, rules: Sequence[str]) -> dict[str, dict[str, Any]]:
    """RankDice minus each other rule, image by image, in points."""
    best = findings.dice(findings.key("rankdice"))
    found = {}
    for rule in rules:
        if rule == "rankdice":
            continue
        difference = best - findings.dice(findings.key(rule))
        mean, ends = interval(difference)
        values = [round(v, 9) for v in (100 * difference[~difference.isnan()]).tolist()]
        test = wilcoxon(values)
        found[rule] = {
            "values": values,
            "mean": mean,
            "interval": ends,
            "better": sum(v > 0 for v in values),
            "worse": sum(v < 0 for v in values),
            "rank_biserial": test.rank_biserial,
            "p": test.p,
        }
    return found


def lead(table: Mapping[str, Any], differences: Mapping[str, Any], about: str) -> str:
    """What to know first: the scores and the gain."""
    cards = [
        page.card(
            f"{rule}, mDice in %",
            f"{100 * one['mean_dice']:.2f}",
            _range(one["dice_interval"]),
            charts.colour(rule),
        )
        for rule, one in table.items()
    ]
    for rule, one in differences.items():
        low, high = one["interval"]
        side = "soft" if low <= 0 <= high else "gain" if one["mean"] > 0 else "loss"
        cards.append(
            page.card(f"rankdice − {rule}, points", _points(one["mean"]), _range(one["interval"]), side)
        )
    return f'<p>{about}</p>\n<div class="cards">{"".join(cards)}</div>'


def _range(ends: Range) -> str:
    return f"95 %: {ends[0]:.2f} to {ends[1]:.2f}".replace("-", "−")


def _points(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")


def score_section(table: Mapping[str, Any]) -> str:
    """All averages, and the intervals as a picture."""
    rows = []
    for rule, one in table.items():
        dice, iou = (
            f"{100 * one[f'mean_{name}']:.2f} <small>[{ends[0]:.2f}, {ends[1]:.2f}]</small>"
            for name, ends in (("dice", one["dice_interval"]), ("iou", one["iou_interval"]))
        )
        pooled = (
            f"{100 * one[key]:.2f}" for key in ("pooled_mean_dice", "pooled_mean_iou", "pixel_accuracy")
        )
        rows.append([escape(rule), dice, iou, *pooled])
    head = ["rule", "mDice [95 %]", "mIoU [95 %]", "pooled Dice", "pooled IoU", "pixel accuracy"]
    dots = [(rule, 100 * one["mean_dice"], one["dice_interval"]) for rule, one in table.items()]
    note = (
        "Every rule sees the same probabilities. Scores are in percent; mDice and mIoU are means over "
        "images, pooled scores take the whole split as one image. The intervals (BCa bootstrap) cover "
        "the choice of images, not that of the training run; the rules move together, so judge by the "
        "differences below."
    )
    dots_figure = page.figure(charts.interval_dots(dots, "mDice, %"))
    return page.table(head, rows) + page.charts(dots_figure, f"<div>{page.paragraph(note)}</div>")


def difference_section(differences: Mapping[str, Any]) -> str:
    """The paired differences, sorted."""
    drawn = []
    for rule, one in differences.items():
        chart = charts.sorted_differences(one["values"], one["mean"], f"rankdice − {rule}, points of Dice")
        count = len(one["values"])
        p = "" if math.isnan(one["p"]) else f", Wilcoxon p {one['p']:.2g}"
        caption = (
            f"Against {rule}: better on {one['better']} of {count} images, worse on {one['worse']}, equal on "
            f"{count - one['better'] - one['worse']}. Mean {_points(one['mean'])} "
            f"({_range(one['interval'])}), rank-biserial {_points(one['rank_biserial'])}{p}."
        )
        drawn.append(page.figure(chart, caption))
    return page.charts(*drawn)


def class_section(findings: Findings, names: Sequence[str], rules: Sequence[str]) -> str:
    """Bars a class and rule, and the gain of RankDice over T in each class."""
    means = {rule: 100 * findings.counts[findings.key(rule)].dice().nanmean(0) for rule in rules}
    rows = [
        (names[c], {rule: float(mean[c]) for rule, mean in means.items()}) for c in findings.scoring.scored
    ]
    half = math.ceil(len(rows) / 2) if len(rows) > 8 else len(rows)
    parts = [page.figure(charts.class_bars(part, "Dice, %")) for part in (rows[:half], rows[half:]) if part]
    best, least = (findings.counts[findings.key(rule)].dice() for rule in ("rankdice", "T"))
    gained = [(names[c], *interval((best - least)[:, c])) for c in findings.scoring.scored]
    chart = charts.class_gains(gained, "rankdice − T, points of Dice")
    caption = "Paired over the images in which the class has a score under both, with 95 % intervals."
    return page.rule_legend(rules) + page.charts(*parts, page.figure(chart, caption))


def picture_section(groups: Mapping[str, Sequence[int]], strips: Mapping[int, Strip]) -> str:
    """Images at the ends of the distribution; the probability is the largest of the scored classes."""
    note = (
        "Numbers are the image's mean Dice in percent. Probability: black 0, red ⅓, yellow ⅔, white 1; the "
        "largest of all scored classes."
    )
    parts = [page.paragraph(note)]
    for title, picked in groups.items():
        parts.append(f"<h3>{escape(title)}</h3>")
        parts += [page.strip(strips[index]) for index in picked]
    return "\n".join(parts)


def learning_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """Loss and scores by epoch, from the run's journal."""
    train = [
        (row["epoch"], row["loss"]) for row in rows if row["kind"] == "train" and row["loss"] is not None
    ]
    val: dict[str, list[tuple[float, float]]] = {}
    losses: dict[int, float] = {}
    for row in rows:
        if row["kind"].startswith("val_"):
            if row["mean_dice"] is not None:
                val.setdefault(row["kind"][4:], []).append((row["epoch"], 100 * row["mean_dice"]))
            if row["test_loss"] is not None:
                losses[row["epoch"]] = row["test_loss"]
    if not train or not val:
        return page.paragraph("The run has no journal (metrics.jsonl).")
    colours = {"training": "soft", "validation": "rule-other"}
    loss = charts.lines(
        "loss by epoch",
        {"training": train, "validation": list(losses.items())},
        "epoch",
        "loss",
        colours,
        whole=True,
    )
    rules = {rule: charts.colour(rule) for rule in val}
    dice = charts.lines("validation mDice by epoch", val, "epoch", "validation mDice, %", rules, whole=True)
    return page.charts(
        page.figure(loss, legend=page.legend(colours)), page.figure(dice, legend=page.legend(rules))
    )


def fact_section(facts: Mapping[str, Any]) -> str:
    """Where the numbers came from."""
    rows = [
        [escape(name), f"<code>{escape(str(value))}</code>"]
        for name, value in facts.items()
        if value not in (None, "")
    ]
    return page.table([], rows, "facts")
