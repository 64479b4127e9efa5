"""Escape text for CSV, Markdown and LaTeX files.

Names of images, classes and protocols come from untrusted files. A spreadsheet runs a cell such as
``=HYPERLINK(...)`` as a formula, a ``|`` or a line break splits a Markdown table, and LaTeX runs ``\\input{...}``.
Every module that writes such a file escapes its text here. HTML pages are rendered by jinja2 with autoescape.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from configs.errors import one_line

# Text that a spreadsheet may read as a formula; plain numbers and dashes are harmless and stay as they are.
_FORMULA = re.compile(r"'*(?:[\t\r\n]|\s*[=+\-@＝＋－＠])")
_HARMLESS = re.compile(r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|-+")
# The escapes of `one_line`, and an escaped backslash.
_ESCAPE = re.compile(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    # After \\ or an item, LaTeX reads a bracket or a star as an argument.
    **{character: f"{{{character}}}" for character in "[]*"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "−": "$-$",
    "–": "--",
    "—": "---",
}


def csv_cell(value: Any) -> Any:
    """Return a cell on one line. Text that a spreadsheet could run as a formula gets an apostrophe in front.

    Characters that do not print are written as Python's escapes, and a backslash as two.
    """
    if not isinstance(value, str):
        return value
    text = one_line(value.replace("\\", "\\\\"))
    return f"'{text}" if _FORMULA.match(text) and not _HARMLESS.fullmatch(text) else text


def csv_value(cell: str) -> str:
    """Return the text that `csv_cell` was given."""
    text = cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
    return _ESCAPE.sub(lambda found: found[0].encode().decode("unicode_escape"), text)


def csv_text(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as the text of a CSV file; text cells are escaped by `csv_cell`."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\n").writerows([csv_cell(value) for value in row] for row in rows)
    return buffer.getvalue()


def read_csv(text: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a CSV file as dictionaries; text is as it was before `csv_text` escaped it."""
    for row in csv.DictReader(io.StringIO(text, newline="")):
        yield {key: csv_value(cell or "") for key, cell in row.items() if key is not None}


def markdown_text(text: str) -> str:
    """Return plain text for a Markdown paragraph: one line, no HTML, no image."""
    return one_line(text).replace("\\", "\\\\").replace("<", "&lt;").replace("![", "!\\[")


def markdown_cell(text: str) -> str:
    """Return plain text for a cell of a Markdown table."""
    return markdown_text(text).replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]], labels: int = 1) -> str:
    """Return a Markdown table without a line break at its end; the first ``labels`` columns are left-aligned."""
    lines = [f"| {' | '.join(map(markdown_cell, row))} |" for row in (head, *rows)]
    marks = [":--"] * labels + ["--:"] * (len(head) - labels)
    return "\n".join([lines[0], f"| {' | '.join(marks)} |", *lines[1:]])


def latex_text(text: str) -> str:
    """Return plain text for LaTeX; characters with a meaning in LaTeX are escaped."""
    return "".join(_LATEX.get(character, character) for character in one_line(text))


def latex_label(text: str) -> str:
    """Return a name for ``\\label``: letters, digits, ``_``, ``:``, ``.``, ``-``; others become ``-``."""
    return re.sub(r"[^A-Za-z0-9_:.-]", "-", text)
