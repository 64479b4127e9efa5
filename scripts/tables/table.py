"""What a table is before it is Markdown, CSV or LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    "max": "Argmax",
    "rankdice": "mRankDice",
    "rankdice_paper": "mRankDice (the paper's)",
    "rankiou": "mRankIoU",
    "rankdice_nonoverlap": "mRankDice, one label a pixel",
    "rankiou_nonoverlap": "mRankIoU, one label a pixel",
    "rankdice_trna": "mRankDice, T-RNA",
    "rankdice_ba": "mRankDice, BA",
}


@dataclass(frozen=True)
class Cell:
    """One cell: its values as they are printed, which of them are bold, and the marks of its notes.

    Two values or more are printed in parentheses, one alone is printed bare ("/", "missing", a label).
    """

    values: tuple[str, ...]
    bold: tuple[bool, ...] = ()
    marks: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The cell without bold and marks, as it stands in the paper: "(56.00, 48.40)"."""
        return f"({', '.join(self.values)})" if len(self.values) > 1 else self.values[0]


@dataclass(frozen=True)
class Note:
    """The reason behind a mark."""

    mark: str
    text: str


@dataclass(frozen=True)
class Table:
    """`labels` columns of labels, then columns of cells; `parts` names a cell's values in the CSV file."""

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
    """A cell that names a row."""
    return Cell((text,), marks=tuple(marks))


def missing(text: str = "missing") -> Cell:
    """A cell without a number, which says so."""
    return Cell((text,))
