"""Write docs/configuration.md: every file of configs/, in the order of the groups.

    python scripts/config_reference.py

The comments in the YAML files are the documentation. For experiments and launchers, only the header is shown.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.compose import CONFIGS, options
from scripts import ROOT
from scripts.common import command_line

PAGE = ROOT / "docs" / "configuration.md"
INTRODUCTION = """\
# Configuration

<!-- `python scripts/config_reference.py` writes this page from configs/: change the comments there, not this page -->

`python train.py GROUP=OPTION KEY=VALUE ...` chooses options and sets keys. `python train.py --help` lists them, and
`python train.py --cfg job` prints the resulting configuration. `test.py`, and every script that reads a checkpoint,
start from the configuration stored in the checkpoint and accept the same overrides. They reject keys that only
training uses, such as `epochs`, and `device`, for which they have `--device`.

A key of a group is written with the name of the group: `dataset.crop=256`. A value such as `${dataset.epochs}`
follows another key. Write lists as `'validation=[T,rankdice]'` and an empty value as `null`.
"""
GROUPS = {
    "dataset": "Images, labels, augmentation, and the length of training that suits them.",
    "model": "The network.",
    "loss": "The training loss. RankDice needs probabilities, so choose a strictly proper loss: `ce` or `bce`.",
    "optimizer": "The optimizer.",
    "schedule": "The learning rate of every update.",
    "predictor": (
        "The prediction rule. `test.py -p NAME` accepts several; without `-p`, it scores that of `predictor=NAME`, or\n"
        "`rankdice`. `-p NAME predictor.KEY=VALUE` sets an option of the rule; with several rules, add\n"
        "`predictor=NAME`. Results of a rule with other options than in its file have a folder of their own, such as\n"
        "`results/T_fit_per_class_true/`."
    ),
    "protocol": "The conventions of scoring and of void pixels ([differences](protocol.md)).",
    "trainer": "Precision, memory, checkpoints and logs.",
    "experiment": "Complete experiments: `python train.py experiment=NAME`.",
    "launcher": "Where a sweep runs ([more](engine.md#launchers)): `python train.py launcher=NAME ...`.",
}
HEADER_ONLY = ("experiment", "launcher")


def page() -> str:
    """Return the text of the page."""
    parts = [INTRODUCTION]
    for name in ("train", "test"):
        parts.append(f"## Top level of `{name}.py`\n\n{_block(CONFIGS / f'{name}.yaml')}")
    for group, about in GROUPS.items():
        parts.append(f"## `{group}`\n\n{about}\n")
        for option in options(group):
            path = CONFIGS / group / f"{option}.yaml"
            parts.append(f"`{group}={option}`\n\n{_block(path, group in HEADER_ONLY)}")
    return "\n".join(parts)


def _block(path: Path, header_only: bool = False) -> str:
    """Return a YAML file as a code block, without Hydra's own settings; with ``header_only``, its first comment."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("# @")]
    if header_only:
        lines = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
    lines = list(itertools.takewhile(lambda line: not line.startswith("hydra:"), lines))
    return "\n".join(["```yaml", *lines, "```"]).replace("\n\n```", "\n```") + "\n"


if __name__ == "__main__":
    command_line(__doc__).parse_args()
    PAGE.write_text(page(), encoding="utf-8")
