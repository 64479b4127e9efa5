"""Documents followed to the letter: what a text says to type, typed in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

CODE = ("configs", "datasets", "models", "rankseg", "trainers", "scripts", "docs")
# Each command in turn, in one process, since starting one costs seconds; what starts processes that import the
# script again gets one of its own.
FOLLOW = """
import glob, os, runpy, shlex, subprocess, sys

def expand(word):
    return sorted(glob.glob(word)) or [word] if "*" in word else [word]  # as a shell does

for command in sys.stdin.read().splitlines():
    print("$", command, flush=True)
    program, *words = [part for word in shlex.split(command) for part in expand(word)]
    assert program in ("python", "torchrun"), command
    if program == "torchrun" or any(word.startswith("launcher=") for word in words):
        module = ["-m", "torch.distributed.run"] if program == "torchrun" else []
        assert subprocess.run([sys.executable, *module, *words]).returncode == 0, command
        continue
    sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))  # as Python does
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as done:
        assert not done.code, command
"""


def typed(text: str) -> list[str]:
    """What is typed into a shell in the blocks of a text, a command a line, without what explains it."""
    found = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found += ["\n".join(re.findall(r"^\$ (.*)", block, re.MULTILINE)) for block in _transcripts(text)]
    lines = re.sub(r"\s*\\\n\s*", " ", "\n".join(found)).splitlines()
    return [re.split(r" {2,}#", line)[0].rstrip() for line in lines if line.strip()]


def commands(text: str) -> list[str]:
    """Every command of a text once, those within sentences too."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spoken = re.findall(r"`((?:python|torchrun|make) [^`]+)`", prose)
    return list(dict.fromkeys([*typed(text), *spoken]))


def _transcripts(text: str) -> list[str]:
    return re.findall(r"```console\n(.*?)```", text, re.DOTALL)


def copy_code(root: Path, target: Path) -> Path:
    """Copy what commands need of the repository, with the published numbers."""
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
