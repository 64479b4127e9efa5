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
--write labels or --write masks changes that. NIfTI files keep affine and header. The scores are those of the
written masks.

With labels, OUT/results/ has the scores, OUT/paired_statistics.md compares every rule with the first one case by case,
and --report writes OUT/report/index.html. --fit names a second folder of labelled cases. The rules T_fit and auto and
--calibrate are fitted on it; values and origin are stored in OUT/decode.fitted.json. pooled_dice and pooled_iou are
fitted on PROBS without labels. Fitting and --report hold a whole case in memory.

With one channel, or with --foreground-only, label 0 is the background and the channels are the labels 1, 2, ….
The same command again continues where it was stopped. Exit codes: 0 done, 1 some cases failed (listed at the end),
2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configs.cli import run_cli
from configs.compose import options
from configs.errors import TrainingError, UserError, as_training_error, one_line
from configs.files import finite_or_none, read_json, require_writable, write_json, write_text
from rankseg.calibration import Reliability
from scripts import ROOT, report
from scripts.analysis.measure import analyse
from scripts.analysis.scores import compare, read_rule
from scripts.common import check_least, command_line, map_in_threads, summary
from scripts.decoding import rules
from scripts.decoding.arrays import PICTURES, SUFFIXES, write_array
from scripts.decoding.cases import Folder, name_case_in_errors
from scripts.decoding.labelled import FolderFitter
from scripts.paired_statistics import markdown
from trainers.distributed import pick_device
from trainers.evaluator import probability_scores
from trainers.metrics import Counts, Scoring
from trainers.reproducibility import provenance
from trainers.results import EvalResult, comparison_table, fingerprint
from trainers.text import csv_text

SOME_FAILED = 1
VERSION = 5  # of the records; a folder with records of another version is continued only with --force
Record = dict[str, Any]  # of a case, as JSON holds it


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code."""
    args = _parse_arguments(argv)
    require_writable(args.out)
    job = Job(args)
    for note in job.folder.notes:
        print(one_line(f"note: {note}"), file=sys.stderr)
    cases = job.folder.cases
    todo = [name for name in cases if args.force or not job.read_record(name)]
    bar = tqdm(map_in_threads(job, todo, args.workers), "decode", len(todo), unit="case", disable=args.quiet or None)
    job.failed |= {name: problem for name, problem in zip(todo, bar, strict=True) if problem}
    if note := job.describe_linked_twice():
        print(one_line(f"note: {note}"), file=sys.stderr)
    records = {name: record for name in cases if name not in job.failed and (record := job.read_record(name))}
    for line in job.fitter.report(job.fitted, job.folder):  # type: ignore[arg-type]
        print(line)
    if args.confidence and records:
        job.write_confidence(records)
    if args.labels and records:
        print(comparison_table(job.score(records)))
        print(one_line(f"results: {args.out / 'results'}"))
        if len(job.rules) > 1:
            print(job.compare())
        if args.report:
            print(one_line(f"report: {job.report()}"))
    done = f"{sum(name not in job.failed for name in todo)} cases decoded with {', '.join(job.rules)}"
    print(one_line(summary(args.out, done, len(cases) - len(todo), len(job.failed))))
    for problem in job.failed.values():
        print(one_line(f"  {problem}"), file=sys.stderr)
    return SOME_FAILED if job.failed else 0


def _parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("probs", type=Path, metavar="PROBS", help="folder of probabilities, or one file")
    add("-p", "--predictor", action="append", required=True, metavar="RULE",
        help=f"may be repeated; one of: {', '.join(options('predictor'))}")  # fmt: skip
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--labels", type=Path, metavar="FOLDER", help="true labels: scores are computed and written")
    add("--valid", type=Path, metavar="FOLDER", help="fields of view: pixels of value 0 are void")
    add("--link", choices=("softmax", "sigmoid"), help="PROBS holds logits; this turns them into probabilities")
    add("--temperature", type=float, default=1.0, help="divides the logits (default: 1)")
    add("--fit", type=Path, nargs=2, metavar=("PROBS", "LABELS"), help="labelled cases to fit on; see above")
    add("--calibrate", choices=("none", "temperature", "class"), default="none",
        help="calibration of the logits, fitted on the cases of --fit (default: none)")  # fmt: skip
    add("--classes-axis", choices=("auto", "first", "last", "none"), default="auto",
        help="axis that holds the classes (default: found from the labels or the sums)")  # fmt: skip
    add("--key", metavar="NAME", help="the array of .npz files that hold several")
    add("--write", choices=("auto", "labels", "masks"), default="auto", help="see above")
    add("--unassigned", default="void", metavar="void|max|K",
        help="label of pixels without a class (void: 255, or 0 if label 0 has no channel; max: likeliest)")  # fmt: skip
    add("--void", type=int, default=255, metavar="K", help="label that is not scored (default: 255)")
    add("--foreground-only", action="store_true", help="label 0 is background and has no channel")
    add("--scored", metavar="1,2,…", help="labels that the means run over (default: all with a channel)")
    add("--names", metavar="A,B,…", help="names of the labels 0, 1, … for reports")
    add("--confidence", action="store_true", help="write rankseg.confidence of every mask; needs no labels")
    add("--report", action="store_true", help="with labels: HTML report of T, max, rankdice and the rules of -p")
    add("--workers", type=int, default=1, help="cases decoded at the same time (default: 1)")
    add("--device", default="cpu", help="auto, cpu, cuda or cuda:N (default: cpu)")
    add("--force", action="store_true", help="decode all cases again")
    add("--quiet", action="store_true", help="no progress bar")
    args = parser.parse_args(argv)
    args.predictor = list(dict.fromkeys(args.predictor))
    try:
        if args.unassigned not in ("void", "max"):
            args.unassigned = int(args.unassigned)
    except ValueError:
        raise UserError(f"--unassigned {args.unassigned} is invalid: expected void, max or an integer.") from None
    try:
        args.scored = None if args.scored is None else [int(part) for part in args.scored.split(",")]
    except ValueError:
        raise UserError(f"--scored {args.scored} is invalid: expected integers, such as 1,2.") from None
    for name, value in (("unassigned", args.unassigned), ("void", args.void)):
        if isinstance(value, int) and not -(2**31) <= value < 2**31:
            raise UserError(f"--{name} {value} is invalid: expected an integer of 32 bits.")
    if not 0 < args.temperature < math.inf:
        raise UserError(f"--temperature {args.temperature:g} is invalid: expected a number above 0.")
    if args.report and not args.labels:
        raise UserError("--report needs labels. Fix: pass --labels FOLDER.")
    check_least(args, workers=1)
    return args


def _as_tensor(values: list) -> Tensor:
    """Return nested lists of numbers from JSON as a tensor; null becomes NaN."""
    return torch.from_numpy(np.array(values, np.float64))


class Job:
    """Decode cases by name and keep a record of each, so that a second call continues.

    Attributes:
        failed: case name -> what is wrong with it.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, pick_device(args.device)
        for given in (args.probs, args.labels, args.valid, *(args.fit or ())):
            if given is not None and args.out.resolve() == given.resolve():
                raise UserError(f"--out {args.out} is also an input folder. Fix: choose another folder.")
        self.folder = Folder(args, args.probs, args.labels, args.valid)
        self.fit = Folder(args, *args.fit) if args.fit else None
        if args.scored or args.names:  # checked before anything is written
            self._classes(self.folder.channels + self.folder.first)
        self.fitter = FolderFitter(self.folder, self.fit, self.device)
        self.rules, self.fitted = self.fitter.rules(args.predictor, self.folder)  # type: ignore[arg-type]
        self.to_probs = self.fitter.to_probs()
        self.calibration = self.fitter.describe_calibration()
        self.failed = {f"--fit {name}": problem for name, problem in self.fit.failed.items()} if self.fit else {}
        names = ("predictor", "classes_axis", "key", "link", "write", "unassigned", "foreground_only", "void")
        settings = {name: getattr(args, name) for name in (*names, "confidence")}
        settings |= {"version": VERSION, "labels": bool(args.labels), "valid": bool(args.valid)}
        self.settings = fingerprint({**settings, **self.calibration, "fitted": self.fitted})
        path, content = args.out / "decode.json", {"settings": self.settings, "rules": args.predictor}
        has_results = path.is_file() and any((args.out / ".cases").rglob("*.json"))
        if has_results and not args.force and read_json(path) != content:
            raise UserError(
                f"{args.out} holds results of other options, or of another version of this command. "
                "Fix: choose another --out, or pass --force."
            )
        write_json(path, content)
        self.fitter.save()

    def _record_path(self, name: str) -> Path:
        return self.args.out / ".cases" / f"{name}.json"

    def read_record(self, name: str) -> Record | None:
        """Return the record of a case that was decoded from the same files with the same settings, else None.

        A damaged or edited record does not match its hash. The case is then decoded again, also if a mask is missing.
        """
        path = self._record_path(name)
        try:
            record = read_json(path) if path.is_file() else None
        except UserError:  # not JSON
            return None
        if not isinstance(record, dict) or record.pop("hash", None) != fingerprint(record):
            return None
        if (record.get("settings"), record.get("sources")) != (self.settings, self.folder.sources(name)):
            return None
        for stem in (self.args.out / rule / name for rule in self.rules):
            if not any(stem.with_name(stem.name + suffix).is_file() for suffix in (*SUFFIXES, *PICTURES)):
                return None
        return record

    def __call__(self, name: str) -> str | None:
        """Decode and write a case; return its error message, or None."""
        try:
            with as_training_error(f"decoding {self.folder.cases[name]}", "free memory, or use fewer --workers"):
                record = finite_or_none(self._decode(name))
                write_json(self._record_path(name), {**record, "hash": fingerprint(record)})
        except (UserError, TrainingError) as error:  # the other cases are decoded
            return str(error)
        return None

    def _decode(self, name: str) -> Record:
        """Write the result of every rule; return the record of the case."""
        args, case = self.args, self.folder.load(name, self.to_probs)
        channels = len(case.probs)
        classes = channels + case.first
        if self.fit and self.fit.channels != channels:
            raise UserError(
                f"{case.path}: {channels} channels, --fit has {self.fit.channels}. Fix: move the case away."
            )
        record: Record = {"settings": self.settings, "sources": self.folder.sources(name)}
        record |= {"classes": classes, "rules": {}}
        for rule_name, rule in self.rules.items():
            own = getattr(rule, "to_probs", None)  # the rule has its own calibration
            given = self.folder.load(name, own) if own else case
            one_label = rules.is_label_map(rule, channels, args.write)
            started = time.perf_counter()
            with name_case_in_errors(case.path):
                result = rules.select(given.probs, rule, args.out, self.device)
                rule_record: dict[str, Any] = {"seconds": time.perf_counter() - started}
                if one_label:
                    result = rules.label_map(given, result, args)
            path = args.out / rule_name / f"{name}{case.suffixes[one_label]}"
            write_array(result, path, case.geometry, "labels" if one_label else "masks")
            if args.confidence:
                rule_record["confidence"] = rules.confidence(result, given)
            if case.labels is not None:
                rule_record["counts"] = rules.count_pixels(result, case.labels, classes, args.void)
            record["rules"][rule_name] = rule_record
        return record if case.labels is None else record | rules.observe(case, case.labels, args)

    def describe_linked_twice(self) -> str:
        """Return a note about files that --link may turn into probabilities a second time; empty if there are none."""
        paths = sorted(self.folder.linked_twice | (self.fit.linked_twice if self.fit else set()))
        if not paths:
            return ""
        more = f" and {len(paths) - 1} more" * (len(paths) > 1)
        sums = ", and those of a pixel sum to 1" * (self.args.link == "softmax")
        return (
            f"--link {self.args.link} takes values for logits, but all values of {paths[0]}{more} are in [0, 1]{sums}. "
            "Fix: if they are probabilities, leave out --link and pass --force."
        )

    def score(self, records: Mapping[str, Record]) -> dict[str, EvalResult]:
        """Score every rule on the decoded cases; write the results to OUT/results/ and return them by rule."""
        ((classes, _),) = Counter(record["classes"] for record in records.values()).most_common(1)
        for name, record in records.items():
            if record["classes"] != classes:
                self.failed[name] = (
                    f"{self.folder.cases[name]}: {record['classes']} classes, the other cases have {classes}; it is "
                    "not scored. Fix: move it away."
                )
        records = {name: record for name, record in records.items() if name not in self.failed}
        curves = [rules.reliability_of(record["reliability"]) for record in records.values()]
        reliability = functools.reduce(Reliability.merge, curves)
        first = classes - len(reliability.volume_ratio())  # 1 if the background has no channel, else 0
        averaged = tuple(self.args.scored or range(first, classes))
        likelihoods = _as_tensor([record["likelihood"] for record in records.values()])
        of_probs = probability_scores(reliability, likelihoods, first)
        details = self._details(list(records), classes)
        results = {}
        for rule in self.rules:
            rows = [record["rules"][rule] for record in records.values()]
            counts = [{key: torch.tensor(values) for key, values in row["counts"].items()} for row in rows]
            joined = Counts.cat([Counts(**one) for one in counts])
            averages = Scoring(classes, averaged, self.args.void).summary(joined)
            results[rule] = EvalResult(
                predictor=rule,
                names=list(records),
                counts=joined,
                scored=averaged,
                scores={"test_loss": math.nan, **averages, **of_probs},
                seconds=sum(row["seconds"] for row in rows),
                confidence=_as_tensor([row["confidence"] for row in rows]) if self.args.confidence else None,
            )
            fitted = {"fitted": self.fitted[rule]} if rule in self.fitted else {}
            results[rule].save(self.args.out / "results", {**details, **fitted})
        return results

    def compare(self) -> str:
        """Compare every rule with the first one; write OUT/paired_statistics.md and return a line for each."""
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
        return "\n".join([*lines, one_line(f"paired statistics: {path}")])

    def report(self) -> Path:
        """Write OUT/report/index.html, as report.py does, over the cases that did not fail; return its path."""
        data, args = self.folder, self.args
        data.failed = {name: problem for name, problem in self.failed.items() if name in data.cases}
        kinds: dict[str, dict[str, Any]] = {"raw": {"calibrate": "none"}}
        if args.fit:
            kinds["calibrated"] = {"calibrate": "temperature", "temperature": 1}
        if args.calibrate == "class":
            kinds["calibrated per class"] = {}
        fitters = ((kind, FolderFitter(data, self.fit, self.device, **changes)) for kind, changes in kinds.items())
        names = list(dict.fromkeys((*report.RULES, *args.predictor)))
        findings, confidence, *_ = analyse(fitters, names, data, self.fit)
        title = f"Saved probabilities: {args.probs.resolve().name}"
        lead = [
            f"{len(findings.names)} cases. All rules see the same probabilities: T selects pixels with a probability "
            "of at least 0.5, max the most likely class, rankdice the mask with the largest expected Dice. Masks may "
            "overlap."
        ]
        classes = self._classes(data.channels + data.first)[data.first :]
        facts = {
            "probabilities": args.probs,
            "labels": args.labels,
            "cases": f"{len(data)}, fingerprint {data.fingerprint()}",
            "fitted on": " and ".join(map(str, args.fit or ())),
            **report.describe_report(),
        }
        sections = {"provenance": facts}
        return report.write(args.out / "report", title, lead, findings, confidence, classes, names, sections, {})

    def write_confidence(self, records: Mapping[str, Record]) -> None:
        """Write OUT/confidence.csv: case, rule, label and the confidence of the mask."""
        rows: list[tuple[Any, ...]] = [("case", "rule", "class", "confidence")]
        for name, record in records.items():
            for rule, found in record["rules"].items():
                rows += [(name, rule, c, f"{x:.6f}") for c, x in enumerate(found["confidence"]) if x is not None]
        write_text(self.args.out / "confidence.csv", csv_text(rows))

    def _classes(self, count: int) -> list[str]:
        """Return the names of the labels 0, 1, …; raise UserError if --names or --scored do not fit their number."""
        if not set(self.args.scored or ()) <= set(range(count)):
            listed = ",".join(map(str, self.args.scored))
            raise UserError(f"--scored {listed} is invalid: labels are 0 to {count - 1}.")
        given = self.args.names.split(",") if self.args.names else []
        if given and len(given) != count:
            raise UserError(f"--names {self.args.names} has {len(given)} names: expected {count}.")
        return given or [str(c) for c in range(count)]

    def _details(self, names: list[str], classes: int) -> dict[str, Any]:
        """Return the fields of a result file that describe the origin of its numbers."""
        details = {
            "protocol": "corrected",
            "dataset": {
                "name": self.args.probs.name,
                "split": "test",
                "fingerprint": fingerprint({name: self.folder.sources(name) for name in names}),
                "num_images": len(names),
            },
            "model": self.args.probs.name,
            "loss": "unknown",
            "seed": None,
            "classes": self._classes(classes),
            "link": self.args.link,
            **self.calibration,
            "correct_focal": False,
            "failed": list(self.failed),
            "checkpoint": None,
        }
        return {**details, "provenance": provenance(ROOT), "config_hash": fingerprint(details)}


if __name__ == "__main__":
    run_cli(main)
