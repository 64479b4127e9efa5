"""All tables as one HTML page that needs no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from scripts.tables.render import join, repeats
from scripts.tables.table import Table

_STYLE = """
:root { --ink: #1c2128; --soft: #59636e; --line: #d5dae0; --back: #ffffff; --band: #f5f7f9; --best: #0b6b3a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #343b44; --back: #14181d; --band: #1b2027;
    --best: #6fd39b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 74rem;
  background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .4rem; }
h2 { font-size: 1.15rem; margin: 3rem 0 .7rem; }
p, li { color: var(--soft); max-width: 62rem; }
nav a { color: inherit; margin-right: 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums;
  border-block: 2px solid var(--ink); }
th, td { padding: .34rem .8rem; text-align: center; white-space: nowrap; }
thead th { border-bottom: 1px solid var(--ink); font-weight: 600; }
th[scope=row], th.label { text-align: left; font-weight: 400; }
th.group { font-weight: 600; vertical-align: top; }
tr.first:not(:first-child) > * { border-top: 1px solid var(--line); }
tbody tr:hover td, tbody tr:hover th[scope=row]:not(.group) { background: var(--band); }
td b { color: var(--best); }
td.none { color: var(--soft); }
sup { margin-left: .12em; }
sup a { color: inherit; text-decoration: none; }
.notes { list-style: none; padding: 0; font-size: .875rem; }
.notes li { margin: .25rem 0; }
"""


def html_page(tables: Sequence[Table], title: str, intro: str) -> str:
    """One self-contained page; light or dark as the reader's system is."""
    links = " ".join(f'<a href="#{escape(t.name)}">{escape(t.title)}</a>' for t in tables)
    body = "\n".join(_section(table) for table in tables)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(intro)}</p>\n<nav>{links}</nav>\n{body}\n</body>\n</html>\n"
    )


def _section(table: Table) -> str:
    head = "".join(
        f'<th scope="col"{" class=label" if i < table.labels else ""}>{escape(text)}</th>'
        for i, text in enumerate(table.head)
    )
    rows = "\n".join(_row(table, index) for index in range(len(table.rows)))
    caption = f"<p>{escape(table.caption)}</p>\n" if table.caption else ""
    notes = "".join(
        f'<li id="{_anchor(table, note.mark)}"><sup>{escape(note.mark)}</sup> {escape(note.text)}</li>\n'
        for note in table.notes
    )
    return (
        f'<section id="{escape(table.name)}">\n<h2>{escape(table.title)}{_marks(table, table.marks)}</h2>\n'
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>\n"
        f'{caption}<ul class="notes">\n{notes}</ul>\n</section>'
    )


def _row(table: Table, index: int) -> str:
    blank = repeats(table, index)
    cells = []
    for column, cell in enumerate(table.rows[index]):
        content = join(cell, lambda part: f"<b>{part}</b>", escape) + _marks(table, cell.marks)
        if column >= table.labels:
            cells.append(f"<td{' class=none' if len(cell.values) == 1 else ''}>{content}</td>")
        elif column >= blank:
            cells.append(_label(table, index, column, content))
    return f"<tr{' class=first' if not blank else ''}>{''.join(cells)}</tr>"


def _label(table: Table, index: int, column: int, content: str) -> str:
    """A row's label; all labels but the last span the rows that repeat them."""
    if column == table.labels - 1:
        return f'<th scope="row">{content}</th>'
    span = 1
    while index + span < len(table.rows) and repeats(table, index + span) > column:
        span += 1
    return f'<th scope="row" class="group" rowspan="{span}">{content}</th>'


def _marks(table: Table, marks: Sequence[str]) -> str:
    if not marks:
        return ""
    links = ",".join(f'<a href="#{_anchor(table, mark)}">{escape(mark)}</a>' for mark in marks)
    return f"<sup>{links}</sup>"


def _anchor(table: Table, mark: str) -> str:
    return escape(f"{table.name}-note-{mark}")
