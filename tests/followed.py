"""Documents followed to the letter: a copy of the repository, and the commands of a text run in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

CODE = ("configs", "datasets", "models", "rankseg", "trainers", "scripts")
# Each command in turn, in one process: starting one costs seconds.
FOLLOW = """
import os, runpy, shlex, sys
for command in sys.stdin.read().splitlines():
    python, script, *arguments = shlex.split(command)
    assert python == "python", command
    sys.argv, sys.path[0] = [script, *arguments], os.path.dirname(os.path.abspath(script))  # as Python does
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as done:
        assert not done.code, command
"""


def commands(text: str) -> list[str]:
    """The lines of all blocks of a text that are typed into a shell, without what explains them."""
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL))
    lines = re.sub(r"\s*\\\n\s*", " ", blocks).splitlines()
    return [re.split(r" {2,}#", line)[0].rstrip() for line in lines if line.strip()]


def copy_code(root: Path, target: Path) -> Path:
    """Copy what commands need of the repository, with the records of our own runs."""
    for name in CODE:
        shutil.copytree(root / name, target / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "saved" / "published", target / "saved" / "published")
    for name in ("train.py", "test.py"):
        shutil.copy(root / name, target)
    return target


def follow(lines: Iterable[str], copy: Path) -> str:
    """Run commands in a copy of the repository; return what they print."""
    done = subprocess.run(
        [sys.executable, "-c", FOLLOW],
        input="\n".join(lines),
        cwd=copy,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
