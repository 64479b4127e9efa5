"""The generated files in git, and the evidence for them: checksums of all records, tables from per-image counts.

`saved/results/MANIFEST.sha256` has the format of `sha256sum`: `cd saved/results && sha256sum -c MANIFEST.sha256`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from configs.compose import CONFIGS
from configs.errors import UserError
from scripts.tables.layout import Table, csv_tables, latex, markdown
from scripts.tables.ours import our_tables, problem_count
from scripts.tables.published import compared_tables, load_published, published_tables, read_expected
from scripts.tables.results import Groups, Problem, group_seeds, read_results, short_variant
from trainers.results import file_sha256

MODES = ("published", "ours", "both")
FORMATS = ("md", "csv", "tex")
MANIFEST = "MANIFEST.sha256"
_PLACES = {
    "published": "saved/published/tables",
    "ours": "saved/results/tables",
    "both": "saved/results/comparison",
}
_MARKER = re.compile(r"<!-- table:(?P<name>[\w./-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.DOTALL)
_LOOSE = re.compile(r"<!-- /?table:[\w./-]+ -->")


def tables(mode: str, groups: Groups, problems: Sequence[Problem] = ()) -> list[Table]:
    """Return the tables of a mode: published, ours or both."""
    if mode == "ours":
        return our_tables(groups, problems)
    data = load_published()
    if mode == "published":
        return published_tables(data)
    return compared_tables(data, groups, read_expected(CONFIGS))


def render(found: Sequence[Table], form: str, problems: Sequence[Problem] = ()) -> str:
    """Return tables as the text of one of FORMATS; the text says so if there is none."""
    if form == "csv":
        return csv_tables(found)
    if form == "tex":
        return "\n".join(map(latex, found)) or "% no results yet\n"
    text = "\n".join(map(markdown, found))
    return text or f"No results yet{'; ' + problem_count(problems) if problems else ''}.\n"


def generated(root: Path, groups: Groups, problems: Sequence[Problem]) -> dict[Path, str]:
    """Return every generated file of the repository with its text.

    `groups` must come from saved/results alone: a run that is not in git must not change a file that is.
    """
    files, named = {}, {}
    for mode, stem in _PLACES.items():
        found = tables(mode, groups, problems)
        named.update({table.name: markdown(table) for table in found})
        named[mode] = render(found, "md", problems)  # all tables of the mode under one marker
        for form in FORMATS:
            files[root / f"{stem}.{form}"] = render(found, form, problems)
    raw = {key: group for key, group in groups.items() if short_variant(group.first.variant) in ("", "last")}
    named |= {f"{table.name}-raw": markdown(table) for table in our_tables(raw)}  # without calibrated rows
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if page.is_file() and "<!-- table:" in (text := page.read_text(encoding="utf-8")):
            files[page] = inject(text, named, page.name)
    return files


def inject(text: str, named: Mapping[str, str], page: str = "README.md") -> str:
    """Put each table of a page between its markers, `<!-- table:NAME -->` and `<!-- /table:NAME -->`.

    Raises:
        UserError: a marker has no partner or names a table that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in named:
            raise UserError(f"{page}: table:{name} does not exist. Tables: {', '.join(named)}.")
        return f"<!-- table:{name} -->\n{named[name]}<!-- /table:{name} -->"

    loose = _LOOSE.search(_MARKER.sub("", text))
    if loose:
        raise UserError(
            f"{page}: the marker {loose[0]} has no partner. Fix: close it with <!-- /table:NAME -->."
        )
    return _MARKER.sub(replace, text)


def stale(files: Mapping[Path, str]) -> list[Path]:
    """Return the files that differ from their text in any byte."""
    return [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]


def write(files: Mapping[Path, str]) -> list[Path]:
    """Write the stale files; return them."""
    changed = stale(files)
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path].encode())
    return changed


# --- evidence


def recorded_files(records: Path) -> list[str]:
    """Return every recorded file below `saved/results`, as POSIX paths; generated tables are not recorded."""
    stems = {Path(stem).name for stem in _PLACES.values()}
    own = {MANIFEST, *(f"{stem}.{form}" for stem in stems for form in FORMATS)}
    paths = (path.relative_to(records).as_posix() for path in records.rglob("*") if path.is_file())
    return sorted(path for path in paths if path not in own)


def read_manifest(records: Path) -> dict[str, str]:
    """Return the SHA-256 of each listed file; {} if there is no manifest."""
    path = records / MANIFEST
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    return {line[66:]: line[:64] for line in lines if line}


def extend_manifest(records: Path) -> int:
    """Add the files that the manifest does not list; return how many. Listed checksums never change."""
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
    results, problems = read_results(records, from_counts=True)
    faults += [f"no scores from counts: {problem.name}: {problem.reason}" for problem in problems]
    files = generated(root, group_seeds(results), problems)
    faults += [f"does not follow from the counts: {path.relative_to(root)}" for path in stale(files)]
    return faults
