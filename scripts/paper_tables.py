"""The paper's tables: as published, from our own runs, or both with their differences.

    python scripts/paper_tables.py                    all our results as Markdown, and as saved/tables.csv
    python scripts/paper_tables.py published          the three tables of the paper, faults marked
    python scripts/paper_tables.py both --format tex --output tables.tex
    python scripts/paper_tables.py --write            regenerate every table kept in git (`make tables`)
    python scripts/paper_tables.py --check            fail if one is stale or a number leaves its tolerance

Results of unlike configuration, data or protocol are never averaged: the cell says "refused" and the
reason stands below.
Exit codes: 0 done, 1 a check failed, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from scripts import ROOT
from scripts.command import leave, refused
from scripts.tables.compare import read_expected, violations
from scripts.tables.generated import FORMATS, MODES, generated, render, stale, tables, write
from scripts.tables.ours import Groups, problem_count
from scripts.tables.results import Problem, group_seeds, read_results


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """The command line; returns the exit code."""
    args = _parser().parse_args(arguments)
    try:
        if args.write or args.check:
            return _in_git(root, args.check)
        return _show(args, root)
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return refused(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("mode", nargs="?", choices=MODES, default="ours", help="which tables (default: ours)")
    parser.add_argument("--saved", type=Path, help="folder of the runs (default: saved/ of the repository)")
    parser.add_argument(
        "--format", choices=FORMATS, default="md", help="Markdown, CSV or LaTeX (default: md)"
    )
    parser.add_argument("--output", type=Path, help="write to this file instead of the screen")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="regenerate the tables kept in git")
    action.add_argument("--check", action="store_true", help="verify the tables kept in git and our numbers")
    return parser


def _show(args: argparse.Namespace, root: Path) -> int:
    """Print or write the tables of one mode."""
    saved = args.saved or root / "saved"
    if not saved.is_dir():
        raise ValueError(
            f"{saved} is no folder; --saved wants the folder that holds <dataset>/<model>/<loss>/seed<k>"
        )
    groups, problems = ({}, []) if args.mode == "published" else _read(saved)
    found = tables(args.mode, groups, problems)
    text = render(args.mode, found, args.format, problems)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.mode == "ours" and not args.output and args.format == "md":
        path = saved / "tables.csv"
        path.write_text(render("ours", found, "csv"), encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)
    return 0


def _read(saved: Path) -> tuple[Groups, list[Problem]]:
    """Results grouped over seeds; what was skipped or refused is named on the error stream."""
    results, problems = read_results(saved)
    groups = group_seeds(results)
    for problem in problems:
        print(f"skipped: {problem.path}: {problem.reason}", file=sys.stderr)
    if problems:
        print(problem_count(problems), file=sys.stderr)
    for group in groups.values():
        if group.reason:
            print(f"refused: {' '.join(filter(None, group.first.cell))}: {group.reason}", file=sys.stderr)
    return groups, problems


def _in_git(root: Path, check: bool) -> int:
    """Write or check the generated files; they depend on what is in git alone."""
    records = root / "saved" / "results"
    groups, problems = _read(records) if records.is_dir() else ({}, [])
    files = generated(root, groups, problems)
    if not check:
        for path in write(files):
            print(f"written: {path.relative_to(root)}")
        return 0
    faults = [f"stale: {path.relative_to(root)} (run: make tables)" for path in stale(files)]
    faults += [f"unreadable: {problem.path.relative_to(root)}" for problem in problems]
    expected = read_expected(root / "configs")
    faults += [f"out of tolerance: {line}" for line in violations(expected, groups)]
    for fault in faults:
        print(fault, file=sys.stderr)
    print(f"{len(files)} generated files, {len(groups)} cells of ours, faults: {len(faults) or 'none'}")
    return 1 if faults else 0


if __name__ == "__main__":
    leave(main)
