"""Pictures of paired differences; matplotlib is loaded only here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """For each comparison: its differences in order, and each class's mean difference with its interval."""
    plt = load_pyplot()
    tall = max(2.8, 0.24 * max(len(one["classes"]) for one in found) + 1)
    figure, axes = plt.subplots(
        len(found), 2, figsize=(11, tall * len(found)), squeeze=False, layout="constrained"
    )
    for (left, right), one in zip(axes, found, strict=True):
        _sorted_differences(left, one)
        _class_bars(right, one)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _sorted_differences(axis: Any, one: dict[str, Any]) -> None:
    values = sorted(one["differences"])
    axis.bar(range(len(values)), values, width=1, color=[_UP if v > 0 else _DOWN for v in values])
    axis.axhline(0, color="black", linewidth=0.8)
    axis.axhline(one["mean"], color="black", linewidth=0.8, linestyle="--", label=f"mean {one['mean']:+.2f}")
    axis.set_title(f"{one['rule']} − {one['baseline']}, seed {one['seed']}")
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
