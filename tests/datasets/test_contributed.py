"""The data set of one's own in CONTRIBUTING.md: its two files as they stand, trained on and scored."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from tests.followed import copy_code, follow
from tests.trees import labels, picture


def test_the_data_set_of_the_instructions(root: Path, tmp_path: Path) -> None:
    text = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A data set of your own\n")[1].split("\n## ")[0]
    (code,), (config,) = (re.findall(rf"```{kind}\n(.*?)```", section, re.DOTALL) for kind in ("python", "yaml"))
    copy = copy_code(root, tmp_path / "repository")
    (copy / "my_data.py").write_text(code)
    (copy / "configs" / "dataset" / "arrays.yaml").write_text(config)
    for split, count in (("train", 4), ("val", 2)):
        (tmp_path / "cells" / split).mkdir(parents=True)
        for k in range(count):
            image, mask = np.asarray(picture(k, (60, 50))), labels(k, (60, 50), 1)
            np.savez(tmp_path / "cells" / split / f"{k}.npz", image=image, mask=mask)
    data = f"dataset=arrays dataset.root={tmp_path / 'cells'}"
    follow(
        [
            f"python train.py {data} model=tiny epochs=1 trainer.tensorboard=false",
            "python test.py -r saved/arrays/tiny/ce/seed0/last.pth -p T",
        ],
        copy,
    )
    result = json.loads((copy / "saved/arrays/tiny/ce/seed0/results/of_last/T.json").read_text())
    assert result["images"] == ["0", "1"] and result["classes"] == ["background", "cell"]
