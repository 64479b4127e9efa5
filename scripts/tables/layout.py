"""A table as data, and its text as Markdown, CSV or LaTeX."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

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


def mark_of(reason: str, notes: dict[str, str]) -> str:
    """Return the mark of a reason. A new reason is added to `notes` (reason -> mark); equal reasons share a mark."""
    return notes.setdefault(reason, str(len(notes) + 1))


@dataclass(frozen=True)
class Table:
    """A table: `labels` columns of labels, then columns of cells. `notes` has the text of each mark."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    labels: int
    notes: Mapping[str, str] = field(default_factory=dict)
    marks: tuple[str, ...] = ()
    caption: str = ""


def label(text: str, marks: Sequence[str] = ()) -> Cell:
    """Return a cell with one text, such as the name of a row."""
    return Cell((text,), marks=tuple(marks))


@dataclass(frozen=True)
class Style:
    """The markup of a format: bold text, marks, and the function that escapes text."""

    bold: str
    marks: str
    escape: Callable[[str], str]

    def superscript(self, marks: Sequence[str]) -> str:
        """Return marks as a superscript; nothing without marks."""
        return self.marks.format(",".join(marks)) if marks else ""

    def text(self, cell: Cell) -> str:
        """Return a cell as text."""
        bolds = cell.bold or (False,) * len(cell.values)
        escaped = map(self.escape, cell.values)
        parts = [self.bold.format(value) if b else value for value, b in zip(escaped, bolds, strict=True)]
        return (f"({', '.join(parts)})" if len(parts) > 1 else parts[0]) + self.superscript(cell.marks)

    def rows(self, table: Table) -> Iterator[list[str]]:
        """Yield the texts of each row. Leading labels that repeat the row above are blank, but never the last label."""
        above: Sequence[Cell] = ()
        for row in table.rows:
            first = 0
            while above and first < table.labels - 1 and row[first] == above[first]:
                first += 1
            yield [""] * first + [self.text(cell) for cell in row[first:]]
            above = row


_MARKDOWN = Style("**{}**", "<sup>{}</sup>", markdown_cell)
_LATEX = Style(r"\textbf{{{}}}", "$^{{{}}}$", latex_text)


def markdown(table: Table) -> str:
    """Return a GitHub table below its title, with caption and notes below it."""
    lines = [f"**{markdown_text(table.title)}**{_MARKDOWN.superscript(table.marks)}", ""]
    lines.append("| " + " | ".join(map(markdown_cell, table.head)) + " |")
    lines.append("|" + "|".join(" :-- " if i < table.labels else " :-: " for i in range(len(table.head))) + "|")
    lines += ["| " + " | ".join(texts) + " |" for texts in _MARKDOWN.rows(table)]
    if table.caption:
        lines += ["", markdown_text(table.caption)]
    for mark, text in table.notes.items():
        lines += ["", f"{_MARKDOWN.superscript([mark])} {markdown_text(text)}"]
    return "\n".join(lines) + "\n"


def csv_tables(tables: Sequence[Table]) -> str:
    """Return all tables below each other, each with its header. A cell has columns for mDice, mIoU and marks."""
    rows: list[list[str]] = []
    for table in tables:
        rows += [[]] * bool(rows)
        heads = [f"{head} {part}" for head in table.head[table.labels :] for part in ("mDice", "mIoU", "marks")]
        rows.append(["table", *table.head[: table.labels], *heads])
        for row in table.rows:
            texts = [table.name, *(cell.text for cell in row[: table.labels])]
            for cell in row[table.labels :]:  # a symbol is in the first of its columns
                texts += [*cell.values, *[""] * (2 - len(cell.values)), " ".join(cell.marks)]
            rows.append(texts)
    return csv_text(rows)


def latex(table: Table) -> str:
    """Return a LaTeX `table` environment; it needs the package booktabs only."""
    align = "l" * table.labels + "c" * (len(table.head) - table.labels)
    lines = [r"\begin{table}[t]", r"\centering", r"\small"]
    lines.append(rf"\caption{{{latex_text(table.title)}{_LATEX.superscript(table.marks)}}}")
    lines += [rf"\label{{tab:{latex_label(table.name)}}}", rf"\begin{{tabular}}{{{align}}}", r"\toprule"]
    lines += [" & ".join(map(latex_text, table.head)) + r" \\", r"\midrule"]
    for index, texts in enumerate(_LATEX.rows(table)):
        if index and table.labels > 1 and texts[0]:
            lines.append(r"\midrule")
        lines.append(" & ".join(texts) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    reasons = [latex_text(table.caption)] * bool(table.caption)
    reasons += [f"{_LATEX.superscript([mark])} {latex_text(text)}" for mark, text in table.notes.items()]
    if reasons:
        lines += [r"\par\medskip", r"\begin{minipage}{\linewidth}\footnotesize"]
        lines += [" \\par\n".join(reasons), r"\end{minipage}"]
    return "\n".join([*lines, r"\end{table}"]) + "\n"
