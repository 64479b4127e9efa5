"""Score prediction rules on a checkpoint, all on the same probabilities.

Hydra uses ``-r`` and ``-p`` itself, so this command parses its own arguments and passes the others to Hydra's compose.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from configs import build
from configs.checkpoint import check_classes, load
from configs.cli import list_skipped, run_cli
from configs.compose import options
from configs.errors import as_training_error, one_line
from configs.files import file_sha256, require_writable
from configs.fitting import Fitter, folder_of_results, is_calibrated
from configs.stored import chosen_rules
from trainers.distributed import World, join_world
from trainers.evaluator import evaluate
from trainers.reproducibility import provenance
from trainers.results import comparison_table, fingerprint

ROOT = Path(__file__).resolve().parent
ALL = ("T", "T_fit", "max", "rankdice", "rankiou", "pooled_dice")
EXAMPLES = """\
examples:
  python test.py -r saved/synthetic/tiny/ce/seed0/best_model.pth -p all
  python test.py -r RUN/best_model.pth -p rankdice -p T protocol=paper dataset.root=/data/Kvasir-SEG
  python test.py -r RUN/best_model.pth -p T_fit predictor.per_class=true
  python test.py -r checkpoint-epoch300.pth -p rankdice dataset.root=/data/cityscapes      (the authors' files)

Keys that are not given have the values stored in the checkpoint. Without -p, predictor=RULE chooses the rule (default:
rankdice). predictor.KEY=VALUE is an option of the rule of -p; of several, of that in predictor=RULE.
Results of best_model.pth are written to results/ next to it (results/paper/ under protocol=paper), those of last.pth to
results/of_last/. Options have sub-folders there: calibrated/ (calibrate=temperature or temperature=NUMBER),
calibrated_class/ (calibrate=class), focal_corrected/ (correct_focal=true), gate_fit/ (gate=fit), threshold_0.3/
(threshold=0.3), T_fit_per_class_true/ (-p T_fit predictor.per_class=true),
protocol_void_counted/ (protocol.void=counted).
T_fit, auto, calibrate and gate=fit are fitted on the validation split. pooled_dice and pooled_iou are fitted on the
scored split without labels. The values are kept in NAME.fitted.json next to NAME.pth.
Exit codes: 0 done, 2 bad input, 3 scoring failed (too little memory, a dead or stalled loader process).
"""


def arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may mix."""
    parser = argparse.ArgumentParser(
        prog="test.py",
        description="Score prediction rules on a checkpoint, all on the same probabilities.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "-r",
        "--resume",
        required=True,
        metavar="CHECKPOINT",
        type=Path,
        help="file that train.py wrote, or one that the authors of the paper released",
    )
    rules = f"may be repeated; `all` is {', '.join(ALL)}. One of: {', '.join(options('predictor'))}"
    parser.add_argument("-p", "--predictor", action="append", metavar="RULE", help=rules)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    parser.add_argument("--out", type=Path, help="folder for the results instead of the checkpoint's")
    parser.add_argument("--quiet", action="store_true", help="print the comparison only")
    overrides = "such as split=val, protocol=paper, dataset.root=PATH"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)
    return parser.parse_intermixed_args()


def score(args: argparse.Namespace, world: World) -> None:
    """Load a checkpoint, score the rules, write the results and print them."""
    given = args.predictor or chosen_rules(args.overrides) or ["rankdice"]
    names = [rule for name in given for rule in (ALL if name == "all" else (name,))]
    network, cfg, checkpoint = load(args.resume, args.overrides, names)
    network = network.to(world.device)
    for name in names:
        build.rule_node(name, cfg)  # report an unknown name before anything is fitted
    threshold, options = build.threshold(cfg), build.changed_options(names, cfg)
    build.make_root_absolute(cfg)
    data = build.dataset(cfg, cfg.split)
    check_classes(checkpoint, data.info.classes, args.resume)
    folder = args.out or folder_of_results(args.resume, cfg, names)
    if world.is_main:
        require_writable(folder)
    criterion = build.loss(cfg)
    with as_training_error("scoring"):
        fitter = Fitter(cfg, network, args.resume, world)
        rules, fitted = fitter.rules(dict.fromkeys(names), data)
        fitter.save()
        loader = build.eval_loader(cfg, data, world)
        results = evaluate(
            network, loader, rules, criterion, build.scoring(cfg, data.info), world, to_probs=fitter.to_probs(),
            confidences=True, precision=cfg.trainer.precision, progress=f"{cfg.dataset.name} {cfg.split}",
        )  # fmt: skip
    if not world.is_main:
        return
    list_skipped(loader.skipped)
    details = {
        **build.describe(cfg, data, cfg.split),
        "contents": data.checksum(),
        "link": criterion.link,
        **fitter.describe_calibration(),
        **fitter.describe_focal(),
        **({"threshold": threshold} if threshold != 0.5 else {}),
        **({"gate": cfg.gate} if cfg.gate != 0.5 else {}),
        **({"options": options} if options else {}),
        "checkpoint": {"file": args.resume.name, "epoch": checkpoint["epoch"], "sha256": file_sha256(args.resume)},
        "provenance": provenance(ROOT),
    }
    # Values that differ between the seeds of one experiment, or that records of an earlier version lack.
    not_hashed = {"seed", "checkpoint", "provenance", "contents"}
    not_hashed |= {"temperature", "calibration"} if fitter.kind != "none" else set()
    details["config_hash"] = fingerprint({k: v for k, v in details.items() if k not in not_hashed})
    for name, result in results.items():
        result.save(folder, {**details, **({"fitted": fitted[name]} if name in fitted else {})})
        if not args.quiet:
            print(result.block(cfg.model.name, cfg.loss.name), end="\n\n")
    for line in fitter.report(fitted, data):
        print(line)
    print(comparison_table(results))
    dice = {name: result.scores["mean_dice"] for name, result in results.items()}
    raw = not is_calibrated(cfg) and not cfg.correct_focal
    if raw and dice.get("rankdice", 1.0) < dice.get("T", 0.0):
        more = " or correct_focal=true" if cfg.loss.name == "focal" else ""
        print(f"RankDice needs calibrated probabilities; try calibrate=temperature or calibrate=class{more}")
    print(one_line(f"results: {folder}"))


def main() -> None:
    args = arguments()
    with join_world(args.device) as world:
        score(args, world)


if __name__ == "__main__":
    run_cli(main)
