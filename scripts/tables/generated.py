"""The generated files in git: what they must hold, written or checked byte for byte."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.tables.compare import compared_tables
from scripts.tables.ours import Groups, our_tables, problem_count
from scripts.tables.published import load_published, published_tables
from scripts.tables.render import csv_tables, latex, markdown
from scripts.tables.results import Problem
from scripts.tables.table import Table

MODES = ("published", "ours", "both")
FORMATS = ("md", "csv", "tex")
_PLACES = {
    "published": "saved/published/tables",
    "ours": "saved/results/tables",
    "both": "saved/results/comparison",
}
_MARKER = re.compile(r"<!-- table:(?P<name>[\w./-]+) -->\n(?P<body>.*?)<!-- /table:(?P=name) -->", re.DOTALL)
_LOOSE = re.compile(r"<!-- /?table:[\w./-]+ -->")


def tables(mode: str, groups: Groups, problems: Sequence[Problem] = ()) -> list[Table]:
    """The tables of a mode: published, ours or both."""
    if mode == "ours":
        return our_tables(groups, problems)
    data = load_published()
    return published_tables(data) if mode == "published" else compared_tables(data, groups)


def render(mode: str, found: Sequence[Table], form: str, problems: Sequence[Problem] = ()) -> str:
    """All tables of a mode in one of FORMATS; says so where there is none."""
    if form == "csv":
        return csv_tables(found)
    if form == "tex":
        return "\n".join(map(latex, found)) or "% no results yet\n"
    text = "\n".join(map(markdown, found))
    return text or f"No results yet{'; ' + problem_count(problems) if problems else ''}.\n"


def generated(root: Path, groups: Groups, problems: Sequence[Problem]) -> dict[Path, str]:
    """Every generated file of the repository with the text it must hold.

    `groups` must come from saved/results alone: a run that is not in git may not change a file that is.
    """
    files, named = {}, {}
    for mode, stem in _PLACES.items():
        found = tables(mode, groups, problems)
        named.update({table.name: markdown(table) for table in found})
        named[mode] = render(mode, found, "md", problems)  # all tables of the mode under one marker
        for form in FORMATS:
            files[root / f"{stem}.{form}"] = render(mode, found, form, problems)
    raw = {key: group for key, group in groups.items() if not group.first.variant}
    named.update({f"{table.name}-raw": markdown(table) for table in our_tables(raw)})  # nothing calibrated
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        if page.is_file() and "<!-- table:" in (text := page.read_text(encoding="utf-8")):
            files[page] = inject(text, named, page.name)
    return files


def inject(text: str, named: Mapping[str, str], page: str = "README.md") -> str:
    """Put each table of a page between its markers, `<!-- table:NAME -->` and `<!-- /table:NAME -->`.

    Raises:
        ValueError: a marker has no partner or names a table that does not exist.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in named:
            raise ValueError(f"{page}: there is no table:{name}; there are: {', '.join(named)}")
        return f"<!-- table:{name} -->\n{named[name]}<!-- /table:{name} -->"

    loose = _LOOSE.search(_MARKER.sub("", text))
    if loose:
        raise ValueError(f"{page}: the marker {loose[0]} stands alone; close it with <!-- /table:NAME -->")
    return _MARKER.sub(replace, text)


def stale(files: Mapping[Path, str]) -> list[Path]:
    """The files that do not hold what they must, byte for byte."""
    return [path for path, text in files.items() if not path.is_file() or path.read_bytes() != text.encode()]


def write(files: Mapping[Path, str]) -> list[Path]:
    """Write what is stale; return those files."""
    changed = stale(files)
    for path in changed:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(files[path].encode())
    return changed
