"""What git keeps of a run: results, journal, configuration, report.json; no checkpoint, no absolute path."""

from __future__ import annotations

import os
from pathlib import Path

from scripts.grid.cells import Cell

KEPT = (
    *("config.yaml", "metrics.jsonl", "provenance.json", "report/report.json"),
    *("results/**/*.json", "results/**/*.csv"),
)


def record(cell: Cell, folder: Path, root: Path) -> int:
    """Copy a run's small files to ``folder/<dataset>/<model>/<loss>/seed<k>``; return how many.

    Absolute paths of the data and the runs become relative to the repository, which ``root`` is.
    """
    paths = {str(Path(cell.cfg.save_dir).resolve()), str(root)}
    if cell.cfg.dataset.get("root"):
        paths.add(str(Path(cell.cfg.dataset.root).expanduser().resolve()))
    names = sorted(path for pattern in KEPT for path in cell.folder.glob(pattern))
    for path in names:
        text = path.read_text(encoding="utf-8")
        for absolute in sorted(paths, key=len, reverse=True):
            text = text.replace(absolute, os.path.relpath(absolute, root))
        copy = folder / str(cell) / path.relative_to(cell.folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(text, encoding="utf-8")
    return len(names)
