"""Score prediction rules on a checkpoint: one pass, every rule on the same probabilities.

``-r`` and ``-p`` belong to Hydra's own command line, so this is argparse in front of Hydra's compose.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from configs import build
from configs.checkpoint import load
from configs.cli import guarded, list_skipped
from configs.compose import options
from configs.files import require_writable
from rankseg.calibration import focal_correction
from trainers.calibrate import held_out_temperature
from trainers.distributed import World, world
from trainers.errors import explained
from trainers.evaluator import evaluate
from trainers.losses import Link
from trainers.reproducibility import provenance
from trainers.results import comparison, file_sha256, fingerprint, variant_folder

ROOT = Path(__file__).resolve().parent
ALL = ("T", "max", "rankdice")
EXAMPLES = """\
examples:
  python test.py -r saved/synthetic/tiny/ce/seed0/best_model.pth -p all
  python test.py -r RUN/best_model.pth -p rankdice -p T protocol=paper dataset.root=/data/Kvasir-SEG
  python test.py -r checkpoint-epoch300.pth -p rankdice dataset.root=/data/cityscapes      (the authors' files)

Everything else comes from the configuration stored in the checkpoint. Results go to results/ beside it
(results/paper/ under protocol=paper), with temperature= to calibrated/ in there, with correct_focal=true to
focal_corrected/, where T cuts at 0.3 to threshold_0.3/. Exit codes: 0 done, 2 bad input, 3 scoring failed (too
little memory, a dead or stalled loader process).
"""


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line; flags and overrides may mix."""
    parser = argparse.ArgumentParser(
        prog="test.py",
        description="Score prediction rules on a checkpoint: one pass, every rule on the same probabilities.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-r", "--resume", required=True, metavar="CHECKPOINT", type=Path, help="ours, or a released one"
    )
    parser.add_argument(
        "-p",
        "--predictor",
        action="append",
        metavar="RULE",
        help=f"may be repeated; `all` is T, max and rankdice. One of: {', '.join(options('predictor'))}",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--out", type=Path, help="folder for the results instead of the checkpoint's")
    parser.add_argument("--quiet", action="store_true", help="print the comparison only")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="such as split=val, protocol=paper, dataset.root=PATH",
    )
    return parser.parse_intermixed_args(argv)


def find_temperature(
    cfg: DictConfig, network: nn.Module, link: Link, where: World
) -> tuple[float, dict[str, Any]]:
    """The number in the configuration, or one fitted on the validation split, and what a result says of that."""
    if cfg.temperature != "fit":
        return float(cfg.temperature), {}
    data = build.dataset(cfg, "val")
    loader = build.eval_loader(cfg, data, where)
    fitted = held_out_temperature(network, loader, link, where, ignore_index=cfg.dataset.ignore_index)
    if where.is_main:
        print(f"temperature fitted on the validation split: {fitted:.3f}")
    return fitted, {"temperature_fitted_on": data.fingerprint()}


def score(args: argparse.Namespace, where: World) -> None:
    """Load, score, print and write."""
    network, cfg, checkpoint = load(args.resume, args.overrides)
    network = network.to(where.device)
    names = [rule for name in args.predictor or ["rankdice"] for rule in (ALL if name == "all" else (name,))]
    rules, threshold = build.rules(dict.fromkeys(names), cfg), build.threshold(cfg)
    build.absolute_root(cfg)
    data = build.dataset(cfg, cfg.split)
    variant = variant_folder(threshold, cfg.temperature != 1, cfg.correct_focal)
    folder = args.out or args.resume.resolve().parent / cfg.protocol.results / variant
    if where.is_main:
        require_writable(folder)
    criterion = build.loss(cfg)
    temperature, fitted = find_temperature(cfg, network, criterion.link, where)
    loader = build.eval_loader(cfg, data, where)
    with explained("scoring", "use a smaller batch_size or dataset.resize, or trainer.precision=bf16"):
        results = evaluate(
            network,
            loader,
            rules,
            criterion,
            build.scoring(cfg, data.info),
            where,
            temperature=temperature,
            correct=focal_correction if cfg.correct_focal else None,
            precision=cfg.trainer.precision,
            progress=f"{cfg.dataset.name} {cfg.split}",
        )
    if not where.is_main:
        return
    list_skipped(loader.skipped)
    details = {
        **build.describe(cfg, data, cfg.split),
        "link": criterion.link,
        "temperature": temperature,
        **fitted,
        "correct_focal": cfg.correct_focal,
        **({"threshold": threshold} if threshold != 0.5 else {}),
        "checkpoint": {
            "file": args.resume.name,
            "epoch": checkpoint["epoch"],
            "sha256": file_sha256(args.resume),
        },
        "provenance": provenance(ROOT),
    }
    free = {"seed", "checkpoint", "provenance"} | ({"temperature"} if fitted else set())  # within an average
    details["config_hash"] = fingerprint({k: v for k, v in details.items() if k not in free})
    for result in results.values():
        result.save(folder, details)
        if not args.quiet:
            print(result.block(cfg.model.name, cfg.loss.name), end="\n\n")
    print(comparison(results))
    if {"T", "rankdice"} <= set(results) and temperature == 1 and not cfg.correct_focal:
        dice = {name: result.scores["mean_dice"] for name, result in results.items()}
        if dice["rankdice"] < dice["T"]:
            more = " or correct_focal=true" if cfg.loss.name == "focal" else ""
            print(f"RankDice ranks true probabilities; these may be off: try temperature=fit{more}")
    print(f"results: {folder}")


def main() -> None:
    """The command."""
    args = arguments()
    with world(args.device) as where:
        score(args, where)


if __name__ == "__main__":
    guarded(main)
