"""Compare the gain of rules between two training losses: tables of scores, gains, and the difference of the gains.

    python scripts/interaction.py saved/results/kvasir_seg_study/kvasir_seg/smp_deeplabv3plus-lite0-96px/{ce,ce_dice}

Each folder holds seed0, seed1, ... with the results of test.py, raw and with calibrate=temperature. The gain of a rule
is rule - baseline, in points of mDice. With two folders, the interaction is also printed: the gain with the first
folder minus the gain with the second. The gains of an image are averaged over the seeds first. Intervals are 95 % BCa
bootstraps over images. They do not cover the choice of the seed, so the range over seeds is printed.
Exit codes: 0 done, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError
from scripts.analysis.scores import mean, mean_interval, pair, read_rule
from scripts.common import command_line
from trainers.text import markdown_table

PROBABILITIES = {"raw": "", "temperature": "calibrated"}
MEASURES = {"NLL": "log_loss", "Brier": "brier", "ECE, %": "ece"}


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("folders", nargs="+", type=Path, help="folders with seed0, seed1, ...; two for the interaction")
    parser.add_argument("--rules", default="max,T_fit,rankdice", help="rules to compare (default: %(default)s)")
    parser.add_argument("--baseline", default="max", help="rule to compare with (default: %(default)s)")
    args = parser.parse_args()
    rules = list(dict.fromkeys([args.baseline, *args.rules.split(",")]))
    print("\n".join(table(args.folders, rules, args.baseline)))


def table(folders: Sequence[Path], rules: Sequence[str], baseline: str) -> list[str]:
    """Return the scores, the gains and the interactions as Markdown; the baseline is one of the rules."""
    scores, gains = [], []
    by_image: dict[tuple[Path, str, str], dict[str, float]] = {}  # gains, averaged over the seeds
    for folder in folders:
        seeds = sorted(folder.glob("seed*"))
        if not seeds:
            raise UserError(f"{folder} has no folder seed0, seed1, ... Fix: give the folder of a loss, which has them.")
        for kind, inner in PROBABILITIES.items():
            read = {rule: [read_rule(results_of(seed) / inner, rule) for seed in seeds] for rule in rules}
            cells = [spread([100 * mean(one.by_image().values()) for one in read[rule]]) for rule in rules]
            for name, key in MEASURES.items():
                scale = 100 if "%" in name else 1
                found = [one.record["scores"].get(key) for one in read[baseline]]
                if None in found:
                    raise UserError(f"{folder}: {baseline}.json has no score {key}. Fix: score again with test.py.")
                cells.append(spread([scale * value for value in found], digits=3))
            scores.append([f"{folder.name}, {kind} ({len(seeds)} seeds)", *cells])
            for rule in rules:
                if rule != baseline:
                    pairs = zip(read[baseline], read[rule], strict=True)
                    by_seed = [pair(base.by_image(), one.by_image())[0] for base, one in pairs]
                    common = set.intersection(*map(set, by_seed))
                    average = {image: mean(one[image] for one in by_seed) for image in sorted(common)}
                    by_image[folder, kind, rule] = average
                    each = [100 * mean(one.values()) for one in by_seed]
                    ends = f"{min(each):+.2f} … {max(each):+.2f}"
                    gains.append([f"{rule}, {folder.name}, {kind}", interval(average), ends])
    points = "points [95 % BCa over images]"
    parts = [
        markdown_table(["runs, probabilities", *(f"{rule} mDice" for rule in rules), *MEASURES], scores),
        markdown_table([f"gain over {baseline}", points, "range over seeds"], gains),
    ]
    if len(folders) == 2:
        first, second = folders
        rows = [
            [f"{rule}, {kind}", interval(pair(by_image[second, kind, rule], average)[0])]
            for (folder, kind, rule), average in by_image.items()
            if folder == first
        ]
        parts.append(markdown_table([f"interaction: gain with {first.name} - gain with {second.name}", points], rows))
    return "\n\n".join(parts).splitlines()


def results_of(run: Path) -> Path:
    """Return the folder with the results of last.pth, or of best_model.pth if last.pth was not scored."""
    last = run / "results" / "of_last"
    return last if last.is_dir() else run / "results"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and half the range as text."""
    return f"{mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def interval(differences: dict[str, float]) -> str:
    """Return the mean of fractions and its interval as text, in points."""
    values = [100 * value for value in differences.values()]
    low, high = mean_interval(values)
    return f"{mean(values):+.2f} [{low:+.2f}, {high:+.2f}]"


if __name__ == "__main__":
    run_cli(main)
