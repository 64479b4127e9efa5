"""What all scripts have in common: --help, one line about bad input, exit codes, results alone on stdout."""

from __future__ import annotations

import ast
import errno
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from configs.cli import run_cli
from configs.errors import EXIT_BROKEN_PIPE, EXIT_INTERRUPTED
from tests.exits import exit_code

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(p for p in (ROOT / "scripts").glob("[a-z]*.py") if "__main__" in p.read_text(encoding="utf-8"))


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run a script in this process; return its exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        path = ROOT / "scripts" / name
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        code = 0
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as done:
            code = done.code if isinstance(done.code, int) else int(done.code is not None)
        return code, *capsys.readouterr()

    return run


PATHS = re.compile(r"\b(path|folder|out|target|root|saved|record|resume|draw_heatmaps)\b")  # values that may be paths


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.stem)
def test_paths_are_printed_on_one_line(path: Path) -> None:
    """The name of a folder may hold a line break or a command for the terminal: no value that may be a path is raw."""
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not (isinstance(call, ast.Call) and getattr(call.func, "id", "") == "print"):
            continue
        for given in call.args:
            values = [node.value for node in ast.walk(given) if isinstance(node, ast.FormattedValue)] or [given]
            raw = [text for text in map(ast.unparse, values) if PATHS.search(text) and "shell_word" not in text]
            safe = isinstance(given, ast.Call) and ast.unparse(given.func).endswith("one_line")
            assert safe or not raw, f"{path}:{call.lineno}: {raw}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_help(path: Path, call) -> None:
    code, out, err = call(path.name, "--help")
    assert (code, err) == (0, "") and out.startswith(f"usage: {path.name}") and "\x1b" not in out
    if path.stem != "benchmark":
        assert "Exit codes: 0 done" in out and f"python scripts/{path.name}" in out


BAD = [
    ("paper_tables.py", "--saved", "absent"),
    ("paper_tables.py", "published", "--output", "absent/tables.md"),
    ("paired_statistics.py", "absent"),
    ("simulate.py", "absent"),
    ("simulate.py", "step", "--draws", "0"),
    ("convert_checkpoint.py", "absent.pth", "new.pth"),
    ("overview.py", "absent.pth"),
    ("report.py", "absent.pth"),
    ("predict_images.py", "-r", "absent.pth", "absent", "--out", "new"),
    ("prepare_data.py", "split", "absent"),
    ("reproduce.py", "--losses", "cee", "--dry-run"),
    ("reproduce.py", "--protocols", "absent", "--dry-run"),
    ("reproduce.py", "epochs=0", "--dry-run"),
]


@pytest.mark.parametrize("words", BAD, ids=" ".join)
def test_bad_input_is_one_line_on_stderr(words: tuple[str, ...], call) -> None:
    code, out, err = call(*words)
    assert (code, out) == (2, "") and err.startswith("error: ") and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("paired_statistics.py absent --confidence 2", "--confidence=2"),
        ("paired_statistics.py absent --resamples 0", "--resamples=0"),
        ("paired_statistics.py absent --seed -1", "--seed=-1"),
        ("overview.py absent.pth --out new.foo", "--out new.foo"),
        ("paper_tables.py published --output absent/x", "absent/x: No such file or directory: create its folder"),
        ("paper_tables.py published --output .", ".: Is a directory: it is a folder; give a file"),
        ("reproduce.py --seeds x --dry-run", "seed=x"),
        ("reproduce.py --threads 0 --dry-run", "--threads=0"),
        ("reproduce.py epochs=0 --dry-run", "epochs=0"),
        ("report.py absent.pth --images -1", "--images=-1"),
        ("benchmark.py rules --rounds 0", "--rounds=0"),
        ("benchmark.py step --steps 0", "--steps=0"),
    ],
)
def test_invalid_values_are_named_before_anything_is_read(words: str, said: str, call) -> None:
    code, out, err = call(*words.split())
    assert (code, out) == (2, "") and err.startswith(f"error: {said}") and len(err.splitlines()) == 1, err


@pytest.mark.parametrize("words", [BAD[0], BAD[-1]], ids=lambda words: words[0])  # without Hydra, and with it
def test_a_traceback_may_be_asked_for(words: tuple[str, ...], call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEG_TRACEBACK", "1")
    with pytest.raises((ValueError, OSError)):
        call(*words)


def test_a_disk_that_fails_is_not_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "a.md")

    assert exit_code(main) == 3
    assert capsys.readouterr().err == "error: a.md: Read-only file system: choose a folder that can be written\n"


def test_ctrl_c_makes_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as done:
        run_cli(main)
    assert done.value.code == EXIT_INTERRUPTED and capsys.readouterr().err == "stopped: interrupted\n"


def test_a_reader_that_has_gone_makes_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "paper_tables.py"), "published"],
        stdout=writing,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (EXIT_BROKEN_PIPE, "")


@pytest.mark.parametrize(
    ("line", "expected"), [("loss=lo", {"loss=lovasz", "loss=log_cosh_dice"}), ("trainer.prec", {"trainer.precision="})]
)
def test_a_tab_is_answered_without_torch(line: str, expected: set[str], tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    typed = f"python train.py {line}"
    environment = {"COMP_LINE": typed, "COMP_POINT": str(len(typed)), "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-sc", "query=bash"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, **environment},
    )
    assert (done.returncode, done.stderr) == (0, "") and set(done.stdout.split()) == expected
