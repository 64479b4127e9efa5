"""Write a run's report: one HTML page with scores, intervals, calibration, confidence, images and provenance.

    python scripts/report.py saved/synthetic/tiny/ce/seed0                     writes RUN/report/index.html
    python scripts/report.py RUN protocol=paper --out report-paper
    python scripts/report.py checkpoint-epoch300.pth dataset.root=/data/cityscapes

The page needs no other file. The same folder gets its images as PNG files and its numbers as report.json.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import build
from configs.checkpoint import check_classes, load
from configs.cli import run_cli
from configs.files import read_json, write_json, write_text
from configs.fitting import Fitter
from configs.values import check_uncalibrated
from scripts import ROOT
from scripts.analysis import page
from scripts.analysis.measure import (
    Findings,
    Key,
    by_size,
    chosen_cutoffs,
    measure,
    variants,
)
from scripts.analysis.pictures import draw_strips, pick
from trainers.distributed import World, join_world
from trainers.journal import read_rows
from trainers.losses import Link
from trainers.reproducibility import provenance
from trainers.results import file_sha256
from trainers.selective import record_masks

RULES = ("T", "max", "rankdice")


def arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may be mixed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report/ in the run's folder")
    parser.add_argument("--images", type=int, default=3, help="images of each kind (default: %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="as for test.py: split=val, protocol=paper"
    )
    return parser.parse_intermixed_args()


def report(args: argparse.Namespace, world: World) -> Path:
    """Measure, draw and write; return the path of the page."""
    path = args.run / "best_model.pth" if args.run.is_dir() else args.run
    network, cfg, checkpoint = load(path, args.overrides)
    check_uncalibrated(cfg, "report.py")  # the report compares calibrated probabilities itself
    network = network.to(world.device).eval()
    build.absolute_root(cfg)
    data, link = build.dataset(cfg, cfg.split), cast(Link, build.loss(cfg).link)
    check_classes(checkpoint, data.info.classes, path)
    scoring, rules = build.scoring(cfg, data.info), build.rules(RULES, cfg)
    loader = build.eval_loader(cfg, data, world)
    held_out = build.eval_loader(cfg, build.dataset(cfg, "val"), world)
    fitter = Fitter(cfg, network, path, world)
    fitted = cast(float, fitter.calibration("temperature"))
    kinds = variants(link, fitted, cfg.loss.name)
    if fitter.kind == "class":
        kinds["calibrated per class"] = fitter.to_probs()
    fitter.save()
    precision = fitter.precision
    findings = measure(network, loader, rules, kinds, scoring, world, fitted, precision)
    on_validation = cfg.dataset.splits[cfg.split] == cfg.dataset.splits["val"]
    known = None
    if not on_validation:
        record = record_masks(
            network, held_out, rules["rankdice"], kinds["raw"], scoring, world, precision, "validation images"
        )
        has_dice = ~record.dice().isnan()
        known = record.signals()["expected Dice"][has_dice], record.dice()[has_dice]

    folder = args.out or path.resolve().parent / "report"
    groups = pick(findings, args.images)
    indices = [index for picked in groups.values() for index in picked]
    strips = draw_strips(
        network, data, loader.transform, rules, link, world, findings, indices, folder / "images", precision
    )
    scores, gains = page.score_rules(findings, RULES), page.compare_rules(findings, RULES)
    confidence = page.assess_confidence(findings, known)
    title = f"{cfg.dataset.name} · {cfg.model.name}{cfg.suffix} · {cfg.loss.name} · seed {cfg.seed}"
    lead = [
        f"Split {cfg.split}, {len(findings.names)} images, protocol {cfg.protocol.name}, checkpoint of epoch "
        f"{checkpoint['epoch']}. All rules see the same probabilities: T selects pixels with at least "
        f"{build.threshold(cfg):g}, max the most likely class, rankdice the mask with the largest expected Dice."
    ]
    if on_validation:
        lead.append(
            "These are the validation images: they also chose the checkpoint and the temperature. Expect lower "
            "scores on new images."
        )
    sections = [
        page.score_section(scores),
        page.difference_section(gains),
        page.class_section(findings, data.info.classes, RULES),
        page.gain_section(findings, RULES),
        page.calibration_section(findings, data.info.classes),
        page.confidence_section(confidence),
        page.picture_section(groups, strips),
        page.learning_section(read_rows(path.parent / "metrics.jsonl")),
        page.fact_section(facts(cfg, path, checkpoint, data)),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "index.html"
    write_text(target, page.render(title, lead, page.lead_cards(scores, gains), sections))
    of = {"checkpoint": file_sha256(path), "protocol": cfg.protocol.name, "split": cfg.split}
    write_json(folder / "report.json", {"of": of, **numbers(findings, scores, gains, confidence)})
    return target


def numbers(
    findings: Findings, scores: dict[str, Any], gains: dict[str, Any], confidence: dict[str, Any]
) -> dict[str, Any]:
    """Return the numbers of the page, for programs."""
    return {
        "scores": scores,
        "gains": {f"rankdice - {rule}": one for rule, one in gains.items()},
        "void": {v: {r: findings.mean(Key(r, "raw", v)) / 100 for r in RULES} for v in ("masked", "counted")},
        "size": [{"group": name, "pairs": n, "dice": means} for name, n, means in by_size(findings, RULES)],
        "probabilities": {
            kind: {
                "ece": one.ece(),
                "volume_ratio": one.volume_ratio().tolist(),
                "mean_dice": {r: findings.mean(findings.key(r, kind)) / 100 for r in RULES},
            }
            for kind, one in findings.reliability.items()
        },
        "temperature": findings.temperature,
        "threshold": {
            key.rule: findings.mean(key) / 100 for key in findings.counts if key.rule.startswith("at ")
        },
        "cutoffs": [round(at, 4) for at in chosen_cutoffs(findings).tolist()],
        "confidence": {key: value for key, value in confidence.items() if key != "risk_coverage"},
        "images": findings.names,
    }


def facts(cfg: Any, path: Path, checkpoint: dict[str, Any], data: Any) -> dict[str, Any]:
    """Return where the numbers came from: the checkpoint, its training, and this report."""
    stored = path.parent / "provenance.json"
    trained = read_json(stored) if stored.exists() else {}
    now = provenance(ROOT)
    versions = ", ".join(f"{name} {version}" for name, version in now["versions"].items())
    return {
        "checkpoint": f"{path.name}, epoch {checkpoint['epoch']}",
        "data": f"{cfg.dataset.name} {cfg.split}, {len(data)} images, fingerprint {data.fingerprint()}",
        "model": ", ".join(f"{key} {value}" for key, value in cfg.model.items() if not key.startswith("_")),
        "loss": cfg.loss.name,
        "threshold of T": build.threshold(cfg),
        "training": f"{cfg.epochs} epochs, batch {cfg.batch_size}, seed {cfg.seed}",
        "trained by": trained.get("command"),
        "trained on": trained.get("date"),
        "code of the training": trained.get("git_sha"),
        "hardware of the training": trained.get("hardware"),
        "report by": now["command"],
        "report on": now["date"],
        "code of the report": now["git_sha"],
        "versions": versions,
    }


def main() -> None:
    """Run the command."""
    args = arguments()
    with join_world(args.device) as here:
        print(f"report: {report(args, here)}")


if __name__ == "__main__":
    run_cli(main)
