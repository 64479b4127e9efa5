"""How sure are the masks? Risk-coverage curves, AURC, and a bound on the Dice that holds for new images.

    python scripts/confidence.py -r RUN/last.pth dataset.splits.test=test
    python scripts/confidence.py -r RUN/last.pth -p T --fit val --on test --alpha 0.1 calibrate=temperature

Two splits are needed: --fit gives the margin of the bound, --on is measured. They must not share images, and images
of both should come from the same source. confidence.json (all numbers) and confidence.svg (the curves) are written to
confidence/RULE/ in the folder of the results. The margins are stored in CHECKPOINT.fitted.json, where
predict_images.py finds them. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

import torch
from torch import Tensor

from configs import build
from configs.checkpoint import check_classes, load
from configs.cli import run_cli
from configs.compose import options
from configs.errors import ConfigError, UserError
from configs.files import write_json, write_text
from configs.fitting import Fitter, is_calibrated
from scripts import ROOT
from trainers.distributed import World, join_world
from trainers.reproducibility import provenance
from trainers.results import results_folder
from trainers.selective import (
    MaskRecord,
    aurc,
    compare_aurc,
    conformal_margin,
    record_masks,
    resplit_coverages,
    risk_coverage,
)

EXACT = "expected Dice"


def arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may mix."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("-r", "--resume", required=True, type=Path, metavar="CHECKPOINT", help="ours, or a released one")
    add(
        "-p",
        "--predictor",
        default="rankdice",
        metavar="RULE",
        help=f"one of: {', '.join(options('predictor'))}",
    )
    add("--fit", default="val", metavar="SPLIT", help="split that fits the margin (default: val)")
    add("--on", default="test", metavar="SPLIT", help="split that is measured (default: test)")
    add("--alpha", type=float, default=0.1, help="share of images that may miss the bound (default: 0.1)")
    add("--resplits", type=int, default=200, help="random splits that check the coverage (default: 200)")
    add("--out", type=Path, metavar="DIR", help="default: in the folder of the results")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("overrides", nargs="*", metavar="key=value", help="as for test.py: calibrate=temperature, gate=fit")
    return parser.parse_intermixed_args()


def measure(args: argparse.Namespace, here: World) -> Path | None:
    """Measure both splits, print and write; return the folder (None at other ranks)."""
    if not 0 < args.alpha < 1:
        raise ConfigError(
            f"--alpha {args.alpha:g} is invalid: expected a number between 0 and 1. Fix: --alpha 0.1"
        )
    if args.resplits < 1:
        raise ConfigError(
            f"--resplits {args.resplits} is invalid: expected an integer >= 1. Fix: --resplits 200"
        )
    network, cfg, checkpoint = load(args.resume, [*args.overrides, f"split={args.on}"])
    network = network.to(here.device)
    build.absolute_root(cfg)
    first, second = build.dataset(cfg, args.fit), build.dataset(cfg, args.on)
    check_classes(checkpoint, second.info.classes, args.resume)
    if first.fingerprint() == second.fingerprint():
        raise UserError(
            f"--fit {args.fit} and --on {args.on} are the same images, so the bound would not hold for others. "
            "Fix: name another split, such as dataset.splits.test=test."
        )
    fitter = Fitter(cfg, network, args.resume, here)
    to_probs = fitter.to_probs()
    rule = fitter.rules([args.predictor], second)[0][args.predictor]
    fitted, on = (
        record_masks(
            network, build.eval_loader(cfg, data, here), rule, to_probs, build.scoring(cfg, data.info), here,
            fitter.precision, f"{cfg.dataset.name} {split}",
        )
        for split, data in ((args.fit, first), (args.on, second))
    )  # fmt: skip
    found = numbers(fitted, on, args.alpha, args.resplits)
    margins = class_margins(fitted, args.alpha)
    settings = fitter.rule_settings(args.predictor)
    fitter.file.put(f"margin {args.alpha:g}", settings, {"image": found["margin"], "classes": margins}, {
        "split": cfg.dataset.splits[args.fit], "fingerprint": first.fingerprint(), "num_images": len(first),
    })  # fmt: skip
    fitter.save()
    if not here.is_main:
        return None
    results = results_folder(
        args.resume.name,
        cfg.protocol.results,
        threshold=build.threshold(cfg),
        calibrated=is_calibrated(cfg),
        focal_corrected=cfg.correct_focal,
        gate=cfg.gate,
    )
    folder = args.out or args.resume.resolve().parent / results / "confidence" / args.predictor
    about = {
        "rule": args.predictor,
        "fitted_on": {"split": args.fit, "fingerprint": first.fingerprint(), "images": fitted.names},
        "measured_on": {"split": args.on, "fingerprint": second.fingerprint(), "images": on.names},
        "settings": settings,
        "provenance": provenance(ROOT),
    }
    write_json(folder / "confidence.json", {"of": about, **found, "class_margins": margins})
    write_text(folder / "confidence.svg", draw(on))
    print(table(found, args))
    return folder


def numbers(fitted: MaskRecord, on: MaskRecord, alpha: float, resplits: int) -> dict[str, Any]:
    """Everything that is reported, for programs."""
    score, signals, old = on.dice(), on.signals(), fitted.signals()[EXACT]
    kept, old_kept = ~score.isnan(), ~fitted.dice().isnan()
    risk = 1 - score[kept]
    compared = compare_aurc({name: values[kept] for name, values in signals.items()}, risk, EXACT)
    margin = conformal_margin(old[old_kept], fitted.dice()[old_kept], alpha)
    exact = signals[EXACT][kept]
    both = torch.cat([old[old_kept], exact]), torch.cat([fitted.dice()[old_kept], score[kept]])
    coverages = resplit_coverages(*both, int(old_kept.sum()), alpha, splits=resplits)
    bound = exact - margin
    return {
        "alpha": alpha,
        "images": int(kept.sum()),
        "expected": float(exact.mean()),
        "achieved": float(score[kept].mean()),
        "correlation": _correlation(exact, score[kept]),
        "aurc": {name: one._asdict() for name, one in compared.items()},
        "aurc_without_order": aurc(torch.zeros(len(risk)), risk),
        "margin": margin,
        "coverage": float((score[kept] >= bound).double().mean()),
        "mean_bound": float(bound.clamp(min=0).mean()),
        "resplits": {
            "number": resplits,
            "mean": float(coverages.mean()),
            "from": float(coverages.quantile(0.05)),
            "to": float(coverages.quantile(0.95)),
        },
        "curves": {name: risk_coverage(v[kept], risk)[1].tolist() for name, v in signals.items()},
    }


def class_margins(record: MaskRecord, alpha: float) -> dict[str, float | None]:
    """The margin of each scored class over the images in which it is predicted, None if they are too few."""
    margins: dict[str, float | None] = {}
    for index in record.scored:
        known, dice = record.class_pairs(index)
        try:
            margins[str(index)] = conformal_margin(known, dice, alpha)
        except UserError:
            margins[str(index)] = None
    return margins


def _correlation(one: Tensor, other: Tensor) -> float:
    if len(one) < 2 or float(one.std()) == 0 or float(other.std()) == 0:
        return math.nan
    return float(torch.corrcoef(torch.stack([one.double(), other.double()]))[0, 1])


def table(found: dict[str, Any], args: argparse.Namespace) -> str:
    """The numbers for people, as Markdown."""
    lines = [
        f"{args.predictor}: expected Dice {100 * found['expected']:.2f}, achieved {100 * found['achieved']:.2f}, "
        f"correlation {found['correlation']:.3f}, {found['images']} images of {args.on}",
        "",
        "| order by | AURC [95 % bootstrap], percent | difference to expected Dice |",
        "| :-- | --: | --: |",
    ]
    for name, one in found["aurc"].items():
        low, high = (100 * end for end in one["interval"])
        worse, better = (-100 * end for end in reversed(one["gain_interval"]))
        lines.append(
            f"| {name} | {100 * one['aurc']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {-100 * one['gain']:+.2f} [{worse:+.2f}, {better:+.2f}] |"
        )
    lines += [
        f"| none | {100 * found['aurc_without_order']:.2f} | |",
        "",
        f"Bound at alpha={found['alpha']:g}, margin {found['margin']:.3f} from {args.fit}: "
        f"Dice >= expected Dice - margin on {found['coverage']:.1%} of {args.on}, "
        f"mean bound {100 * found['mean_bound']:.1f}.",
        f"Random splits of both, {found['resplits']['number']}: coverage {found['resplits']['mean']:.1%}, "
        f"90 % of them between {found['resplits']['from']:.1%} and {found['resplits']['to']:.1%}.",
    ]
    return "\n".join(lines)


def draw(record: MaskRecord) -> str:
    """The risk-coverage curves as SVG."""
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    score = record.dice()
    kept = ~score.isnan()
    figure, axes = pyplot.subplots(figsize=(6, 4))
    for name, values in record.signals().items():
        coverage, risk = risk_coverage(values[kept], 1 - score[kept])
        axes.plot(100 * coverage, 100 * risk, label=name, linestyle="--" if name == "oracle" else "-")
    axes.set(xlabel="images kept, most confident first (%)", ylabel="mean risk, 100 - Dice")
    axes.legend()
    axes.grid(alpha=0.3)
    text = io.StringIO()
    figure.savefig(text, format="svg", bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    return text.getvalue()


def main() -> None:
    """The command."""
    args = arguments()
    with join_world(args.device) as here:
        folder = measure(args, here)
        if folder:
            print(f"confidence: {folder}")


if __name__ == "__main__":
    run_cli(main)
