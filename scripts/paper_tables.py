"""Print the tables of the paper: as published, from our own runs, or both with their differences.

    python scripts/paper_tables.py                    all our results as Markdown, and as saved/tables.csv
    python scripts/paper_tables.py published          the three tables of the paper, faults marked
    python scripts/paper_tables.py both --format tex --output tables.tex
    python scripts/paper_tables.py --write            regenerate every table in git (`make tables`)
    python scripts/paper_tables.py --check            fail if a table is stale or a number is out of tolerance
    python scripts/paper_tables.py --verify           verify all records, and rebuild the tables from their counts

Results of different configurations, data or protocols are never averaged: the cell says "rejected", and the
reason is below the table. --verify compares every file in saved/results with MANIFEST.sha256, computes all
scores again from the counts of images and classes, and compares the tables with those in git byte for byte.
Exit codes: 0 done, 1 a check failed, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError
from scripts import ROOT
from scripts.common import command_line
from scripts.tables.generated import (
    FORMATS,
    MODES,
    extend_manifest,
    generated,
    render,
    stale,
    tables,
    verify,
    write,
)
from scripts.tables.ours import problem_count
from scripts.tables.published import read_expected, violations
from scripts.tables.results import Groups, Problem, group_seeds, read_results


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Run the command; return the exit code."""
    args = _parser().parse_args(arguments)
    records = root / "saved" / "results"
    if args.verify:
        return _report(verify(root), "records and tables")
    if not (args.write or args.check):
        return _show(args, args.saved or root / "saved")
    groups, problems = _read(records) if records.is_dir() else ({}, [])
    files = generated(root, groups, problems)
    if args.write:
        for path in write(files):
            print(f"written: {path.relative_to(root)}")
        count = extend_manifest(records) if records.is_dir() else 0
        if count:
            print(f"new records in the manifest: {count}")
        return 0
    faults = [f"stale: {path.relative_to(root)} (run: make tables)" for path in stale(files)]
    faults += [f"unreadable: {problem.path.relative_to(root)}" for problem in problems]
    expected = read_expected(root / "configs")
    faults += [f"out of tolerance: {line}" for line in violations(expected, groups)]
    return _report(faults, f"{len(files)} generated files, {len(groups)} averages of ours")


def _parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("mode", nargs="?", choices=MODES, default="ours", help="which tables (default: ours)")
    add("--saved", type=Path, help="folder of the runs (default: saved/ of the repository)")
    add("--format", choices=FORMATS, default="md", help="Markdown, CSV or LaTeX (default: md)")
    add("--output", type=Path, help="write to this file instead of the screen")
    add = parser.add_mutually_exclusive_group().add_argument
    add("--write", action="store_true", help="regenerate the tables in git; list new records in the manifest")
    add("--check", action="store_true", help="check the tables in git and our numbers")
    add("--verify", action="store_true", help="verify the records; rebuild the tables from per-image counts")
    return parser


def _show(args: argparse.Namespace, saved: Path) -> int:
    """Print or write the tables of one mode."""
    if not saved.is_dir():
        raise UserError(
            f"--saved={saved} is not a folder. Fix: give the folder that holds <dataset>/<model>/<loss>/seed<k>."
        )
    groups, problems = ({}, []) if args.mode == "published" else _read(saved)
    found = tables(args.mode, groups, problems)
    text = render(found, args.format, problems)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        return 0
    print(text, end="")
    if args.mode == "ours" and args.format == "md":
        path = saved / "tables.csv"
        path.write_text(render(found, "csv"), encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)
    return 0


def _read(saved: Path) -> tuple[Groups, list[Problem]]:
    """Return results grouped over seeds; print skipped files and rejected averages to stderr."""
    results, problems = read_results(saved)
    groups = group_seeds(results)
    notes = [f"skipped: {problem.path}: {problem.reason}" for problem in problems]
    notes += [problem_count(problems)] * bool(problems)
    for group in groups.values():
        if group.reason:
            notes.append(f"rejected: {' '.join(filter(None, group.first.cell))}: {group.reason}")
    for note in notes:
        print(note, file=sys.stderr)
    return groups, problems


def _report(faults: Sequence[str], checked: str) -> int:
    """Print the faults; return the exit code."""
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{checked}: faults: {len(faults) or 'none'}")
    return 1 if faults else 0


if __name__ == "__main__":
    run_cli(main)
