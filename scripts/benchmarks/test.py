"""Time of the whole command test.py with one prediction rule against another."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from configs.errors import UserError
from scripts import ROOT
from scripts.benchmarks.timing import Seconds, print_table, time_in_turn

RULES = ("-p max", "-p rankdice", "-p T -p max -p rankdice")
IDLE = "(start-up alone: --help)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-r", "--resume", type=Path, help="checkpoint (default: a small network is trained)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; a time is the median over them (default 5)")
    # So many images that the time of start-up does not hide the difference between the rules.
    parser.add_argument("--images", type=int, default=1000, help="built-in test images without -r (default 1000)")
    parser.add_argument("overrides", nargs="*", help="as for test.py, such as split=val or dataset.root=PATH")


def main(args: argparse.Namespace) -> None:
    """Print seconds and ratios of the commands."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.resume or train_small(Path(folder), args.images)
        more = ["-r", str(checkpoint), "--out", folder, "--quiet", *args.overrides]
        candidates = {name: partial(call, "test.py", *name.split(), *more) for name in RULES}
        candidates[IDLE] = partial(call, "test.py", "--help")
        print_ratios(time_in_turn(candidates, args.rounds, warm_up=0))


def print_ratios(seconds: dict[str, Seconds]) -> None:
    """Print the seconds of each command, and the ratios to each of the single rules."""
    rows = []
    for name, spent in seconds.items():
        row = [f"`{name}`"]
        for mine, first, second in zip(spent, seconds["-p max"], seconds["-p rankdice"], strict=True):
            row += [f"{mine:.2f}", f"{mine / first:.2f}", f"{mine / second:.2f}"]
        rows.append(row)
    ratios = ["/ max", "/ rankdice"]
    print_table(["python test.py -r CHECKPOINT", "seconds", *ratios, "processor", *ratios], rows)


def train_small(folder: Path, images: int) -> Path:
    """Train a network for one epoch on 16 built-in images; testing it takes as long as testing a good one."""
    call("train.py", "epochs=1", f"dataset.num_images={{train: 16, val: 2, test: {images}}}", f"save_dir={folder}")
    return next(folder.rglob("best_model.pth"))


def call(command: str, *arguments: str) -> None:
    """Run a command of the project; raise UserError with its message if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / command), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command} failed: {done.stderr.strip()}")
