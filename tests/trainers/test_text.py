"""Names from files cannot become formulas, table separators or LaTeX commands, and are read back unchanged."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.files import shell_word
from trainers.metrics import Counts
from trainers.results import EvalResult
from trainers.text import csv_text, latex_label, latex_text, markdown_cell, read_csv

HOSTILE = [
    '=HYPERLINK("http://x")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''=1",
    " =1",
    "＝1",
    "a\nb",
    "a\rb",
    "a,b",
    'a"b',
    "a|b",
    "a\\|b",
    "<script>alert(1)</script>",
    "\\input{/etc/passwd}",
    "x}\\immediate\\write18{id}\\label{y",
    "![x](http://x)",
    "[h]",
    "*",
    "'",
    "a\\nb",
    "a\\",
    "a\\\nb",
    "\x1b[2Kerror: b",
    "a\u202egnp.b",
    "\u2028",
    "\udce9",
]
FORMULA = re.compile(r"\s*[=+\-@＝＋－＠]|[\t\r\n]")


@given(st.lists(st.text(st.characters() | st.sampled_from("\\nrtxu01'=\n\t")), min_size=1))
def test_csv_text_is_one_line_per_row_and_read_back_unchanged(names: list[str]) -> None:
    text = csv_text([("image", "x"), *((name, 1) for name in [*names, *HOSTILE])])
    assert len(text.splitlines()) == 1 + len(names) + len(HOSTILE) and text.replace("\n", "").isprintable()
    assert [row["image"] for row in read_csv(text)] == [*names, *HOSTILE]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_cell_of_a_csv_file_is_a_formula(name: str) -> None:
    raw = list(csv.reader(csv_text([["image"], [name]]).splitlines(keepends=True)))
    assert not FORMULA.match(raw[1][0])


@pytest.mark.parametrize("value", ["+1.07", "-3", "0.5", "-1e-09", "---", -2, -0.25])
def test_numbers_stay_numbers(value: object) -> None:
    assert csv_text([[value]]) == f"{value}\n"


@pytest.mark.parametrize("name", HOSTILE)
def test_a_markdown_cell_stays_one_cell(name: str) -> None:
    cell = markdown_cell(name)
    assert cell.isprintable() and "<" not in cell and "![" not in cell
    # GitHub splits at each | that is not escaped: pairs of backslashes are backslashes
    assert not re.search(r"(?<!\\)(?:\\\\)*\|", cell)


@pytest.mark.parametrize("name", HOSTILE)
def test_latex_prints_every_character(name: str) -> None:
    text = latex_text(name)
    assert text.isprintable() and not text.startswith(("[", "*"))
    commands = set(re.findall(r"\\[a-zA-Z]+", text))
    assert commands <= {"\\textbackslash", "\\textasciitilde", "\\textasciicircum", "\\textbar", "\\textless"} | {
        "\\textgreater"
    }
    assert text.count("{") == text.count("}")
    assert re.fullmatch(r"[A-Za-z0-9_:.-]*", latex_label(name))


@pytest.mark.parametrize("name", [*HOSTILE, "it's\n\\x", "a b"])
def test_a_printed_command_is_one_line_with_the_name_itself(name: str) -> None:
    word = shell_word(name)
    done = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, check=True)
    assert word.isprintable() and done.stdout == os.fsencode(name)


def test_results_with_hostile_image_names_are_read_back(tmp_path) -> None:
    names = [*HOSTILE, os.fsdecode(b"Latin-1 \xe9.png")]  # not UTF-8
    ones = torch.ones(len(names), 1, dtype=torch.int64)
    result = EvalResult("T", names, Counts(ones, ones, ones, ones[:, 0]), (0,), {}, 0.0)
    path = result.save(tmp_path, {})
    with open(path.with_suffix(".csv"), newline="", encoding="utf-8", errors="surrogateescape") as file:
        assert [row["image"] for row in read_csv(file.read())] == names
    assert json.loads(path.read_text())["images"] == names
