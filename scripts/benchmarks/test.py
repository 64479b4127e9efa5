"""What a prediction rule costs in test.py: wall clock of the whole command, one rule against another."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
WAYS = {"-p max": ("max",), "-p rankdice": ("rankdice",), "-p T -p max -p rankdice": ("T", "max", "rankdice")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "-r", "--resume", type=Path, help="a checkpoint; a small one is trained where none is given"
    )
    parser.add_argument(
        "--rounds", type=int, default=5, help="how many rounds the medians are of (default 5)"
    )
    parser.add_argument("overrides", nargs="*", help="of test.py, such as split=val or dataset.root=PATH")


def main(args: argparse.Namespace) -> None:
    """Print seconds and ratios to `-p max`, start-up included, each way in turn so that drift meets all alike."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.resume or small(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in WAYS}
        for _ in tqdm(range(args.rounds), desc="rounds", disable=None):
            for name, rules in WAYS.items():
                chosen = [word for rule in rules for word in ("-p", rule)]
                begun = time.perf_counter()
                call("test.py", "-r", str(checkpoint), *chosen, "--out", folder, "--quiet", *args.overrides)
                seconds[name].append(time.perf_counter() - begun)
    base = median(seconds["-p max"])
    print("| python test.py -r CHECKPOINT | seconds | against `-p max` |\n|---|---|---|")
    for name, values in seconds.items():
        print(f"| `{name}` | {median(values):.2f} | {median(values) / base:.2f} |")


def small(folder: Path) -> Path:
    """A network trained for a moment on the built-in data; testing takes as long as for a good one."""
    call("train.py", "epochs=1", "dataset.num_images={train: 16, val: 2, test: 100}", f"save_dir={folder}")
    return next(folder.rglob("best_model.pth"))


def call(command: str, *arguments: str) -> None:
    """Run a command of the project, and say what it said if it fails."""
    done = subprocess.run(
        [sys.executable, str(ROOT / command), *arguments],
        capture_output=True,
        text=True,
        env=dict(os.environ),
    )
    if done.returncode:
        raise ValueError(f"{command} failed: {done.stderr.strip()}")
