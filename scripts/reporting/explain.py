"""The sections on what explains the gain: void, object size, calibration, thresholds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import torch

from rankseg.calibration import Reliability
from scripts.reporting import charts, page
from scripts.reporting.measure import (
    CUTOFF_BINS,
    THRESHOLDS,
    Findings,
    Key,
    by_size,
    chosen_cutoffs,
    false_alarms,
)


def reliability_section(findings: Findings) -> str:
    """How far probabilities can be believed, before and after fitting a temperature."""
    colours = dict(zip(findings.reliability, ("rule-rankdice", "rule-max", "rule-other"), strict=False))
    curves = {name: points(one, findings.scoring.scored) for name, one in findings.reliability.items()}
    rows = [
        [escape(name), f"{100 * one.ece():.2f}", f"{100 * float(one.classwise_ece().nanmean()):.2f}"]
        for name, one in findings.reliability.items()
    ]
    note = (
        "RankDice is the best rule for the expected Dice if the probabilities are right: calibration is "
        f"what it stands on. The temperature, {findings.temperature:.3f}, was fitted on the validation "
        "split; above 1 the network is surer than it should be. Bars: the share of decisions in each bin, "
        "on a logarithmic scale."
    )
    chart = page.figure(charts.reliability(curves, colours), legend=page.legend(colours))
    table = page.table(["probabilities", "ECE, %", "mean over classes, %"], rows)
    return page.charts(chart, f"<div>{table}{page.paragraph(note)}</div>")


def points(reliability: Reliability, scored: Sequence[int]) -> list[tuple[float, float, float]]:
    """(mean probability, frequency, share) of each filled bin, over all scored classes."""
    confidence, frequency, pixels = (part[list(scored)] for part in reliability.curve())
    number = pixels.sum(0)
    filled = number > 0
    predicted, observed = ((pixels * part.nan_to_num()).sum(0) / number for part in (confidence, frequency))
    rows = torch.stack((predicted, observed, number / number.sum()), 1)[filled]
    return [(predicted, observed, share) for predicted, observed, share in rows.tolist()]


def explain_section(findings: Findings, rules: Sequence[str]) -> str:
    """The same run scored in other ways: what the gain depends on."""
    rows: list[list[str]] = [["Void pixels"]]
    void = {v: {rule: findings.mean(Key(rule, "raw", v)) for rule in rules} for v in ("masked", "counted")}
    if all(
        findings.counts[Key("T", "raw", v)].pixels.equal(findings.counts[findings.key("T")].pixels)
        for v in void
    ):
        rows.append(["there are none in this split", *_means(void[findings.scoring.void])])
    else:
        rows.append(["left out (the corrected protocol)", *_means(void["masked"])])
        rows.append(["predictions there count as false (the paper)", *_means(void["counted"])])
    rows.append(["Size of the object: mean over pairs of image and class"])
    rows += [[f"{name}, {count} pairs", *_means(means)] for name, count, means in by_size(findings, rules)]
    rows.append(["Probabilities"])
    texts = {
        "raw": "as the network gives them",
        "calibrated": f"temperature {findings.temperature:.3f}, fitted on validation",
        "focal-corrected": "corrected for the focal loss (closed form)",
    }
    for kind in findings.reliability:
        rows.append([texts[kind], *_means({rule: findings.mean(findings.key(rule, kind)) for rule in rules})])
    table = page.table(
        ["mDice, %", *rules, *(f"rankdice − {rule}" for rule in rules if rule != "rankdice")], rows
    )
    alarms = [f"{escape(rule)} {false_alarms(findings, rule)[0]}" for rule in rules]
    absent = false_alarms(findings, "rankdice")[1]
    more = ""
    if absent:
        more = page.paragraph(
            f"Classes predicted although absent, of {absent} absent pairs of image and class: {', '.join(alarms)}. "
            "Each is a Dice of 0 where an empty mask would not have counted."
        )
    return table + more + threshold_charts(findings)


def _means(means: Mapping[str, float]) -> list[str]:
    cells = [f"{value:.2f}" for value in means.values()]
    return cells + [page.signed(means["rankdice"] - v) for rule, v in means.items() if rule != "rankdice"]


def threshold_charts(findings: Findings) -> str:
    """Dice against a fixed threshold, and where RankDice cuts."""
    curve = [(at, findings.mean(findings.key(f"at {at:.1f}"))) for at in THRESHOLDS]
    best = max(curve, key=lambda point: point[1])
    ours = findings.mean(findings.key("rankdice"))
    fixed = charts.lines(
        "mean Dice against threshold",
        {"one threshold for all": curve},
        "threshold",
        "mDice, %",
        {"one threshold for all": "rule-t"},
        level=("rankdice", ours),
    )
    caption = (
        f"The best of these thresholds, {best[0]:.1f}, chosen on this very split, reaches {best[1]:.2f}; "
        "RankDice, which chooses a cut-off for each image and class from the probabilities alone, "
        f"{ours:.2f}."
    )
    cut = chosen_cutoffs(findings)
    end = 0.6 if not cut.numel() or cut.max() <= 0.6 else 1.0
    histogram = torch.histc(cut.float(), CUTOFF_BINS, 0, end)
    shares = (100 * histogram / max(cut.numel(), 1)).tolist()
    edges = [end * k / CUTOFF_BINS for k in range(CUTOFF_BINS + 1)]
    where = charts.histogram(shares, edges, "cut-off: smallest probability selected by RankDice")
    below = f"{cut.numel()} masks. The best cut-off lies near half the expected Dice: the vaguer an object, the lower."
    return page.charts(page.figure(fixed, caption), page.figure(where, below))
