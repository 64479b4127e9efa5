"""docs/anywhere.md: its commands run as typed, and its files are those that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import rankseg
from tests.followed import follow, typed

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "anywhere.md").read_text(encoding="utf-8")


def test_the_commands_run(tmp_path: Path) -> None:
    pytest.importorskip("nibabel")
    lines = typed(PAGE)
    assert len(lines) == 6
    small = [
        c.replace("scripts/", f"{ROOT}/scripts/")
        .replace("--cases 6 --size 48", "--cases 5 --size 16")
        .replace("--size 48", "--size 16")
        for c in lines
    ]
    follow(small, tmp_path)
    written = {p.relative_to(tmp_path / "decoded").as_posix() for p in (tmp_path / "decoded").rglob("*.*")}
    assert {"masks/rankdice/case_0.nii.gz", "scored/max/case_4.nii.gz", "scored/confidence.csv"} <= written
    assert "scored/results/rankdice_nonoverlap.json" in written
    assert {"scored/report/index.html", "scored/paired_statistics.md"} <= written
    assert {"fitted/decode.fitted.json", "fitted/T_fit/case_0.nii.gz", "fitted/results/auto.json"} <= written


def test_the_binary_counts_are_true() -> None:
    torch.manual_seed(0)
    p = torch.sigmoid(1.5 * torch.randn(64, 64) - 1.5)[None, None]
    two = torch.cat([1 - p, p], 1)
    both = int(rankseg.rankdice(two, allow_overlap=False)[0, 1].sum())
    assert f"{both} against {int(rankseg.rankdice(p).sum())} pixels" in PAGE


def test_every_adapter_is_listed() -> None:
    assert set(re.findall(r"`(use_\w+\.py)`", PAGE)) == {p.name for p in (ROOT / "scripts/adapters").glob("use_*.py")}
