"""Turn saved probabilities of any framework into masks; with labels, score them.

    python scripts/decode.py probs/ -p rankdice --out decoded/
    python scripts/decode.py probs/ --labels labels/ -p max -p rankdice_nonoverlap --out decoded/
    python scripts/decode.py logits/ --link softmax -p max -p rankdice --out decoded/
    python scripts/decode.py nnunet_predictions/ --labels labelsTs/ -p max -p rankdice_nonoverlap --out decoded/
    python scripts/decode.py probs/ --labels labels/ --fit val_probs/ val_labels/ --calibrate temperature \
        -p T -p T_fit -p rankdice --report --out decoded/

PROBS holds one file per case: .npy, .npz, .nii, .nii.gz, .tif, or nnU-Net's .npz with .pkl; 2-D or 3-D, the classes as
first or last axis. LABELS and the optional --valid folder hold one file of the same name per case; labels may also
be .png. The result of a rule is in OUT/RULE/, in the format of the case:
    labels   one integer per pixel, for one class and for rules whose masks do not overlap (max, rankdice_nonoverlap)
    masks    (classes, *S) bool, for rules whose masks may overlap; NIfTI: uint8 with the classes as last axis
--write labels or --write masks changes that. NIfTI files keep affine and header. Scores are those of what is written.

With labels, OUT/results/ has the scores, OUT/paired_statistics.md compares every rule with the first one case by case,
and --report writes OUT/report/index.html. --fit names a second folder of labelled cases. The rules T_fit and auto and
--calibrate are fitted on it; values and origin are stored in OUT/decode.fitted.json. pooled_dice and pooled_iou are
fitted on PROBS without labels. Fitting and --report hold a case in memory as a whole.

With one channel, or with --foreground-only, label 0 is the background and the channels are the labels 1, 2, ….
The same command again continues where it was stopped. Exit codes: 0 done, 1 some cases failed (listed at the end),
2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

import torch
from tqdm import tqdm

from configs.cli import run_cli
from configs.compose import options
from configs.errors import UserError, one_line
from configs.files import read_json, require_writable, write_json, write_text
from rankseg.calibration import Reliability
from scripts import ROOT
from scripts.analysis.scores import compare, read_rule
from scripts.common import ahead
from scripts.decoding.arrays import LABEL_SUFFIXES, write_array
from scripts.decoding.cases import Case, FromStored, Reading, find_cases, load_case, named
from scripts.decoding.labelled import Folder, FolderFitter, configuration, write_report
from scripts.decoding.rules import (
    Output,
    counts_from_plain,
    counts_to_plain,
    decode,
    reliability_from_plain,
    reliability_to_plain,
)
from scripts.paired_statistics import markdown
from trainers.distributed import pick_device
from trainers.evaluator import Scoring
from trainers.metrics import Counts
from trainers.reproducibility import provenance
from trainers.results import EvalResult, comparison, fingerprint
from trainers.text import csv_text

SOME_FAILED = 1
VERSION = 2  # of the records; another one decodes again


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    args = _arguments(argv)
    require_writable(args.out)
    cases = find_cases(args.probs)
    job = Job(args, cases)
    failed = {f"--fit {name}": problem for name, problem in job.fit.failed.items()} if job.fit else {}
    todo = [name for name in cases if args.force or not job.is_done(name)]
    with tqdm(total=len(todo), desc="decode", unit="case", disable=True if args.quiet else None) as bar:
        for name, problem in zip(todo, ahead(job, todo, args.workers), strict=True):
            if problem:
                failed[name] = problem
            bar.update()
    done = [name for name in cases if name not in failed]
    before, decoded = len(cases) - len(todo), sum(name not in failed for name in todo)
    parts = [f"{decoded} cases decoded with {', '.join(job.rules)}"]
    parts += [f"{before} done before"] * bool(before) + [f"{len(failed)} failed"] * bool(failed)
    for line in job.fitter.report(job.fitted, job.scored):  # type: ignore[arg-type]
        print(line)
    if args.confidence and done:
        job.write_confidence(done)
    if args.labels and done:
        scored = [name for name in done if name not in failed]
        print(comparison(job.score(done, failed)))
        print(f"results: {args.out / 'results'}")
        if len(job.rules) > 1:
            print(job.compare())
        if args.report:
            print(f"report: {job.report([name for name in scored if name not in failed])}")
    print(one_line(f"{args.out}: {', '.join(parts)}"))
    for problem in failed.values():
        print(one_line(f"  {problem}"), file=sys.stderr)
    return SOME_FAILED if failed else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("probs", type=Path, metavar="PROBS", help="folder of probabilities, or one file")
    add("-p", "--predictor", action="append", required=True, metavar="RULE",
        help=f"may be repeated; one of: {', '.join(options('predictor'))}")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--labels", type=Path, metavar="FOLDER", help="true labels: scores are computed and written")
    add("--valid", type=Path, metavar="FOLDER", help="fields of view: pixels of value 0 are void")
    add("--link", choices=("softmax", "sigmoid"), help="PROBS holds logits; this turns them into probabilities")
    add("--temperature", type=float, default=1.0, help="divides the logits; 1: unchanged")
    add("--fit", type=Path, nargs=2, metavar=("PROBS", "LABELS"), help="labelled cases to fit on; see above")
    add("--calibrate", choices=("none", "temperature", "class"), default="none",
        help="calibration of the logits, fitted on the cases of --fit (default: none)")  # fmt: skip
    add("--classes-axis", choices=("auto", "first", "last", "none"), default="auto",
        help="axis that holds the classes (default: found from the labels or the sums)")  # fmt: skip
    add("--key", metavar="NAME", help="the array of .npz files that hold several")
    add("--write", choices=("auto", "labels", "masks"), default="auto", help="see above")
    add("--unassigned", default="void", metavar="void|max|K",
        help="label of pixels without a class: 255, the most probable class, or K (default: void)")  # fmt: skip
    add("--void", type=int, default=255, metavar="K", help="label that is not scored (default: 255)")
    add("--foreground-only", action="store_true", help="label 0 is background and has no channel")
    add("--scored", metavar="1,2,…", help="labels that the means run over (default: all with a channel)")
    add("--names", metavar="A,B,…", help="names of the labels 0, 1, … for reports")
    add("--confidence", action="store_true", help="write the expected Dice of every mask, without labels too")
    add("--report", action="store_true", help="with labels: write an HTML report of T, max and rankdice")
    add("--workers", type=int, default=1, help="cases decoded at the same time (default: 1)")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: cpu)")
    add("--force", action="store_true", help="decode again what is done")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.predictor = list(dict.fromkeys(args.predictor))
    if args.unassigned not in ("void", "max"):
        args.unassigned = _integers("--unassigned", args.unassigned)[0]
        if not -(2**31) <= args.unassigned < 2**31:
            raise UserError(f"--unassigned {args.unassigned} is invalid: expected an integer of 32 bits.")
    if not -(2**31) <= args.void < 2**31:
        raise UserError(f"--void {args.void} is invalid: expected an integer of 32 bits.")
    args.scored = None if args.scored is None else _integers("--scored", args.scored)
    if not args.temperature > 0:
        raise UserError(f"--temperature {args.temperature:g} is invalid: expected a number above 0.")
    if args.report and not args.labels:
        raise UserError("--report needs labels. Fix: pass --labels FOLDER.")
    if args.workers < 1:
        raise UserError(f"--workers {args.workers} is invalid: expected an integer >= 1.")
    return args


def _integers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text} is invalid: expected integers, such as 1,2.") from None


class Job:
    """Decode cases by name and keep a record of each, so that a second call continues."""

    def __init__(self, args: argparse.Namespace, cases: dict[str, Path]) -> None:
        self.args, self.cases = args, cases
        self._refuse_folders_that_are_read()
        self.labels = find_cases(args.labels, LABEL_SUFFIXES) if args.labels else None
        self.valid = find_cases(args.valid, LABEL_SUFFIXES) if args.valid else None
        self.device = pick_device(args.device)
        only = args.foreground_only or None
        self.output = Output(args.write, args.unassigned, only, args.void, args.confidence, args.link)
        values = FromStored(args.link, args.temperature, args.foreground_only)
        reading = Reading(args.out, values, args.classes_axis, args.key, args.void)
        self.scored = Folder(cases, self.labels, self.valid, reading, self.output, args.scored)
        self.fit = None
        if args.fit:
            folders = find_cases(args.fit[0]), find_cases(args.fit[1], LABEL_SUFFIXES)
            self.fit = Folder(*folders, None, reading, self.output, args.scored)
        settings = {"axis": args.classes_axis, "key": args.key, "link": args.link, "foreground_only": only}
        cfg = configuration(args.probs, args.fit and args.fit[0], args.void, args.calibrate, args.temperature)
        self.fitter = FolderFitter(args.out, self.fit, values, settings | {"scored": args.scored}, cfg, self.device)
        self.rules, self.fitted = self.fitter.rules(args.predictor, self.scored)  # type: ignore[arg-type]
        self.reading = dataclasses.replace(reading, values=self.fitter.to_probs())
        self.calibration = self.fitter.describe_calibration()
        settings |= {"version": VERSION, "rules": args.predictor, **dataclasses.asdict(self.output)}
        settings |= {"void": args.void, "labels": bool(args.labels), "valid": bool(args.valid), **self.calibration}
        settings |= {"fitted": self.fitted}
        self.settings = fingerprint(settings)
        self._refuse_other_settings()
        self.fitter.save()

    def _refuse_folders_that_are_read(self) -> None:
        for given in (self.args.probs, self.args.labels, self.args.valid, *(self.args.fit or ())):
            if given is not None and self.args.out.resolve() == given.resolve():
                raise UserError(f"--out {self.args.out} is a folder that is read. Fix: choose another one.")

    def _refuse_other_settings(self) -> None:
        """Raise UserError if OUT holds results of other settings."""
        path = self.args.out / "decode.json"
        if path.is_file() and not self.args.force and read_json(path).get("settings") != self.settings:
            raise UserError(
                f"{self.args.out} holds results of other rules or options. "
                "Fix: choose another --out, or pass --force to replace them."
            )
        write_json(path, {"settings": self.settings, "rules": self.args.predictor})

    def record(self, name: str) -> Path:
        """Return the file that says that a case is done, and holds its counts."""
        return self.args.out / ".cases" / f"{name}.json"

    def is_done(self, name: str) -> bool:
        """Whether a case was decoded from the same files with the same settings."""
        if not self.record(name).is_file():
            return False
        record = read_json(self.record(name))
        return (
            record.get("settings") == self.settings
            and record.get("sources") == self.scored.sources(name)
            and all(Path(path).is_file() for path in record["written"])
        )

    def __call__(self, name: str) -> str | None:
        """Decode and write a case; return what is wrong with it, or None."""
        try:
            self._decode(name)
        except UserError as error:
            return str(error)
        return None

    def _decode(self, name: str) -> None:
        path = self.cases[name]
        sources = [(self.args.labels, self.labels, "label"), (self.args.valid, self.valid, "field of view")]
        for folder, group, kind in sources:
            if group is not None and name not in group:
                raise UserError(f"{path}: no {kind} {folder / name}.*. Fix: add it, or move the case away.")
        label = self.labels[name] if self.labels else None
        case = load_case(path, label, self.valid[name] if self.valid else None, self.reading)
        classes = len(case.probs) + self.output.first(len(case.probs))
        if self.fit and self.fit.channels != len(case.probs):
            raise UserError(
                f"{path}: {len(case.probs)} channels, the cases of --fit have {self.fit.channels}. Fix: move it away."
            )

        def other(values: FromStored) -> Case:
            """Load the case with the calibration that a rule has of its own."""
            how = dataclasses.replace(self.reading, values=values)
            return load_case(path, label, self.valid[name] if self.valid else None, how)

        with named(label or path):
            result = decode(case, self.rules, self.output, self.args.out, self.device, other)
        written = []
        for rule, found in result.rules.items():
            out = self.args.out / rule / f"{name}{case.suffix[found.key == 'labels']}"
            write_array(found.array, out, case.geometry, found.key)
            written.append(str(out))
        record: dict[str, Any] = {
            "settings": self.settings,
            "sources": self.scored.sources(name),
            "written": written,
            "classes": classes,
            "seconds": {rule: found.seconds for rule, found in result.rules.items()},
            "confidence": {rule: found.confidence for rule, found in result.rules.items()},
        }
        if label is not None:
            record["counts"] = {
                rule: counts_to_plain(found.counts) for rule, found in result.rules.items() if found.counts is not None
            }
            record["likelihood"] = result.likelihood
            record["reliability"] = reliability_to_plain(result.reliability)
        write_json(self.record(name), record)

    def score(self, names: list[str], failed: dict[str, str]) -> dict[str, EvalResult]:
        """Write the results of every rule over the cases that are done, and return them."""
        records = {name: read_json(self.record(name)) for name in names}
        sizes = {name: record["classes"] for name, record in records.items()}
        classes = max(sizes.values(), key=list(sizes.values()).count)
        for name in [name for name, size in sizes.items() if size != classes]:
            failed[name] = (
                f"{self.cases[name]}: {sizes[name]} classes, the other cases have {classes}; it is not scored. "
                "Fix: move it away."
            )
            del records[name]
        first = self.output.first(len(next(iter(records.values()))["reliability"]["count"]))
        scored = tuple(self.args.scored or range(first, classes))
        if not set(scored) <= set(range(classes)):
            raise UserError(f"--scored {self.args.scored} is invalid: labels are 0 to {classes - 1}.")
        scoring = Scoring(classes, scored, self.args.void)
        curves = (reliability_from_plain(record["reliability"]) for record in records.values())
        reliability = functools.reduce(Reliability.merge, curves)
        ratios = reliability.volume_ratio().tolist()
        likelihoods = [record["likelihood"] for record in records.values() if None not in record["likelihood"]]
        log_loss, brier = torch.tensor(likelihoods or [[float("nan")] * 2], dtype=torch.float64).mean(0).tolist()
        details = self._details(list(records), classes, failed)
        results = {}
        for rule in self.rules:
            counts = Counts.cat([counts_from_plain(record["counts"][rule]) for record in records.values()])
            results[rule] = EvalResult(
                predictor=rule,
                names=list(records),
                counts=counts,
                scored=scored,
                scores={
                    "test_loss": float("nan"),
                    **scoring.summary(counts),
                    "ece": reliability.ece(),
                    "classwise_ece": float(reliability.classwise_ece().nanmean()),
                    "log_loss": log_loss,
                    "brier": brier,
                    "volume_ratio": {str(c + first): v for c, v in enumerate(ratios)},
                },
                seconds=sum(record["seconds"][rule] for record in records.values()),
                confidence=self._confidence([record["confidence"][rule] for record in records.values()]),
            )
            values = {"fitted": self.fitted[rule]} if rule in self.fitted else {}
            results[rule].save(self.args.out / "results", {**details, **values})
        return results

    def compare(self) -> str:
        """Write OUT/paired_statistics.md, every rule against the first one; return a line for each."""
        folder, (baseline, *others) = self.args.out / "results", self.rules
        first, path = read_rule(folder, baseline), self.args.out / "paired_statistics.md"
        try:
            found = [compare(first, read_rule(folder, rule)) for rule in others]
        except UserError as error:  # no case has a score under both
            return f"no paired statistics: {error}"
        write_text(path, markdown(found))
        lines = [
            f"{one['rule']} - {baseline}: {one['mean']:+.2f} points of Dice "
            f"[{one['interval'][0]:+.2f}, {one['interval'][1]:+.2f}], better on {100 * one['better']:.0f} %, "
            f"worse on {100 * one['worse']:.0f} % of {one['images']} cases"
            for one in found
        ]
        return "\n".join([*lines, f"paired statistics: {path}"])

    def report(self, names: list[str]) -> Path:
        """Write OUT/report/index.html over these cases; return its path."""
        cases = {name: self.cases[name] for name in names}
        scored = Folder(cases, self.labels, self.valid, self.scored.reading, self.output, self.args.scored)
        classes = self._classes(scored.channels + scored.first)[scored.first :]
        now = provenance(ROOT)
        facts = {
            "probabilities": self.args.probs,
            "labels": self.args.labels,
            "cases": f"{len(names)}, fingerprint {scored.fingerprint()}",
            "fitted on": " and ".join(map(str, self.args.fit or ())),
            "command": now["command"],
            "date": now["date"],
            "code": now["git_sha"],
            "versions": ", ".join(f"{name} {version}" for name, version in now["versions"].items()),
        }
        title = f"Saved probabilities: {self.args.probs.resolve().name}"
        return write_report(self.args.out, title, scored, self.fitter, self.args.predictor, classes, facts)

    @staticmethod
    def _confidence(rows: list[list[float | None] | None]) -> torch.Tensor | None:
        """Return the confidences (N, C) of the records; null, which is NaN in JSON, becomes NaN again."""
        plain = [[float("nan") if x is None else x for x in row] for row in rows if row is not None]
        return torch.tensor(plain, dtype=torch.float64) if plain else None

    def write_confidence(self, names: list[str]) -> None:
        """Write OUT/confidence.csv: case, rule, label and the expected Dice of the mask."""
        rows: list[tuple[Any, ...]] = [("case", "rule", "class", "confidence")]
        for name in names:
            record = read_json(self.record(name))
            for rule, values in record["confidence"].items():
                rows += [(name, rule, c, f"{x:.6f}") for c, x in enumerate(values) if x is not None]
        write_text(self.args.out / "confidence.csv", csv_text(rows))

    def _classes(self, count: int) -> list[str]:
        """Return the names of the labels 0, 1, …"""
        given = self.args.names.split(",") if self.args.names else []
        if given and len(given) != count:
            raise UserError(f"--names {self.args.names} has {len(given)} names: expected {count}.")
        return given or [str(c) for c in range(count)]

    def _details(self, names: list[str], classes: int, failed: dict[str, str]) -> dict[str, Any]:
        """What a result file reports of the origin of its numbers."""
        details = {
            "protocol": "corrected",
            "dataset": {
                "name": self.args.probs.name,
                "split": "test",
                "fingerprint": fingerprint({name: self.scored.sources(name) for name in names}),
                "num_images": len(names),
            },
            "model": self.args.probs.name,
            "loss": "unknown",
            "seed": None,
            "classes": self._classes(classes),
            "link": self.args.link,
            **self.calibration,
            "correct_focal": False,
            "failed": list(failed),
            "checkpoint": None,
            "provenance": provenance(ROOT),
        }
        details["config_hash"] = fingerprint({k: v for k, v in details.items() if k != "provenance"})
        return details


if __name__ == "__main__":
    run_cli(main)
