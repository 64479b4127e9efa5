"""Documents followed to the letter: what a text says to type, typed in a copy of the repository."""

from __future__ import annotations

import glob
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.trainers.forked import ROOT, redirect, start

CODE = ("configs", "datasets", "models", "rankseg", "trainers", "scripts", "docs")


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
    """Run commands in a copy of the repository, one after the other in one process; return what they print."""
    out, errors = copy / "followed.out", copy / "followed.err"
    process = start(_follow, list(lines), copy, out, errors)
    process.join()
    assert process.exitcode == 0, out.read_text() + errors.read_text()
    return out.read_text()


def _follow(lines: list[str], copy: Path, out: Path, errors: Path) -> None:
    """Run each command with the code of the copy. What starts processes that import the script again gets its own."""
    redirect(out, errors)
    os.chdir(copy)
    for name in [name for name in sys.modules if name.partition(".")[0] in (*CODE, "train", "test")]:
        del sys.modules[name]
    sys.path = ["", *(path for path in sys.path if path not in ("", str(ROOT)))]
    for command in lines:
        print("$", command, flush=True)
        program, *words = [part for word in shlex.split(command) for part in _expand(word)]
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


def _expand(word: str) -> list[str]:
    """Replace a pattern by the files that match it, as a shell does."""
    return sorted(glob.glob(word)) or [word] if "*" in word else [word]
