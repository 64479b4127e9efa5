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
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.compose import CONFIGS
from configs.errors import UserError, one_line
from configs.files import file_sha256
from scripts import ROOT
from scripts.analysis.scores import short_variant
from scripts.common import command_line
from scripts.tables import results as ours
from scripts.tables.layout import Table, csv_tables, latex, markdown
from scripts.tables.published import compared_tables, load_published, published_tables, read_expected, violations

MODES = ("published", "ours", "both")
FORMATS = ("md", "csv", "tex")
MANIFEST = "MANIFEST.sha256"
_PLACES = {"published": "saved/published/tables", "ours": "saved/results/tables", "both": "saved/results/comparison"}
_MARKER = re.compile(r"<!-- table:(?P<name>[\w./-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.DOTALL)
_LOOSE = re.compile(r"<!-- /?table:[\w./-]+ -->")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    args = _parser().parse_args(arguments)
    records = root / "saved" / "results"
    if args.verify:
        return _report(verify(root), "records and tables")
    if not (args.write or args.check):
        return _show(args, args.saved or root / "saved")
    groups, problems = _read(records) if records.is_dir() else ({}, [])
    files = generate(root, groups, problems)
    if args.write:
        for path in write(files):
            print(one_line(f"written: {path.relative_to(root)}"))
        count = extend_manifest(records) if records.is_dir() else 0
        if count:
            print(f"new records in the manifest: {count}")
        return 0
    faults = [f"stale: {path.relative_to(root)} (run: make tables)" for path in find_stale(files)]
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
        raise UserError(f"--saved={saved} is not a folder. Fix: give the folder of <dataset>/<model>/<loss>/seed<k>.")
    groups, problems = ({}, []) if args.mode == "published" else _read(saved)
    found = tables(args.mode, groups, problems)
    text = render(found, args.format, problems)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
        return 0
    print(text, end="")
    if found and args.mode == "ours" and args.format == "md":
        path = saved / "tables.csv"
        path.write_text(render(found, "csv"), encoding="utf-8")
        print(one_line(f"written: {path}"), file=sys.stderr)
    return 0


def _read(saved: Path) -> tuple[ours.Groups, list[ours.Problem]]:
    """Return results grouped over seeds; print skipped files and rejected averages to stderr."""
    results, problems = ours.read_results(saved)
    groups = ours.group_seeds(results)
    notes = [f"skipped: {problem.path}: {problem.reason}" for problem in problems]
    notes += [ours.skipped_files_text(problems)] * bool(problems)
    for (row, rule), group in groups.items():
        if group.reason:
            notes.append(f"rejected: {' '.join(filter(None, (*row, rule)))}: {group.reason}")
    for note in notes:
        print(one_line(note), file=sys.stderr)
    return groups, problems


def _report(faults: Sequence[str], checked: str) -> int:
    """Print the faults; return the exit code."""
    for fault in faults:
        print(one_line(fault), file=sys.stderr)
    print(f"{checked}: faults: {len(faults) or 'none'}")
    return 1 if faults else 0


# --- the generated files in git


def tables(mode: str, groups: ours.Groups, problems: Sequence[ours.Problem] = ()) -> list[Table]:
    """Return the tables of a mode: published, ours or both."""
    if mode == "ours":
        return ours.our_tables(groups, problems)
    data = load_published()
    if mode == "published":
        return published_tables(data)
    return compared_tables(data, groups, read_expected(CONFIGS))


def render(found: Sequence[Table], form: str, problems: Sequence[ours.Problem] = ()) -> str:
    """Return tables as text in one of FORMATS; a sentence if there are none."""
    if form == "csv":
        return csv_tables(found)
    if form == "tex":
        return "\n".join(map(latex, found)) or "% no results yet\n"
    text = "\n".join(map(markdown, found))
    return text or f"No results yet{'; ' + ours.skipped_files_text(problems) if problems else ''}.\n"


def generate(root: Path, groups: ours.Groups, problems: Sequence[ours.Problem]) -> dict[Path, str]:
    """Return the path and text of every generated file of the repository.

    `groups` must come from saved/results alone: a run that is not in git must not change a file that is.
    """
    files, named = {}, {}
    for mode, stem in _PLACES.items():
        found = tables(mode, groups, problems)
        named.update({table.name: markdown(table) for table in found})
        named[mode] = render(found, "md", problems)  # all tables of the mode under one marker
        for form in FORMATS:
            files[root / f"{stem}.{form}"] = render(found, form, problems)
    raw = {cell: group for cell, group in groups.items() if short_variant(cell[0].variant) in ("", "last")}
    named |= {f"{table.name}-raw": markdown(table) for table in ours.our_tables(raw)}  # without calibrated rows
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if page.is_file() and "<!-- table:" in (text := page.read_text(encoding="utf-8")):
            files[page] = inject(text, named, page.name)
    return files


def inject(text: str, named: Mapping[str, str], page: str = "README.md") -> str:
    """Put each table of a page between its markers, `<!-- table:NAME -->` and `<!-- /table:NAME -->`."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in named:
            raise UserError(f"{page}: table:{name} does not exist. Tables: {', '.join(named)}.")
        return f"<!-- table:{name} -->\n{named[name]}<!-- /table:{name} -->"

    loose = _LOOSE.search(_MARKER.sub("", text))
    if loose:
        raise UserError(f"{page}: the marker {loose[0]} has no partner. Fix: close it with <!-- /table:NAME -->.")
    return _MARKER.sub(replace, text)


def find_stale(files: Mapping[Path, str]) -> list[Path]:
    """Return the files that are missing or differ from their text in any byte."""
    return [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]


def write(files: Mapping[Path, str]) -> list[Path]:
    """Write the stale files; return them."""
    changed = find_stale(files)
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path].encode())
    return changed


# --- evidence


def recorded_files(records: Path) -> list[str]:
    """Return the POSIX path of every file below `saved/results`, except the manifest and the generated tables."""
    stems = {Path(stem).name for stem in _PLACES.values()}
    own = {MANIFEST, *(f"{stem}.{form}" for stem in stems for form in FORMATS)}
    paths = (path.relative_to(records).as_posix() for path in records.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in own)


def read_manifest(records: Path) -> dict[str, str]:
    """Return the SHA-256 of each listed file by its path; {} if there is no manifest."""
    path = records / MANIFEST
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line[66:]: line[:64] for line in lines if line}


def extend_manifest(records: Path) -> int:
    """Add the files that the manifest does not list, and return how many. Listed checksums never change."""
    listed = read_manifest(records)
    new = [path for path in recorded_files(records) if path not in listed]
    listed.update({path: file_sha256(records / path) for path in new})
    if new:
        text = "".join(f"{listed[path]}  {path}\n" for path in sorted(listed))
        (records / MANIFEST).write_bytes(text.encode())
    return len(new)


def verify(root: Path) -> list[str]:
    """Return the faults of the evidence, one line each.

    Every record must have the checksum in the manifest, and the tables in git must follow, byte for byte, from the
    counts of images and classes.
    """
    records = root / "saved" / "results"
    listed, present = read_manifest(records), recorded_files(records)
    faults = [f"not in {MANIFEST}: {path} (run: make tables)" for path in present if path not in listed]
    for path, digest in listed.items():
        if not (records / path).is_file():
            faults.append(f"missing: {path} (restore it, or delete its line in {MANIFEST})")
        elif file_sha256(records / path) != digest:
            faults.append(f"changed: {path} (restore it; if intended, delete its line and run: make tables)")
    results, problems = ours.read_results(records, from_counts=True)
    faults += [f"no scores from counts: {problem.name}: {problem.reason}" for problem in problems]
    files = generate(root, ours.group_seeds(results), problems)
    faults += [f"does not follow from the counts: {path.relative_to(root)}" for path in find_stale(files)]
    return faults


if __name__ == "__main__":
    run_cli(main)
