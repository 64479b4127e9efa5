"""Does a rule gain more with one loss than with another? A table over seeds, gains and their difference.

    python scripts/interaction.py saved/results/kvasir_seg_study/kvasir_seg/smp_deeplabv3plus-lite0-96px/{ce,ce_dice}

Each folder holds seed0, seed1, ... with the results of test.py, raw and with calibrate=temperature. The gain of a rule
is rule - baseline, in points of mDice. The interaction is the gain with the first folder minus that with the second.
Scores of an image are averaged over the seeds first. Intervals are 95 % BCa bootstraps over images: they do not cover
the choice of the seed, whose range is printed. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError
from scripts.analysis.scores import RuleScores, read_rule
from scripts.analysis.statistics import mean_interval
from scripts.common import command_line

PROBABILITIES = {"raw": "", "temperature": "calibrated"}
MEASURES = (("NLL", "log_loss"), ("Brier", "brier"), ("ECE, %", "ece"))


def main() -> None:
    """The command."""
    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="one or more folders with seed0, seed1, ...")
    parser.add_argument("--rules", default="max,T_fit,rankdice", help="default: %(default)s")
    parser.add_argument("--baseline", default="max", help="default: %(default)s")
    args = parser.parse_args()
    rules = list(dict.fromkeys([args.baseline, *args.rules.split(",")]))
    print("\n".join(table(args.folders, rules, args.baseline)))


def table(folders: Sequence[Path], rules: Sequence[str], baseline: str) -> list[str]:
    """Return the scores, the gains and the interactions as Markdown."""
    names = " | ".join(f"{rule} mDice" for rule in rules)
    measures = " | ".join(name for name, _ in MEASURES)
    lines = [
        f"| runs, probabilities | {names} | {measures} |",
        "| :-- |" + " --: |" * (len(rules) + len(MEASURES)),
    ]
    gains: dict[tuple[Path, str, str], list[dict[str, float]]] = {}
    for folder in folders:
        seeds = sorted(folder.glob("seed*"))
        if not seeds:
            raise UserError(
                f"{folder} holds no seed0, seed1, ... Fix: give the folder of a loss, with its seeds in it."
            )
        for kind, inner in PROBABILITIES.items():
            read = {rule: [read_rule(results_of(seed) / inner, rule) for seed in seeds] for rule in rules}
            cells = [spread([100 * mean(one.by_image().values()) for one in read[rule]]) for rule in rules]
            for name, key in MEASURES:
                scale = 100 if "%" in name else 1
                cells.append(
                    spread([scale * float(one.record["scores"][key]) for one in read[baseline]], digits=3)
                )
            lines.append(f"| {folder.name}, {kind} ({len(seeds)} seeds) | {' | '.join(cells)} |")
            for rule in rules:
                gains[folder, kind, rule] = [
                    difference(base, one) for base, one in zip(read[baseline], read[rule], strict=True)
                ]
    lines += [
        "",
        "| gain over " + baseline + " | points [95 % BCa over images] | range over seeds |",
        "| :-- | --: | --: |",
    ]
    for (folder, kind, rule), by_seed in gains.items():
        if rule != baseline:
            each = sorted(mean(one.values()) for one in by_seed)
            lines.append(
                f"| {rule}, {folder.name}, {kind} | {interval(average(by_seed))} | {each[0]:+.2f} … {each[-1]:+.2f} |"
            )
    if len(folders) == 2:
        first, second = folders
        lines += [
            "",
            f"| interaction: gain with {first.name} - gain with {second.name} | points [95 % BCa over images] |",
        ]
        lines.append("| :-- | --: |")
        for kind in PROBABILITIES:
            for rule in rules:
                if rule != baseline:
                    one, other = average(gains[first, kind, rule]), average(gains[second, kind, rule])
                    both = {image: one[image] - other[image] for image in one if image in other}
                    lines.append(f"| {rule}, {kind} | {interval(both)} |")
    return lines


def results_of(run: Path) -> Path:
    """Return the folder of the results of last.pth, or of best_model.pth if last.pth was not scored."""
    last = run / "results" / "of_last"
    return last if last.is_dir() else run / "results"


def difference(baseline: RuleScores, rule: RuleScores) -> dict[str, float]:
    """Return rule - baseline of each image that both score, in points."""
    first, second = baseline.by_image(), rule.by_image()
    return {image: 100 * (second[image] - first[image]) for image in first if image in second}


def average(by_seed: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean over seeds of each image that all seeds score."""
    common = set.intersection(*(set(one) for one in by_seed))
    return {image: mean([one[image] for one in by_seed]) for image in sorted(common)}


def mean(values: object) -> float:
    """Return the arithmetic mean."""
    numbers = list(values)  # type: ignore[call-overload]
    return math.fsum(numbers) / len(numbers)


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and half the range."""
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def interval(values: dict[str, float]) -> str:
    """Return the mean with its interval."""
    low, high = mean_interval(list(values.values()))
    return f"{mean(values.values()):+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    run_cli(main)
