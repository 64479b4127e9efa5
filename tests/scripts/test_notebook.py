"""The notebook runs from top to bottom, and what it shows holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "scripts" / "rankdice.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]


def test_it_is_kept_without_outputs(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert sum("parameters" in cell["metadata"].get("tags", []) for cell in code) == 1
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_it_runs_and_no_rule_promises_more_than_rankdice(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="the notebook draws with matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    monkeypatch.chdir(NOTEBOOK.parent)
    drawn: list[int] = []
    monkeypatch.setattr(plt, "show", lambda: drawn.append(len(plt.gcf().axes)))
    names: dict[str, Any] = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            if "parameters" in cell["metadata"].get("tags", []):
                source += "\nsteps, batch_size = 40, 3"
            exec(compile(source, f"{NOTEBOOK.name}:{cell['id']}", "exec"), names)
    plt.close("all")
    assert len(drawn) == 3 and drawn[1] % 6 == 0  # the cut-offs, the panels, the scatter
    predicted = names["predicted"]
    assert predicted.any(), "after so little training the network should see something"
    for rule, expected in names["expected"].items():
        assert (names["expected"]["rankdice"] - expected)[predicted].min() >= -1e-9, rule
    cut = names["cutoffs"][predicted]
    assert ((cut > 0) & (cut <= 0.5)).all()
