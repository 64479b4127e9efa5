"""TAB in each shell, typed as a user would; a shell that is not installed is skipped."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PYTHON = Path(sys.executable)
ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[a-zA-Z]|\x1b[()=>][0-9A-Z]?")


def environment(home: Path) -> dict[str, str]:
    path = f"{PYTHON.parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "HOME": str(home), "ZDOTDIR": str(home), "TERM": "dumb"}


class Terminal:
    """A shell at a terminal."""

    def __init__(self, command: list[str], home: Path) -> None:
        self.end, theirs = pty.openpty()
        self.shell = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=environment(home), start_new_session=True
        )
        os.close(theirs)

    def type(self, keys: str, until: str, seconds: float = 60) -> None:
        """Type, and wait until something is shown."""
        os.write(self.end, keys.encode())
        shown, deadline = b"", time.monotonic() + seconds
        while until.encode() not in ESCAPES.sub(b"", shown):
            assert time.monotonic() < deadline, shown.decode(errors="replace")
            if select.select([self.end], [], [], 0.1)[0]:
                shown += os.read(self.end, 1 << 16)


@pytest.mark.parametrize(("shell", "options"), [("bash", ["--norc", "--noprofile", "-i"]), ("zsh", ["-f", "-i"])])
def test_a_tab_completes(shell: str, options: list[str], tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    terminal = Terminal([shell, *options], tmp_path)
    try:
        terminal.type(f'eval "$({PYTHON.name} train.py -sc install={shell})"; echo re""ady\n', "ready")
        terminal.type(f"{PYTHON.name} train.py loss=lov\t", "asz")
        terminal.type(" trainer.prec\t", "ision=")
    finally:
        terminal.shell.kill()
        terminal.shell.wait()
        os.close(terminal.end)


def test_a_tab_completes_in_fish(tmp_path: Path) -> None:
    """Fish tells what it would offer."""
    if not shutil.which("fish"):
        pytest.skip("fish is not installed")
    typed = f"""eval "$({PYTHON.name} train.py -sc install=fish)"; complete -C '{PYTHON.name} train.py loss=lo'"""
    done = subprocess.run(
        ["fish", "--no-config", "-c", typed], capture_output=True, text=True, cwd=ROOT, env=environment(tmp_path)
    )
    assert done.stderr == "" and set(done.stdout.split()) == {"loss=lovasz", "loss=log_cosh_dice"}
