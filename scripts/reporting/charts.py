"""The charts of the report, from plain numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from scripts.reporting.svg import Plot, Range, padded, ticks

COLOURS = {"T": "rule-t", "max": "rule-max", "rankdice": "rule-rankdice"}
_DASHES = {"T": "6 3", "max": "2 3"}


def colour(rule: str) -> str:
    """The CSS variable of a rule's colour; rules beyond the three share one."""
    return COLOURS.get(rule, "rule-other")


def dash(rule: str) -> str:
    """How a rule's line is dashed, so that colour is not all that tells lines apart."""
    return _DASHES.get(rule, "")


def interval_dots(rows: Sequence[tuple[str, float, Range]], xlabel: str) -> str:
    """A value with its interval for each rule, on one horizontal axis."""
    ends = [end for _, _, interval in rows for end in interval]
    plot = Plot(
        f"{xlabel} of each rule with its interval",
        padded([*ends, *(v for _, v, _ in rows)]),
        (len(rows) - 0.4, -0.6),
        (560, 58 + 34 * len(rows)),
        (8, 16, 44, 96),
    )
    plot.axes(xlabel, yticks=[])
    for row, (rule, value, (low, high)) in enumerate(rows):
        text = f"{rule}: {value:.2f}, 95 % interval {low:.2f} to {high:.2f}"
        plot.line([(low, row), (high, row)], colour(rule), tip=text)
        plot.marks([(value, row)], colour(rule), [text])
        plot.text(plot.left - 10, plot.py(row) + 4, rule, "end", "name")
    return plot.svg()


def class_gains(rows: Sequence[tuple[str, float, Range]], xlabel: str) -> str:
    """The mean difference of each class with its interval, zero marked."""
    known = [(value, *ends) for _, value, ends in rows if math.isfinite(value)]
    plot = Plot(
        f"{xlabel}, class by class",
        padded([v for row in known for v in row], include=(0,)),
        (len(rows) - 0.4, -0.6),
        (560, 50 + max(24, 45 - len(rows)) * len(rows)),
        (6, 16, 44, 24 + 7 * min(max(len(name) for name, _, _ in rows), 18)),
    )
    plot.axes(xlabel, yticks=[])
    plot.rule(x=0)
    for row, (name, value, (low, high)) in enumerate(rows):
        plot.text(plot.left - 8, plot.py(row) + 4, shortened(name), "end", "name")
        if math.isfinite(value):
            side, text = (
                "gain" if value > 0 else "loss",
                f"{name}: {value:+.2f}, 95 % {low:+.2f} to {high:+.2f}",
            )
            plot.line([(low, row), (high, row)], side, tip=text)
            plot.marks([(value, row)], side, [text])
    return plot.svg()


def shortened(name: str, most: int = 18) -> str:
    """A name that fits beside an axis."""
    return name if len(name) <= most else name[: most - 1] + "…"


def sorted_differences(values: Sequence[float], mean: float, ylabel: str) -> str:
    """One bar an image, from the largest loss to the largest gain."""
    ordered = sorted(values)
    plot = Plot(
        f"{ylabel}, image by image in order", (0, len(ordered)), padded(ordered, include=(0,)), (560, 280)
    )
    plot.axes("images, in order", ylabel, xticks=[t for t in ticks(0, len(ordered)) if t == int(t)])
    for index, value in enumerate(ordered):
        gap = 0.08 if len(ordered) <= 200 else 0
        side = "gain" if value > 0 else "loss"
        plot.box((index + gap, index + 1 - gap), (0, value), side, f"{value:+.2f} points")
    plot.rule(y=0)
    plot.rule(y=mean, css="mean")
    text = f"mean {mean:+.2f}".replace("-", "−")
    if mean < 0:  # where no bar is: a gain's bars go up at the right, a loss's down at the left
        plot.text(plot.px(len(ordered)) - 6, plot.py(mean) + 15, text, "end", "name")
    else:
        plot.text(plot.left + 6, plot.py(mean) - 6, text, css="name")
    return plot.svg()


def class_bars(rows: Sequence[tuple[str, Mapping[str, float]]], xlabel: str) -> str:
    """A group of bars for each class, a bar a rule."""
    rules = list(rows[0][1])
    thick = 11
    height = (thick * len(rules) + 12) * len(rows)
    widest = max(len(name) for name, _ in rows)
    top = max([v for _, scores in rows for v in scores.values() if math.isfinite(v)], default=1.0)
    plot = Plot(
        f"{xlabel} of each class and rule",
        (0.0, min(100.0, top * 1.04 + 1)),
        (float(len(rows)), 0.0),
        (560, height + 54),
        (6, 52, 44, 24 + 7 * min(widest, 18)),
    )
    plot.axes(xlabel, yticks=[])
    share = thick / (thick * len(rules) + 12)
    for row, (name, scores) in enumerate(rows):
        start = row + (1 - share * len(rules)) / 2
        for index, (rule, value) in enumerate(scores.items()):
            if not math.isfinite(value):
                continue
            upper = start + index * share
            plot.box(
                (0, value), (upper + 0.01, upper + share - 0.01), colour(rule), f"{name}, {rule}: {value:.2f}"
            )
            plot.text(plot.px(value) + 4, plot.py(upper + share / 2) + 3.5, f"{value:.1f}", css="value")
        plot.text(plot.left - 8, plot.py(row + 0.5) + 4, shortened(name), "end", "name")
    return plot.svg()


def reliability(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], colours: Mapping[str, str]
) -> str:
    """Observed frequency against predicted probability; the share of pixels as bars along the bottom.

    ``curves[name]`` holds (mean probability, frequency, share of all) a bin.
    """
    plot = Plot("reliability diagram", (0.0, 1.0), (0.0, 1.0), (420, 400), (12, 16, 44, 54))
    plot.axes("predicted probability", "observed frequency")
    plot.line([(0, 0), (1, 1)], "soft", "3 4", "perfect calibration")
    first = next(iter(curves.values()))
    for confidence, _, share in first:
        height = max(0.0, 1 + math.log10(share) / 6) * 0.16 if share > 0 else 0
        tip = f"{100 * share:.3g} % of all decisions near {confidence:.2f}"
        plot.box((confidence - 0.016, confidence + 0.016), (0, height), "soft", tip, "faint")
    for name, curve in curves.items():
        points = [(confidence, frequency) for confidence, frequency, _ in curve]
        tips = [f"{name}: {c:.2f} predicted, {f:.2f} observed" for c, f in points]
        plot.line(points, colours[name], "" if name == next(iter(curves)) else "6 3")
        plot.marks(points, colours[name], tips)
    return plot.svg()


def lines(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str],
    level: tuple[str, float] | None = None,
    whole: bool = False,
) -> str:
    """Lines with marks; ``level`` is a value to compare with, drawn across; ``whole`` x are integers."""
    points = [p for line in series.values() for p in line]
    xs, ys = [x for x, _ in points], [y for _, y in points]
    span = (min(xs), max(xs)) if len(set(xs)) > 1 else (xs[0] - 1, xs[0] + 1)
    plot = Plot(title, span, padded(ys, include=[level[1]] if level else []))
    marked = [t for t in ticks(*span, about=8) if not whole or t == int(t)]
    plot.axes(xlabel, ylabel, xticks=marked)
    if level:
        name, value = level
        plot.line([(span[0], value), (span[1], value)], colour(name), tip=f"{name}: {value:.2f}")
        plot.text(plot.px(span[1]), plot.py(value) - 7, f"{name} {value:.2f}", "end", "name")
    for name, line in series.items():
        plot.line(line, colours[name], dash(name))
        plot.marks(line, colours[name], [f"{name}: {y:.4g} at {x:g}" for x, y in line])
    return plot.svg()


def histogram(shares: Sequence[float], edges: Sequence[float], xlabel: str) -> str:
    """Shares of all in bins, with one half marked."""
    plot = Plot(xlabel, (edges[0], edges[-1]), (0.0, max(shares, default=1.0) * 1.08 or 1.0), (560, 220))
    plot.axes(xlabel, "share, %")
    for share, low, high in zip(shares, edges, edges[1:], strict=False):
        plot.box(
            (low + 0.001, high - 0.001),
            (0, share),
            "rule-rankdice",
            f"{low:.2f} to {high:.2f}: {share:.1f} %",
        )
    plot.rule(x=0.5, css="mean")
    plot.text(plot.px(0.5) + 5, plot.top + 10, "one half", css="name")
    return plot.svg()
