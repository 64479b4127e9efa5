"""Is one prediction rule better than another on the same probabilities? Paired, image by image.

    python scripts/paired_statistics.py saved/kvasir_seg/smp_unet/ce/seed0     every rule against T
    python scripts/paired_statistics.py RUN/seed0 RUN/seed1 --rule rankdice    several seeds
    python scripts/paired_statistics.py RUN/seed0 --protocol paper --json
    python scripts/paired_statistics.py RUN/seed0 --rule rankdice --plot differences.png    (needs matplotlib)

Differences are rule − baseline in points (percent), of the image's mean over classes. The interval is the BCa
bootstrap over images (seeded): it covers the choice of images, not that of the training run; for that, give
several seeds: their mean and range are shown, and refused for runs that differ in more than the seed. The plot of
Dice against the threshold needs the measurements of report.py: run that first.
Exit codes: 0 done, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.files import finite_or_none
from scripts.command import leave, refused
from scripts.paired import plots
from scripts.paired.inference import bca_of_mean, standardized_mean, wilcoxon
from scripts.paired.scores import (
    RuleScores,
    check_same_probabilities,
    paired,
    read_rule,
    result_folder,
    rules_in,
)
from scripts.paired.seeds import over_seeds
from scripts.paired.sweeps import sweep_of
from scripts.tables.results import short, variant_of
from trainers.text import markdown_cell, markdown_text


def compare(
    baseline: RuleScores, rule: RuleScores, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> dict[str, Any]:
    """All statistics of rule − baseline over images, and the differences by class; in points.

    Raises:
        ValueError: the two were not scored on the same probabilities, or share no image.
    """
    check_same_probabilities(baseline, rule)
    fractions, unpaired = paired(baseline.by_image(), rule.by_image())
    values = [100 * v for v in fractions]
    low, high = bca_of_mean(values, confidence, resamples, seed)
    test = wilcoxon([round(v, 9) for v in values])  # what differs by rounding alone is tied
    count = len(values)
    return {
        "baseline": baseline.rule,
        "rule": rule.rule,
        "metric": rule.metric,
        "model": rule.record.get("model"),
        "loss": rule.record.get("loss"),
        "variant": short(variant_of(rule.record)),
        "seed": rule.record.get("seed"),
        "images": count,
        "unpaired": unpaired,
        "mean": math.fsum(values) / count,
        "median": median(values),
        "interval": [low, high],
        "confidence": confidence,
        "better": sum(v > 1e-9 for v in values) / count,
        "worse": sum(v < -1e-9 for v in values) / count,
        "tied": sum(abs(v) <= 1e-9 for v in values) / count,
        "standardized_mean": standardized_mean(values),
        "rank_biserial": test.rank_biserial,
        "wilcoxon_p": test.p,
        "wilcoxon_method": test.method,
        "differences": values,
        "classes": _by_class(baseline, rule, confidence, resamples, seed),
    }


def _by_class(
    baseline: RuleScores, rule: RuleScores, confidence: float, resamples: int, seed: int
) -> list[dict]:
    """For each class: both means, and the paired difference with its interval."""
    names = rule.record.get("classes") or []
    one, other, rows = baseline.by_class(), rule.by_class(), []
    for c in sorted(one.keys() | other.keys()):
        pairs, unpaired = paired(_of_class(baseline, c), _of_class(rule, c))
        values = [100 * v for v in pairs]
        rows.append(
            {
                "class": c,
                "name": names[c] if c < len(names) else str(c),
                "baseline": 100 * one.get(c, math.nan),
                "rule": 100 * other.get(c, math.nan),
                "images": len(values),
                "unpaired": unpaired,
                "mean": math.fsum(values) / len(values) if values else math.nan,
                "interval": bca_of_mean(values, confidence, resamples, seed)
                if values
                else [math.nan, math.nan],
            }
        )
    return rows


def _of_class(scores: RuleScores, c: int) -> dict[str, float]:
    return {image: v for (image, k), v in scores.cells.items() if k == c}


def markdown(found: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """The comparisons as Markdown: one table over images, what several seeds gave, one table over classes each."""
    first = found[0]
    level, metric = f"{100 * first['confidence']:g} %", first["metric"].capitalize().replace("Iou", "IoU")
    lines = [
        f"| rule − baseline, seed | mean {metric} difference [{level} BCa] | median | better / worse / tied "
        "| standardised mean | rank-biserial | Wilcoxon p | images |",
        "| :-- | :-: | :-: | :-: | :-: | :-: | :-: | :-: |",
    ]
    for one in found:
        shares = " / ".join(f"{100 * one[key]:.1f} %" for key in ("better", "worse", "tied"))
        cells = [
            f"{title(one, found)}, {one['seed']}",
            f"{one['mean']:+.2f} [{_range(one['interval'])}]",
            f"{one['median']:+.2f}",
            shares,
            f"{one['standardized_mean']:+.2f}",
            f"{one['rank_biserial']:+.2f}",
            f"{one['wilcoxon_p']:.2g} ({one['wilcoxon_method']})",
            str(one["images"]),
        ]
        lines.append(f"| {' | '.join(map(markdown_cell, cells))} |")
    lines += [line for one in seeds for line in ("", *_seed_lines(one, found))]
    lines += ["", _remarks(found)]
    for one in found:
        if len(one["classes"]) > 1:
            lines += ["", *_class_table(one, found)]
    return "\n".join(lines) + "\n"


def title(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    """What a comparison is of; with network, loss and what was done to the probabilities where there are several."""
    names = [", ".join(filter(None, (o["model"], o["loss"], o["variant"]))) for o in (one, *found)]
    return (f"{names[0]}: " if len(set(names)) > 1 else "") + f"{one['rule']} − {one['baseline']}"


def _seed_lines(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """Mean and range over seeds, also of each class; or why there are none."""
    name, count = title(one, found), len(one["seeds"])
    if "refused" in one:
        return [f"{markdown_text(name)}: no mean over {count} runs, as {one['refused']}."]
    lines = [
        f"{markdown_text(name)} over {count} seeds: {one['mean']:+.2f} points, range {_range(one['range'])}."
    ]
    if len(one["classes"]) > 1:
        lines += ["", f"| {markdown_cell(name)} over {count} seeds | mean | range |", "| :-- | :-: | :-: |"]
        lines += [
            f"| {markdown_cell(c['name'])} | {c['mean']:+.2f} | {_range(c['range'])} |"
            for c in one["classes"]
        ]
    return lines


def _remarks(found: Sequence[dict[str, Any]]) -> str:
    text = "Points are percent. The interval covers the choice of images, not that of the training run."
    if len(found) > 1:
        text += f" The {len(found)} p-values are not adjusted for their number."
    unpaired = {one["unpaired"] for one in found} - {0}
    if unpaired:
        text += f" Images with a score under one rule only are left out: at most {max(unpaired)}."
    return text


def _class_table(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    names = (one["baseline"], one["rule"])
    lines = [
        f"{markdown_text(title(one, found))}, seed {one['seed']}, by class:",
        "",
        f"| class | {' | '.join(map(markdown_cell, names))} | paired difference [interval] | images |",
        "| :-- | :-: | :-: | :-: | :-: |",
    ]
    for row in one["classes"]:
        name = markdown_cell(row["name"])
        difference = f"{row['mean']:+.2f} [{_range(row['interval'])}]"
        lines.append(
            f"| {name} | {row['baseline']:.2f} | {row['rule']:.2f} | {difference} | {row['images']} |"
        )
    return lines


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.2f}, {ends[1]:+.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        _check(args)
        pairs = []
        for run in args.runs:
            folder = result_folder(run, args.protocol)
            baseline = read_rule(folder, args.baseline, args.metric)
            if args.protocol == "paper" and baseline.record.get("protocol") != "paper":
                raise ValueError(
                    f"{folder} holds no scores of protocol=paper; score it so with test.py first"
                )
            for name in args.rule or [r for r in rules_in(folder) if r != args.baseline]:
                pairs.append((baseline, read_rule(folder, name, args.metric)))
        if not pairs:
            raise ValueError(
                f"{args.runs[0]} holds no rule but {args.baseline}; score more: python test.py -p all"
            )
        found = [compare(*pair, args.confidence, args.resamples, args.seed) for pair in pairs]
        seeds = over_seeds(found, [rule for _, rule in pairs]) if len(args.runs) > 1 else []
        if args.json:
            print(json.dumps(finite_or_none({"comparisons": found, "seeds": seeds}), indent=1))
        else:
            print(markdown(found, seeds), end="")
        if args.plot:
            sweeps = [sweep_of(*pair) for pair in pairs]
            plots.draw(found, [one for one, _ in sweeps], args.plot, [title(one, found) for one in found])
            for reason in dict.fromkeys(why for _, why in sweeps if why):
                print(f"no panel of thresholds: {reason}", file=sys.stderr)
            print(f"written: {args.plot}", file=sys.stderr)
    except BrokenPipeError:
        raise
    except (ValueError, OSError, ModuleNotFoundError) as error:
        return refused(error)
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for numbers that no interval can be made with."""
    if not 0 < args.confidence < 1:
        raise ValueError(f"--confidence {args.confidence:g}: give a number between 0 and 1, such as 0.95")
    for name, least in (("resamples", 1), ("seed", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)}: give a whole number, {least} or more")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of results"
    )
    parser.add_argument(
        "--baseline", default="T", metavar="RULE", help="the rule to compare with (default: T)"
    )
    parser.add_argument(
        "--rule", action="append", metavar="RULE", help="may be repeated (default: all others)"
    )
    parser.add_argument("--metric", choices=("dice", "iou"), default="dice")
    parser.add_argument("--protocol", choices=("corrected", "paper"), default="corrected")
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--resamples", type=int, default=10_000, help="bootstrap samples (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON, with every difference")
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw sorted differences, per-class bars and, after report.py, Dice against the threshold",
    )
    return parser


if __name__ == "__main__":
    leave(main)
