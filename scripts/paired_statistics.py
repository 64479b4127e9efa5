"""Compare prediction rules on the same probabilities, image by image.

    python scripts/paired_statistics.py saved/kvasir_seg/smp_unet/ce/seed0     every rule against T
    python scripts/paired_statistics.py RUN/seed0 RUN/seed1 --rule rankdice    several seeds
    python scripts/paired_statistics.py RUN/seed0 --protocol paper --json
    python scripts/paired_statistics.py RUN/seed0 --group '(patient[0-9]+)'    the images of a patient are a group
    python scripts/paired_statistics.py RUN/seed0 RUN/seed1 --auto 30          the gain of -p auto

Differences are rule − baseline in points (percent) of the image's mean over classes. The interval is the BCa
bootstrap over images, or over the groups of --group. It covers the choice of images, not the training run. To see
the effect of the training run, give several seeds: their mean and range are printed if only the seed differs.

With --auto N, rule `auto` chooses among T, max, rankdice and, if it was scored, the calibrated rankdice on a random
half of the images, N times. The other half is scored. T_fit is left out, because it would need another fit for every
half.
Exit codes: 0 done, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError
from configs.files import finite_or_none
from scripts.analysis.scores import HARM, RESAMPLES, RuleScores, compare, mean, read_rule, result_folder, rules_in
from scripts.common import check_least, command_line
from scripts.tables.results import group_seeds, parse_result
from trainers.fitted import choose
from trainers.text import markdown_table, markdown_text

IGNORED_BY_AUTO = ("baseline", "rule", "confidence", "resamples", "group", "json")
AUTO = ("T", "max", "rankdice")  # the choices of rule auto, without T_fit


def markdown(found: Sequence[dict[str, Any]], seeds: Sequence[dict[str, Any]] = ()) -> str:
    """Return the comparisons as Markdown: differences over images, harm, several seeds, and classes."""
    first = found[0]
    level, metric = f"{100 * first['confidence']:g} %", first["metric"].capitalize().replace("Iou", "IoU")
    name_head, difference = "rule − baseline, seed", f"mean {metric} difference [{level} BCa]"
    head = [name_head, difference, "median", "better / worse / tied"]
    head += ["standardised mean", "rank-biserial", "Wilcoxon p", "images"]
    harm_head = [name_head, *(f"lose > {k}" for k in HARM), "worst loss", "best gain"]
    rows, harm = [], []
    for one in found:
        name = f"{title(one, found)}, {one['seed']}"
        rows.append(
            [
                name,
                f"{one['mean']:+.2f} [{_range(one['interval'])}]",
                f"{one['median']:+.2f}",
                " / ".join(f"{100 * one[key]:.1f} %" for key in ("better", "worse", "tied")),
                f"{one['standardized_mean']:+.2f}",
                f"{one['rank_biserial']:+.2f}",
                f"{one['wilcoxon_p']:.2g} ({one['wilcoxon_method']})",
                f"{one['images']} in {one['groups']} groups" if one["groups"] else str(one["images"]),
            ]
        )
        shares = [f"{100 * one['harm'][str(k)]:.1f} %" for k in HARM]
        harm.append([name, *shares, f"{0.0 - one['worst_loss']:+.2f}", f"{one['best_gain']:+.2f}"])
    parts = [markdown_table(head, rows), markdown_table(harm_head, harm)]
    for group in seeds:
        parts += _seed_parts(group, found)
    parts.append(_remarks(found))
    for one in found:
        if len(one["classes"]) > 1:
            parts += _class_parts(one, found)
    return "\n\n".join(parts) + "\n"


def title(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    """Return the name of a comparison, with network, loss and calibration if these differ between comparisons."""
    names = [", ".join(filter(None, (o["model"], o["loss"], o["variant"]))) for o in (one, *found)]
    return (f"{names[0]}: " if len(set(names)) > 1 else "") + f"{one['rule']} − {one['baseline']}"


def _seed_parts(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """Return mean and range over seeds, also by class; or the reason why there are none."""
    count = len(one["seeds"])
    if "rejected" in one:
        return [markdown_text(f"{title(one, found)}: no mean over {count} runs, because {one['rejected']}.")]
    name = f"{title(one, found)} over {count} seeds"
    parts = [markdown_text(f"{name}: {one['mean']:+.2f} points, range {_range(one['range'])}.")]
    if len(one["classes"]) > 1:
        rows = [[c["name"], f"{c['mean']:+.2f}", _range(c["range"])] for c in one["classes"]]
        parts.append(markdown_table([name, "mean", "range"], rows))
    return parts


def _remarks(found: Sequence[dict[str, Any]]) -> str:
    text = "Points are percent. The interval covers the choice of images, not that of the training run."
    tested = sum(not math.isnan(one["wilcoxon_p"]) for one in found)
    if tested > 1:
        text += f" The {tested} p-values are not adjusted for their number."
    if any(one["groups"] for one in found):
        text += " The interval resamples groups; the p-values treat images as independent."
    unpaired = {one["unpaired"] for one in found} - {0}
    if unpaired:
        text += f" Images with a score under one rule only are left out: at most {max(unpaired)}."
    return text


def _class_parts(one: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    rows = []
    for row in one["classes"]:
        difference = f"{row['mean']:+.2f} [{_range(row['interval'])}]"
        rows.append([row["name"], f"{row['baseline']:.2f}", f"{row['rule']:.2f}", difference, str(row["images"])])
    head = ["class", one["baseline"], one["rule"], "paired difference [interval]", "images"]
    return [markdown_text(f"{title(one, found)}, seed {one['seed']}, by class:"), markdown_table(head, rows)]


def _range(ends: Sequence[float]) -> str:
    return f"{ends[0]:+.2f}, {ends[1]:+.2f}"


def over_seeds(found: Sequence[dict[str, Any]], scores: Sequence[RuleScores]) -> list[dict[str, Any]]:
    """Return mean and range over the training runs of each compared rule; images of several runs are not pooled.

    Runs that differ in more than their seed have no mean; ``rejected`` is the difference. ``scores`` are the rules of
    the comparisons in ``found``, in the same order.
    """
    of_path: dict[Path, dict[str, Any]] = {}
    for one, comparison in zip(scores, found, strict=True):
        if one.path.resolve() in of_path:
            raise UserError(f"{one.path} is given twice. Fix: give each run once.")
        of_path[one.path.resolve()] = comparison
    results = []
    for path, one in zip(of_path, scores, strict=True):
        try:
            result = parse_result(path, Path(path.anchor), one.record)
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}: no key {error}. Fix: score again with test.py.") from None
        results.append(replace(result, row=result.row._replace(collection="")))

    rows = []
    for group in group_seeds(results).values():
        if len(group.results) > 1:
            runs = [of_path[result.path] for result in group.results]
            row = {key: runs[0][key] for key in ("rule", "baseline", "model", "loss", "variant")}
            row["seeds"] = [run["seed"] for run in runs]
            rows.append(row | ({"rejected": group.reason} if group.reason else _summary(runs)))
    return rows


def _summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return mean and range over runs of the mean difference, and of each class that has one in every run."""
    by_run = [{(row["class"], row["name"]): row["mean"] for row in run["classes"]} for run in runs]
    classes = []
    for key in by_run[0]:
        means, name = [found.get(key, math.nan) for found in by_run], key[1]
        if not any(map(math.isnan, means)):
            classes.append({"name": name, **_spread(means)})
    return {**_spread([run["mean"] for run in runs]), "classes": classes}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": mean(values), "range": [min(values), max(values)]}


def auto_table(folders: Sequence[Path], metric: str, halves: int, seed: int) -> str:
    """Return the mean gains over T of rankdice and of `auto`, in points, over random halves of the images."""
    rows: list[list[str]] = []
    gains_by_loss: dict[str, list[list[float]]] = {}
    for folder in folders:
        found = {rule: read_rule(folder, rule, metric) for rule in AUTO}
        record = found["T"].record
        try:
            name = f"{record['dataset']['name']}, {record['model']}, {record['loss']}, {record['seed']}"
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder}/T.json: no key {error}. Fix: score again with test.py.") from None
        if "rankdice" in rules_in(folder / "calibrated"):
            found["rankdice, calibrated"] = read_rule(folder / "calibrated", "rankdice", metric)
        gains, chosen = choose_on_halves({rule: one.by_image() for rule, one in found.items()}, halves, seed)
        gains_by_loss.setdefault(record["loss"], []).append(gains)
        counts = ", ".join(f"{rule} {count}" for rule, count in chosen.most_common())
        rows.append([name, *(f"{gain:+.2f}" for gain in gains), counts])
    for loss, of_runs in gains_by_loss.items():
        means = [sum(column) / len(of_runs) for column in zip(*of_runs, strict=True)]
        rows.append([f"mean of {len(of_runs)} runs, {loss}", *(f"{gain:+.2f}" for gain in means), ""])
    return markdown_table(["run, seed", "rankdice − T", "auto − T", "chosen"], rows) + "\n"


def choose_on_halves(dice: Mapping[str, dict[str, float]], halves: int, seed: int) -> tuple[list[float], Counter[str]]:
    """Choose a rule on a random half of the images and score the other, ``halves`` times.

    ``dice[rule][image]`` is a fraction. Return the mean gains over T of rankdice and of the chosen rules, in points,
    and how often each rule was chosen.
    """
    images = sorted(set.intersection(*map(set, dice.values())))
    scores = {rule: torch.tensor([of[image] for image in images]).double() for rule, of in dice.items()}
    generator, chosen = torch.Generator().manual_seed(seed), Counter[str]()
    gains: list[list[float]] = []
    for _ in range(halves):
        one, other = torch.randperm(len(images), generator=generator).tensor_split(2)
        rule = choose({name: values[one] for name, values in scores.items()}, resamples=999).rule
        chosen[rule] += 1
        gains.append([100 * float((scores[name] - scores["T"])[other].nanmean()) for name in ("rankdice", rule)])
    return [sum(column) / halves for column in zip(*gains, strict=True)], chosen


def main(arguments: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(arguments)
    check_least(args, resamples=1, seed=0, auto=0)
    if not 0 < args.confidence < 1:
        raise UserError(f"--confidence={args.confidence:g} is invalid: expected a number in (0, 1), such as 0.95.")
    folders = [result_folder(run, args.protocol) for run in args.runs]
    if args.auto:
        default = _parser().parse_args([str(run) for run in args.runs])
        ignored = [name for name in IGNORED_BY_AUTO if getattr(args, name) != getattr(default, name)]
        if ignored:
            raise UserError(f"--auto does not use --{ignored[0]}. Fix: leave out one of them.")
        print(auto_table(folders, args.metric, args.auto, args.seed), end="")
        return 0
    pairs = []
    for folder in folders:
        baseline = read_rule(folder, args.baseline, args.metric)
        if args.protocol == "paper" and baseline.record.get("protocol") != "paper":
            raise UserError(f"{folder}: no scores of protocol=paper. Fix: test.py -r ... protocol=paper")
        for name in dict.fromkeys(args.rule or (r for r in rules_in(folder) if r != args.baseline)):
            pairs.append((baseline, read_rule(folder, name, args.metric)))
    if not pairs:
        raise UserError(f"{args.runs[0]}: no rule but {args.baseline}. Fix: score more with test.py -p all.")
    found = [compare(*pair, args.confidence, args.resamples, args.seed, args.group) for pair in pairs]
    seeds = over_seeds(found, [rule for _, rule in pairs]) if len(args.runs) > 1 else []
    if args.json:
        print(json.dumps(finite_or_none({"comparisons": found, "seeds": seeds}), indent=1))
    else:
        print(markdown(found, seeds), end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of results")
    add("--baseline", default="T", metavar="RULE", help="the rule to compare with (default: T)")
    add("--rule", action="append", metavar="RULE", help="may be repeated (default: all others)")
    add("--metric", choices=("dice", "iou"), default="dice", help="score to compare (default: dice)")
    add("--protocol", choices=("corrected", "paper"), default="corrected", help="results to read (default: corrected)")
    add("--confidence", type=float, default=0.95, help="level of the intervals (default: 0.95)")
    add("--resamples", type=int, default=RESAMPLES, help="number of bootstrap samples (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the bootstrap and of the halves of --auto (default: 0)")
    group = (
        "resample groups of images, such as patients: a CSV file with the columns image and group, or a "
        "regular expression that finds the group in the name of an image"
    )
    add("--group", metavar="FILE|PATTERN", help=group)
    add(
        "--auto",
        type=int,
        default=0,
        metavar="N",
        help="N times, choose a rule on a random half of the images and score the other half",
    )
    add("--json", action="store_true", help="print JSON, with every difference")
    return parser


if __name__ == "__main__":
    run_cli(main)
