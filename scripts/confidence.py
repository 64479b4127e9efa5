"""Measure the confidence of masks: risk-coverage curves, their area (AURC), and a lower bound on the Dice of images.

    python scripts/confidence.py -r RUN/last.pth dataset.splits.test=test
    python scripts/confidence.py -r RUN/last.pth -p T --fit val --on test --alpha 0.1 calibrate=temperature

Two splits are needed: --fit gives the margin of the bound, --on is measured. They must not share images, and images
of both should come from the same source. confidence.json (all numbers) and confidence.svg (the curves) are written to
confidence/RULE/ in the folder of the results. The margins are stored in NAME.fitted.json, where
predict_images.py finds them. Exit codes: 0 done, 2 bad input, 3 the computation or the disk failed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import build
from configs.cli import run_cli
from configs.compose import options
from configs.errors import UserError, one_line
from configs.files import write_json
from configs.fitting import Fitter, folder_of_results
from configs.stored import chosen_rules, reject_overrides
from scripts import ROOT
from scripts.analysis import charts
from scripts.analysis.measure import assess, known_pairs, record_split
from scripts.analysis.selective import MaskRecord, conformal_margin
from scripts.common import add_checkpoint_options, check_checkpoint_options, check_least, command_line, load_run
from trainers.distributed import World, join_world
from trainers.reproducibility import provenance
from trainers.text import markdown_table


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may be mixed."""
    parser = command_line(__doc__)
    add_checkpoint_options(parser, options("predictor"), "rankdice")
    add = parser.add_argument
    add("--fit", default="val", metavar="SPLIT", help="split that the margin is fitted on (default: val)")
    add("--on", default="test", metavar="SPLIT", help="split that is measured (default: test)")
    add("--resplits", type=int, default=200, help="number of random splits that check the coverage (default: 200)")
    add("--out", type=Path, metavar="DIR", help="default: in the folder of the results")
    add("overrides", nargs="*", metavar="key=value", help="as for test.py: calibrate=temperature, gate=fit")
    args = parser.parse_intermixed_args()
    check_checkpoint_options(args)
    check_least(args, resplits=1)
    return args


def measure(args: argparse.Namespace, world: World) -> None:
    """Fit the margin on one split, measure the confidence on the other, and print and write the numbers."""
    (name,) = args.predictor or chosen_rules(args.overrides) or ["rankdice"]
    reject_overrides(args.overrides, {"split": "--on"})
    path, network, cfg, _, data = load_run(args.resume, [*args.overrides, f"split={args.on}"], world.device, [name])
    held_out = build.dataset(cfg, args.fit)
    if held_out.fingerprint() == data.fingerprint():
        raise UserError(
            f"--fit {args.fit} and --on {args.on} are the same images, so the bound would not hold for others. "
            "Fix: choose another split, for example dataset.splits.test=test."
        )
    fitter = Fitter(cfg, network, path, world)
    to_probs = fitter.to_probs()
    rule = fitter.rules([name], data)[0][name]
    fitted_on = record_split(fitter, held_out, rule, to_probs, f"{cfg.dataset.name} {args.fit}")
    measured = record_split(fitter, data, rule, to_probs, f"{cfg.dataset.name} {args.on}")
    found = assess(measured, known_pairs(fitted_on), args.alpha, args.resplits)
    if "no_bound" in found:
        raise UserError(found["no_bound"])
    margins, settings = class_margins(fitted_on, args.alpha), fitter.rule_settings(name)
    values = {"image": found["margin"], "classes": margins}
    source = {"split": cfg.dataset.splits[args.fit], "fingerprint": held_out.fingerprint()}
    fitter.file.put(f"margin {args.alpha:g}", settings, values, {**source, "num_images": len(held_out)})
    fitter.save()
    if not world.is_main:
        return
    folder = args.out or folder_of_results(path, cfg, [name]) / "confidence" / name
    about = {
        "rule": name,
        "fitted_on": {"split": args.fit, "fingerprint": held_out.fingerprint(), "images": fitted_on.names},
        "measured_on": {"split": args.on, "fingerprint": data.fingerprint(), "images": measured.names},
        "settings": settings,
        "provenance": provenance(ROOT),
    }
    write_json(folder / "confidence.json", {"of": about, **found, "class_margins": margins})
    charts.save((6, 4), folder / "confidence.svg", charts.risk_coverage, found["curves"])
    print(table(name, found, args))
    print(one_line(f"confidence: {folder}"))


def class_margins(record: MaskRecord, alpha: float) -> dict[str, float | None]:
    """Return the margin of each scored class over the images in which it is predicted; None if they are too few."""
    margins: dict[str, float | None] = {}
    for index in record.scored:
        try:
            margins[str(index)] = conformal_margin(*record.class_pairs(index), alpha)
        except UserError:
            margins[str(index)] = None
    return margins


def table(rule: str, found: dict[str, Any], args: argparse.Namespace) -> str:
    """Return the numbers as Markdown."""
    rows = []
    for name, one in found["aurc"].items():
        low, high = (100 * end for end in one["interval"])
        least, most = (-100 * end for end in reversed(one["gain_interval"]))
        aurc = f"{100 * one['aurc']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([name, aurc, f"{-100 * one['gain']:+.2f} [{least:+.2f}, {most:+.2f}]"])
    rows.append(["none", f"{100 * found['aurc_without_order']:.2f}", ""])
    head = ["order by", "AURC [95 % bootstrap], percent", "difference to expected Dice"]
    random = found["resplits"]
    return (
        f"{rule}: expected Dice {100 * found['expected']:.2f}, achieved {100 * found['achieved']:.2f}, "
        f"correlation {found['correlation']:.3f}, {found['images']} images of {args.on}\n\n"
        f"{markdown_table(head, rows)}\n\n"
        f"Bound at alpha={found['alpha']:g}, margin {found['margin']:.3f} from {args.fit}: "
        f"Dice >= expected Dice - margin on {found['coverage']:.1%} of {args.on}, "
        f"mean bound {100 * found['mean_bound']:.1f}.\n"
        f"Random splits of both, {random['number']}: coverage {random['mean']:.1%}, "
        f"90 % of them between {random['from']:.1%} and {random['to']:.1%}."
    )


def main() -> None:
    args = parse_arguments()
    with join_world(args.device) as world:
        measure(args, world)


if __name__ == "__main__":
    run_cli(main)
