"""A table as data, and its text as Markdown, CSV or LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainers.text import csv_text, latex_label, latex_text, markdown_cell, markdown_text

DATASETS = {"cityscapes": "Cityscapes", "voc2012": "PASCAL VOC 2012", "kvasir_seg": "Kvasir-SEG"}
MODELS = {"deeplabv3plus": "DeepLabV3+", "pspnet": "PSPNet", "fcn8": "FCN8"}
LOSSES = {
    "ce": "CE",
    "focal": "Focal",
    "bce": "BCE",
    "soft_dice": "Soft-Dice",
    "b_soft_dice": "B-Soft-Dice",
    "lovasz": "LovaszSoftmax",
    "ce_dice": "CE + Dice",
    "bce_focal": "BCE-Focal",
    "log_cosh_dice": "Log-cosh-Dice",
}
RULES = {
    "T": "Threshold (at 0.5)",
    "T_fit": "Threshold (fitted)",
    "max": "Argmax",
    "rankdice": "mRankDice",
    "rankdice_paper": "mRankDice (the paper's)",
    "rankiou": "mRankIoU",
    "rankdice_nonoverlap": "mRankDice, one label per pixel",
    "rankiou_nonoverlap": "mRankIoU, one label per pixel",
    "rankdice_trna": "mRankDice, T-RNA",
    "rankdice_ba": "mRankDice, BA",
    "pooled_dice": "Pooled Dice",
    "pooled_iou": "Pooled IoU",
    "auto": "Chosen on validation images",
}


@dataclass(frozen=True)
class Cell:
    """A table cell: its printed values, which of them are bold, and the marks of its notes.

    Two or more values are printed in parentheses, one value ("/", "missing", a label) without.
    """

    values: tuple[str, ...]
    bold: tuple[bool, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """Return the cell without bold and marks, as the paper prints it: "(56.00, 48.40)"."""
        return f"({', '.join(self.values)})" if len(self.values) > 1 else self.values[0]


@dataclass(frozen=True)
class Note:
    """The explanation of a mark."""

    mark: str
    text: str


class Notes:
    """The notes of one table; equal reasons share a mark."""

    def __init__(self) -> None:
        self._marks: dict[str, str] = {}

    def mark(self, reason: str) -> str:
        """Return the mark of this reason."""
        return self._marks.setdefault(reason, str(len(self._marks) + 1))

    def all(self) -> tuple[Note, ...]:
        """Return the notes in the order of their marks."""
        return tuple(Note(mark, reason) for reason, mark in self._marks.items())


@dataclass(frozen=True)
class Table:
    """A table: `labels` columns of labels, then columns of cells; `parts` names the values of a cell in CSV."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int
    parts: tuple[str, ...]
    notes: tuple[Note, ...] = ()
    marks: tuple[str, ...] = ()
    caption: str = ""


def label(text: str, marks: Sequence[str] = ()) -> Cell:
    """Return a cell that names a row."""
    return Cell((text,), marks=tuple(marks))


def missing(text: str = "missing") -> Cell:
    """Return a cell for a result that does not exist."""
    return Cell((text,))


def join(cell: Cell, bold: Callable[[str], str], escape: Callable[[str], str] = str) -> str:
    """Return the text of a cell with its bold parts formatted; the caller adds the marks."""
    bolds = cell.bold or (False,) * len(cell.values)
    parts = [bold(escape(value)) if b else escape(value) for value, b in zip(cell.values, bolds, strict=True)]
    return f"({', '.join(parts)})" if len(parts) > 1 else parts[0]


def repeats(table: Table, index: int) -> int:
    """Return how many leading labels of row `index` repeat the row above; the last label never counts."""
    if index == 0:
        return 0
    count = 0
    for above, here in zip(table.rows[index - 1][: table.labels - 1], table.rows[index], strict=False):
        if above != here:
            break
        count += 1
    return count


def markdown(table: Table) -> str:
    """Return a GitHub table under its title; repeated labels are blank, notes are below."""

    def superscript(marks: Sequence[str]) -> str:
        return f"<sup>{','.join(marks)}</sup>" if marks else ""

    def text(cell: Cell) -> str:
        return join(cell, lambda part: f"**{part}**", markdown_cell) + superscript(cell.marks)

    lines = [f"**{markdown_text(table.title)}**{superscript(table.marks)}", ""]
    lines.append("| " + " | ".join(map(markdown_cell, table.head)) + " |")
    lines.append("|" + "|".join(" :-- " if i < table.labels else " :-: " for i in range(len(table.head))) + "|")
    for index, row in enumerate(table.rows):
        blank = repeats(table, index)
        lines.append("| " + " | ".join("" if i < blank else text(cell) for i, cell in enumerate(row)) + " |")
    if table.caption:
        lines += ["", markdown_text(table.caption)]
    for note in table.notes:
        lines += ["", f"<sup>{note.mark}</sup> {markdown_text(note.text)}"]
    return "\n".join(lines) + "\n"


def csv_tables(tables: Sequence[Table]) -> str:
    """Return all tables below each other, each with its header; values and marks have separate columns."""
    rows: list[list[str]] = []
    for table in tables:
        rows += [[]] * bool(rows)
        heads = [f"{head} {part}" for head in table.head[table.labels :] for part in (*table.parts, "marks")]
        rows.append(["table", *table.head[: table.labels], *heads])
        for row in table.rows:
            values = [part for cell in row[table.labels :] for part in _spread(cell, len(table.parts))]
            rows.append([table.name, *(cell.text for cell in row[: table.labels]), *values])
    return csv_text(rows)


def _spread(cell: Cell, parts: int) -> list[str]:
    """Return the values of a cell for its CSV columns; a symbol is in the first column."""
    return [*cell.values, *[""] * (parts - len(cell.values)), " ".join(cell.marks)]


def latex(table: Table) -> str:
    """Return a LaTeX `table` environment; it needs the package booktabs only."""

    def superscript(marks: Sequence[str]) -> str:
        return f"$^{{{','.join(marks)}}}$" if marks else ""

    def text(cell: Cell) -> str:
        return join(cell, lambda part: rf"\textbf{{{part}}}", latex_text) + superscript(cell.marks)

    align = "l" * table.labels + "c" * (len(table.head) - table.labels)
    lines = [r"\begin{table}[t]", r"\centering", r"\small"]
    lines.append(rf"\caption{{{latex_text(table.title)}{superscript(table.marks)}}}")
    lines += [rf"\label{{tab:{latex_label(table.name)}}}", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(map(latex_text, table.head)) + r" \\", r"\midrule"]
    for index, row in enumerate(table.rows):
        blank = repeats(table, index)
        if index and table.labels > 1 and not blank:
            lines.append(r"\midrule")
        lines.append(" & ".join("" if i < blank else text(cell) for i, cell in enumerate(row)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    reasons = [f"$^{{{note.mark}}}$ {latex_text(note.text)}" for note in table.notes]
    if table.caption:
        reasons.insert(0, latex_text(table.caption))
    if reasons:
        lines += [r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [" \\par\n".join(reasons), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"
