"""A run on one page: scores with intervals, what explains the gain, images, learning curves, provenance.

    python scripts/report.py saved/synthetic/tiny/ce/seed0                     writes RUN/report/index.html
    python scripts/report.py RUN protocol=paper --out report-paper
    python scripts/report.py checkpoint-epoch300.pth dataset.root=/data/cityscapes

The page needs no other file; beside it lie its images as PNG and its numbers as report.json.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import json
import sys
from html import escape
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import build
from configs.checkpoint import load
from configs.cli import guarded
from configs.files import write_json
from configs.values import check_uncalibrated
from scripts import ROOT
from scripts.reporting import explain, sections
from scripts.reporting.measure import Findings, Key, by_size, chosen_cutoffs, measure, variants
from scripts.reporting.page import html_page
from scripts.reporting.pictures import pick, strips
from trainers.calibrate import held_out_temperature
from trainers.distributed import World, world
from trainers.journal import read_rows
from trainers.losses import Link
from trainers.reproducibility import provenance
from trainers.results import file_sha256

RULES = ("T", "max", "rankdice")


def arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may mix."""
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


def report(args: argparse.Namespace, where: World) -> Path:
    """Measure, draw and write; return the page's path."""
    path = args.run / "best_model.pth" if args.run.is_dir() else args.run
    network, cfg, checkpoint = load(path, args.overrides)
    check_uncalibrated(cfg, "report.py")  # it compares calibrated ones of its own with them
    network = network.to(where.device).eval()
    build.absolute_root(cfg)
    data, link = build.dataset(cfg, cfg.split), cast(Link, build.loss(cfg).link)
    scoring, rules = build.scoring(cfg, data.info), build.rules(RULES, cfg)
    loader = build.eval_loader(cfg, data, where)
    held_out = build.eval_loader(cfg, build.dataset(cfg, "val"), where)
    fitted = held_out_temperature(network, held_out, link, where, ignore_index=scoring.ignore_index)
    ways = variants(link, fitted, cfg.loss.name)
    findings = measure(network, loader, rules, ways, scoring, where, fitted)

    folder = args.out or path.resolve().parent / "report"
    groups = pick(findings, args.images)
    drawn = strips(
        network,
        data,
        loader.transform,
        rules,
        link,
        where,
        findings,
        [index for picked in groups.values() for index in picked],
        folder / "images",
    )
    table, differences = sections.scores(findings, RULES), sections.gains(findings, RULES)
    title = f"{cfg.dataset.name} · {cfg.model.name}{cfg.suffix} · {cfg.loss.name} · seed {cfg.seed}"
    split, protocol, epoch = (escape(str(v)) for v in (cfg.split, cfg.protocol.name, checkpoint["epoch"]))
    about = (
        f"Split <b>{split}</b>, {len(findings.names)} images, protocol <b>{protocol}</b>, "
        f"checkpoint of epoch {epoch}. One forward pass; every rule on the same probabilities: "
        f"T keeps what is at least {build.threshold(cfg):g}, max takes the likeliest class, rankdice the mask of the "
        "largest expected Dice."
    )
    if cfg.dataset.splits[cfg.split] == cfg.dataset.splits["val"]:
        about += " <b>The same images chose the checkpoint and the temperature</b>: expect less on new ones."
    body = [
        ("scores", "Scores", sections.score_section(table)),
        (
            "differences",
            "RankDice against the others, image by image",
            sections.difference_section(differences),
        ),
        ("classes", "Classes", sections.class_section(findings, data.info.classes, RULES)),
        ("gain", "What explains the gain", explain.explain_section(findings, RULES)),
        ("calibration", "Calibration", explain.reliability_section(findings)),
        ("images", "Images", sections.picture_section(groups, drawn)),
        ("learning", "Learning", sections.learning_section(read_rows(path.parent / "metrics.jsonl"))),
        ("provenance", "Provenance", sections.fact_section(facts(cfg, path, checkpoint, data))),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    page.write_text(html_page(title, sections.lead(table, differences, about), body), encoding="utf-8")
    of = {"checkpoint": file_sha256(path), "protocol": cfg.protocol.name, "split": cfg.split}
    write_json(folder / "report.json", {"of": of, **numbers(findings, table, differences)})
    return page


def numbers(findings: Findings, table: dict[str, Any], differences: dict[str, Any]) -> dict[str, Any]:
    """What the page says, for programs."""
    return {
        "scores": table,
        "gains": {f"rankdice - {rule}": one for rule, one in differences.items()},
        "void": {v: {r: findings.mean(Key(r, "raw", v)) / 100 for r in RULES} for v in ("masked", "counted")},
        "size": [{"group": name, "pairs": n, "dice": means} for name, n, means in by_size(findings, RULES)],
        "probabilities": {
            kind: {
                "ece": one.ece(),
                "mean_dice": {r: findings.mean(findings.key(r, kind)) / 100 for r in RULES},
            }
            for kind, one in findings.reliability.items()
        },
        "temperature": findings.temperature,
        "threshold": {
            key.rule: findings.mean(key) / 100 for key in findings.counts if key.rule.startswith("at ")
        },
        "cutoffs": [round(at, 4) for at in chosen_cutoffs(findings).tolist()],
        "images": findings.names,
    }


def facts(cfg: Any, path: Path, checkpoint: dict[str, Any], data: Any) -> dict[str, Any]:
    """Where the numbers came from: the checkpoint, its training, and this report."""
    beside = path.parent / "provenance.json"
    trained = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
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
    """The command."""
    args = arguments()
    with world(args.device) as where:
        print(f"report: {report(args, where)}")


if __name__ == "__main__":
    guarded(main)
