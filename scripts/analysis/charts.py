"""Charts with matplotlib: functions that draw on an axis, and figures as SVG, inline or in a file.

In inline SVG the colours become CSS variables, so that the page chooses them for light and dark displays.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from configs.errors import UserError

PALETTE = {
    "ink": "#1b2027",
    "soft": "#606b77",
    "line": "#e1e5ea",
    "gain": "#1b8a5f",
    "loss": "#c2483c",
    "T": "#77828e",
    "max": "#2f77c2",
    "rankdice": "#d9561f",
    "other": "#8a55c7",
    "T_fit": "#12888c",
    "pooled_dice": "#a67c14",
    "pooled_iou": "#93573a",
}
_STYLES = {"T": (0, (6, 3)), "max": (0, (2, 3))}  # line styles tell rules apart without colour
_SETTINGS = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names of classes and images are not formulas
    "font.size": 9,
    "font.family": "sans-serif",
    "text.color": PALETTE["ink"],
    "axes.labelcolor": PALETTE["soft"],
    "axes.edgecolor": PALETTE["line"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": PALETTE["line"],
    "xtick.color": PALETTE["soft"],
    "ytick.color": PALETTE["soft"],
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
}
Pair = tuple[float, float]  # an interval, a point, or a width and a height


def colour(name: str) -> str:
    """Return the colour of a rule or of a role of `PALETTE`; other rules share one colour."""
    return PALETTE.get(name, PALETTE["other"])


def save(size: Pair, target: Path | io.StringIO, chart: Callable[..., None], *data: Any, **options: Any) -> None:
    """Draw one chart of the data and write it as SVG: to a file, or to a buffer with a transparent background."""
    plt = load_pyplot()
    with plt.rc_context(_SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names may have letters that the font lacks
        figure, axis = plt.subplots(figsize=size, layout="constrained")
        chart(axis, *data, **options)
        transparent = isinstance(target, io.StringIO)
        figure.savefig(target, format="svg", transparent=transparent, metadata={"Date": None})
        plt.close(figure)


def svg(title: str, chart: Callable[..., None], *data: Any, size: Pair = (5.8, 3.1), **options: Any) -> Markup:
    """Return one chart of the data as an SVG element; ``title`` is its text for screen readers."""
    buffer = io.StringIO()
    with load_pyplot().rc_context({"svg.hashsalt": title}):  # other charts have other ids
        save(size, buffer, chart, *data, **options)
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<title>.*?</title>", "", text[text.index("<svg") :], flags=re.S)
    text = re.sub(r' id="[a-z0-9]+(?:\.[a-z0-9]+)*_\d+"', "", text)  # axes_1: every chart has it
    for name, value in PALETTE.items():
        text = text.replace(value, f"var(--{name})")
    return Markup(text.replace("<svg ", f'<svg role="img" aria-label="{Markup.escape(title)}" ', 1))


def load_pyplot() -> Any:
    """Import and return matplotlib.pyplot, set to draw without a display."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(f"charts need {error.name}, which is missing. Fix: pip install -r requirements.txt") from error

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def shorten(name: str) -> str:
    """Shorten a name to at most 24 characters, for the label of an axis."""
    name = " ".join(name.split())
    return name if len(name) <= 24 else name[:23] + "…"


def intervals(axis: Any, rows: Sequence[tuple[str, float, Pair]], xlabel: str, signed: bool = False) -> None:
    """Draw a value with its interval for each row, in the colour of the rule or, with ``signed``, of the sign."""
    for place, (name, value, (low, high)) in enumerate(rows):
        if math.isfinite(value):
            shade = colour(("gain" if value > 0 else "loss") if signed else name)
            axis.plot([low, high], [place, place], color=shade)
            axis.plot(value, place, "o", color=shade)
    axis.set_yticks(range(len(rows)), [shorten(name) for name, _, _ in rows])
    axis.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    axis.grid(axis="y", visible=False)
    if signed:
        axis.axvline(0, color=PALETTE["soft"], linewidth=0.8)


def sorted_differences(axis: Any, values: Sequence[float], mean: float, ylabel: str) -> None:
    """Draw one bar for each image, from the largest loss to the largest gain."""
    edges = range(len(values) + 1)
    for side, ordered in (("loss", [min(v, 0) for v in sorted(values)]), ("gain", [max(v, 0) for v in sorted(values)])):
        axis.stairs(ordered, edges, fill=True, color=colour(side))
    axis.axhline(0, color=PALETTE["soft"], linewidth=0.8)
    axis.axhline(mean, color=PALETTE["ink"], linewidth=1, linestyle="--", label=f"mean {mean:+.2f}")
    axis.set(xlabel="images, in order", ylabel=ylabel, xlim=(0, len(values)))
    axis.legend()


def class_bars(axis: Any, rows: Sequence[tuple[str, Mapping[str, float]]], xlabel: str) -> None:
    """Draw a group of bars for each class, one bar for each rule."""
    rules = list(rows[0][1])
    height = 0.8 / len(rules)
    for index, rule in enumerate(rules):
        places = [place + (index - (len(rules) - 1) / 2) * height for place in range(len(rows))]
        values = [scores[rule] for _, scores in rows]
        bars = axis.barh(places, values, height * 0.92, color=colour(rule), label=rule)
        texts = ["" if math.isnan(value) else f"{value:.1f}" for value in values]
        axis.bar_label(bars, texts, padding=2, fontsize=7)
    axis.set_yticks(range(len(rows)), [shorten(name) for name, _ in rows])
    axis.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    axis.grid(axis="y", visible=False)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, 1 + 0.5 / (len(rows) + 1)), ncols=len(rules))


def reliability(axis: Any, curves: Mapping[str, Sequence[tuple[float, float, float]]]) -> None:
    """Draw observed frequency against predicted probability.

    ``curves[name]`` holds (mean probability, frequency, share of all probabilities) for each bin. Bars show the
    shares of the first curve, on a log scale.
    """
    axis.plot([0, 1], [0, 1], color=PALETTE["soft"], linestyle=":", linewidth=1, label="perfect calibration")
    first = next(iter(curves.values()))
    heights = [max(0.0, 1 + math.log10(share) / 6) * 0.16 if share > 0 else 0 for *_, share in first]
    axis.bar([p for p, *_ in first], heights, 0.032, color=PALETTE["soft"], alpha=0.28)
    shades = ("rankdice", "max", "other", "gain")
    for (name, curve), shade in zip(curves.items(), shades, strict=False):
        axis.plot([p for p, *_ in curve], [f for _, f, _ in curve], marker="o", color=colour(shade), label=name)
    axis.set(xlabel="predicted probability", ylabel="observed frequency", xlim=(0, 1), ylim=(0, 1))
    axis.legend()


def lines(
    axis: Any,
    series: Mapping[str, Sequence[tuple[float, float]]],
    xlabel: str,
    ylabel: str,
    colours: Mapping[str, str],
    marker: str = "o",
    integers: bool = False,
) -> None:
    """Draw lines of (x, y) points; with ``integers``, the ticks of x are integers."""
    for name, points in series.items():
        style = _STYLES.get(name, "-")
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axis.plot(xs, ys, marker=marker, linestyle=style, color=colour(colours.get(name, name)), label=name)
    if integers:
        axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.legend()


def cutoffs(
    axis: Any, values: Sequence[float], thresholds: Sequence[tuple[float, float]], levels: Mapping[str, float]
) -> None:
    """Draw the mean Dice of fixed thresholds and of rules, and behind them a histogram of RankDice's cut-offs."""
    histogram = axis.twinx()
    histogram.hist(values, bins=[k / 40 for k in range(41)], color=PALETTE["line"])
    histogram.set_ylabel(f"cut-offs of RankDice, {len(values)} masks")
    histogram.grid(visible=False)
    axis.plot(*zip(*thresholds, strict=True), color=PALETTE["ink"], marker="o", label="one threshold for all")
    for rule, dice in levels.items():
        axis.axhline(dice, color=colour(rule), linestyle=_STYLES.get(rule, "-"), label=f"{rule} {dice:.2f}")
    axis.set_zorder(histogram.get_zorder() + 1)  # the curve is in front of the bars
    axis.patch.set_visible(False)
    axis.set(xlim=(0, 1), xlabel="threshold; cut-off", ylabel="mean Dice, %")
    axis.legend()


def risk_coverage(axis: Any, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the mean risk of the most confident images; ``curves[name]`` has it as a fraction for 1, 2, ... images."""
    shades = dict(zip(curves, ("rankdice", "max", "T", "other", "ink"), strict=False))
    percent = {
        name: [((k + 1) / len(curve), 100 * risk) for k, risk in enumerate(curve)] for name, curve in curves.items()
    }
    lines(axis, percent, "coverage: share of images kept", "mean risk, 100 − Dice, %", shades, marker="")


def scatter(axis: Any, points: Sequence[Pair], margin: float | None, xlabel: str, ylabel: str) -> None:
    """Draw (x, y) points of images, the line y = x, and the bound y = x − margin, with points below it marked."""
    below = [margin is not None and y < x - margin for x, y in points]
    for side, shade in ((False, "rankdice"), (True, "loss")):
        chosen = [point for point, low in zip(points, below, strict=True) if low == side]
        axis.plot([x for x, _ in chosen], [y for _, y in chosen], ".", color=colour(shade))
    axis.plot([0, 1], [0, 1], color=PALETTE["soft"], linestyle=":", linewidth=1, label="as expected")
    if margin is not None:
        axis.plot([0, 1], [-margin, 1 - margin], color=PALETTE["ink"], linewidth=1.2, label="lower bound")
    axis.set(xlabel=xlabel, ylabel=ylabel, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    axis.legend()
