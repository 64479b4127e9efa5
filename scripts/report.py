"""Write a run's report: one HTML page with scores, intervals, calibration, confidence, images and provenance.

    python scripts/report.py saved/synthetic/tiny/ce/seed0          writes RUN/report/index.html
    python scripts/report.py RUN -p T_fit -p pooled_dice -p auto    with fitted rules
    python scripts/report.py RUN protocol=paper --out report-paper
    python scripts/report.py checkpoint-epoch300.pth dataset.root=/data/cityscapes

The page needs no other file. Its images are also written to images/ as PNG files, and its numbers to report.json.
Exit codes: 0 done, 2 bad input, 3 the computation or the disk failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import build
from configs.cli import run_cli
from configs.compose import options
from configs.errors import ConfigError, one_line
from configs.files import file_sha256, read_json, write_json, write_text
from configs.fitting import Fitter
from scripts import ROOT
from scripts.analysis import page
from scripts.analysis.measure import THRESHOLDS, Findings, analyse, by_size, chosen_cutoffs, variants
from scripts.common import LoadedRun, add_run_options, check_least, command_line, load_run
from trainers.distributed import World, join_world
from trainers.journal import read_rows
from trainers.reproducibility import provenance

RULES = ("T", "max", "rankdice")


def parse_arguments() -> argparse.Namespace:
    """Parse the command line; flags and overrides may be mixed."""
    parser = command_line(__doc__)
    add_run_options(parser, "split=val, protocol=paper")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: report/ in the run's folder")
    parser.add_argument("--images", type=int, default=3, help="images in each group of the page (default: %(default)s)")
    about = f"rule to compare besides {', '.join(RULES)}; may be repeated. One of: {', '.join(options('predictor'))}"
    parser.add_argument("-p", "--predictor", action="append", default=[], metavar="RULE", help=about)
    args = parser.parse_intermixed_args()
    check_least(args, images=0)
    return args


def report(args: argparse.Namespace, world: World) -> Path:
    """Measure a run, and write its page with images and numbers; return the path of the page."""
    names = list(dict.fromkeys((*RULES, *args.predictor)))
    run = load_run(args.run, args.overrides, world.device, names)
    path, network, cfg, checkpoint, data = run
    if cfg.temperature != 1 or cfg.correct_focal:  # the report compares calibrated probabilities itself
        raise ConfigError(
            f"report.py shows the probabilities of the network: temperature={cfg.temperature} and "
            f"correct_focal={cfg.correct_focal} would change them. Fix: pass temperature=1 correct_focal=false."
        )
    for name in names:
        build.rule_node(name, cfg)  # an unknown name is reported before anything is fitted

    fitters = (
        (kind, Fitter(cast(DictConfig, OmegaConf.merge(cfg, options)), network, path, world))
        for kind, options in variants(cfg).items()
    )
    on_validation = cfg.dataset.splits[cfg.split] == cfg.dataset.splits["val"]
    held_out = None if on_validation else build.dataset(cfg, "val")
    findings, confidence, rules, fitted = analyse(fitters, names, data, held_out)
    folder = args.out or path.resolve().parent / "report"
    groups = page.choose_images(findings, args.images)
    indices = [index for picked in groups.values() for index in picked]
    strips = page.draw_strips(Fitter(cfg, network, path, world), data, rules, findings, indices, folder / "images")
    title = f"{cfg.dataset.name} · {cfg.model.name}{cfg.suffix} · {cfg.loss.name} · seed {cfg.seed}"
    lead = [
        f"Split {cfg.split}, {len(findings.names)} images, protocol {cfg.protocol.name}, checkpoint of epoch "
        f"{checkpoint['epoch']}. All rules see the same probabilities: T selects pixels with a probability of at least "
        f"{build.threshold(cfg):g}, max the most likely class, rankdice the mask with the largest expected Dice.",
        *fitted,
    ]
    if on_validation:
        lead.append(
            "These are the validation images: best_model.pth was chosen and the temperature was fitted on them. Expect "
            "lower scores on new images."
        )
    more: dict[str, page.Section] = {
        "images": {heading: [strips[index] for index in picked] for heading, picked in groups.items()},
        "learning": page.learning_section(read_rows(path.parent / "metrics.jsonl")),
        "provenance": describe_run(run),
    }
    origin = {"checkpoint": file_sha256(path), "protocol": cfg.protocol.name, "split": cfg.split}
    return write(folder, title, lead, findings, confidence, data.info.classes, names, more, origin)


def write(
    folder: Path,
    title: str,
    lead: Sequence[str],
    findings: Findings,
    confidence: dict[str, Any],
    classes: Sequence[str],
    rules: Sequence[str],
    more: Mapping[str, page.Section],
    origin: dict[str, Any],
) -> Path:
    """Write the page and its numbers into the folder; return the path of the page.

    Args:
        confidence: the result of `assess`.
        classes: the names of all classes.
        rules: the rules to show.
        more: the sections after those of this function, by anchor.
        origin: what was measured; report.json has it as "of".
    """
    scores, gains = page.score_rules(findings, rules), page.compare_rules(findings, rules)
    sections = {
        "scores": page.score_section(scores),
        "differences": page.difference_section(gains),
        "classes": page.class_section(findings, classes, rules),
        "gain": page.gain_section(findings, rules),
        "calibration": page.calibration_section(findings, classes),
        "confidence": page.confidence_section(confidence),
        **more,
    }
    target = folder / "index.html"
    write_text(target, page.render(title, lead, sections))
    found: dict[str, Any] = {"scores": scores, "gains": {f"rankdice - {rule}": one for rule, one in gains.items()}}
    write_json(folder / "report.json", {"of": origin, **found, **numbers(findings, rules), "confidence": confidence})
    return target


def numbers(findings: Findings, rules: Sequence[str]) -> dict[str, Any]:
    """Return the numbers of the sections "gain" and "calibration" for report.json."""
    return {
        "void": {v: {r: findings.mean(r, "raw", v) / 100 for r in rules} for v in ("masked", "counted")},
        "size": [{"group": name, "pairs": n, "dice": means} for name, n, means in by_size(findings, rules)],
        "probabilities": {
            kind: {
                "ece": one.ece(),
                "volume_ratio": one.volume_ratio().tolist(),
                "mean_dice": {r: findings.mean(r, kind) / 100 for r in rules},
            }
            for kind, one in findings.reliability.items()
        },
        "temperature": findings.temperature,
        "threshold": {f"at {at:.1f}": findings.mean(f"at {at:.1f}") / 100 for at in THRESHOLDS},
        "cutoffs": [round(at, 4) for at in chosen_cutoffs(findings).tolist()],
        "images": findings.names,
    }


def describe_run(run: LoadedRun) -> dict[str, Any]:
    """Return the origin of the numbers: the checkpoint, its training, and this report."""
    path, _, cfg, checkpoint, data = run
    stored = path.parent / "provenance.json"
    trained = read_json(stored) if stored.exists() else {}
    return {
        "checkpoint": f"{path.name}, epoch {checkpoint['epoch']}",
        "data": f"{cfg.dataset.name} {cfg.split}, {len(data)} images, fingerprint {data.fingerprint()}",
        "model": ", ".join(f"{key} {value}" for key, value in cfg.model.items() if not key.startswith("_")),
        "loss": cfg.loss.name,
        "threshold of T": build.threshold(cfg),
        "training": f"{cfg.epochs} epochs, batch {cfg.batch_size}, seed {cfg.seed}",
        "trained by": trained.get("command"),
        "date of the training": trained.get("date"),
        "code of the training": trained.get("git_sha"),
        "hardware of the training": trained.get("hardware"),
        **describe_report(),
    }


def describe_report() -> dict[str, Any]:
    """Return the command, date, code and library versions of this report."""
    now = provenance(ROOT)
    return {
        "report by": now["command"],
        "date of the report": now["date"],
        "code of the report": now["git_sha"],
        "versions": ", ".join(f"{name} {version}" for name, version in now["versions"].items()),
    }


def main() -> None:
    args = parse_arguments()
    with join_world(args.device) as world:
        print(one_line(f"report: {report(args, world)}"))


if __name__ == "__main__":
    run_cli(main)
