"""Pictures of paired differences; matplotlib is loaded only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scripts.paired.sweeps import Sweep

_UP, _DOWN = "#1b7f5c", "#b4472e"


def load_pyplot() -> Any:
    """matplotlib.pyplot without a screen.

    Raises:
        ModuleNotFoundError: with the command that installs it.
    """
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "plots need matplotlib: pip install matplotlib (the extra `plots`)"
        ) from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw(
    found: Sequence[dict[str, Any]], sweeps: Sequence[Sweep | None], path: Path, titles: Sequence[str]
) -> None:
    """A row for each comparison: its differences in order, each class's mean difference, Dice by threshold.

    The third column is there where any comparison has a sweep.
    """
    plt = load_pyplot()
    tall = max(2.8, 0.24 * max(len(one["classes"]) for one in found) + 1)
    columns = 3 if any(sweeps) else 2
    figure, axes = plt.subplots(
        len(found), columns, figsize=(5.5 * columns, tall * len(found)), squeeze=False, layout="constrained"
    )
    for row, one, sweep, title in zip(axes, found, sweeps, titles, strict=True):
        _sorted_differences(row[0], one, title)
        _class_bars(row[1], one)
        if sweep:
            _threshold_curve(row[2], sweep)
        elif columns == 3:
            row[2].set_axis_off()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sorted_differences(axis: Any, one: dict[str, Any], title: str) -> None:
    values = sorted(one["differences"])
    axis.bar(range(len(values)), values, width=1, color=[_UP if v > 0 else _DOWN for v in values])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(one["mean"], color="black", linewidth=0.8, linestyle="--", label=f"mean {one['mean']:+.2f}")
    axis.set_title(f"{title}, seed {one['seed']}")
    axis.set_xlabel(f"images in order ({100 * one['better']:.0f} % better, {100 * one['worse']:.0f} % worse)")
    axis.set_ylabel(f"{one['metric']} difference, points")
    axis.legend(frameon=False)


def _class_bars(axis: Any, one: dict[str, Any]) -> None:
    rows = [row for row in one["classes"] if row["images"]][::-1]
    means = [row["mean"] for row in rows]
    # The mean of a skewed sample may lie outside its BCa interval: then that side has no whisker.
    low = [max(0.0, row["mean"] - row["interval"][0]) for row in rows]
    high = [max(0.0, row["interval"][1] - row["mean"]) for row in rows]
    colors = [_UP if mean > 0 else _DOWN for mean in means]
    axis.barh([row["name"] for row in rows], means, xerr=[low, high], color=colors, ecolor="gray")
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_xlabel(f"{one['metric']} difference by class, points")


def _threshold_curve(axis: Any, sweep: Sweep) -> None:
    """Mean Dice at fixed thresholds and of the two rules; behind it, where RankDice cut."""
    behind = axis.twinx()
    behind.hist(sweep.cutoffs, bins=[k / 40 for k in range(41)], color="lightgray")
    behind.set_ylabel(f"cut-offs of RankDice, {len(sweep.cutoffs)} masks", color="gray")
    behind.tick_params(colors="gray")
    axis.plot(
        *zip(*sweep.curve, strict=True),
        color="black",
        marker="o",
        markersize=3,
        label="one threshold for all",
    )
    for (rule, dice), style in zip(sweep.levels.items(), (":", "--"), strict=False):
        axis.axhline(dice, color=_UP, linestyle=style, label=f"{rule} {dice:.2f}")
    axis.set_zorder(behind.get_zorder() + 1)  # the curve in front of the bars
    axis.patch.set_visible(False)
    axis.set(xlim=(0, 1), xlabel="threshold; cut-off", ylabel="mean Dice, %")
    axis.legend(frameon=False)
