"""The cost of a prediction rule in test.py: the whole command, one rule against another, and its parts."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from unittest import mock

from configs import build
from configs.checkpoint import load
from configs.errors import UserError
from scripts import ROOT
from scripts.benchmarks.timing import Seconds, Stopwatch, add_clock, in_turn, print_table
from trainers import evaluator
from trainers.distributed import World, pick_device

THREE = ("T", "max", "rankdice")
RULES = ("-p max", "-p rankdice", "-p T -p max -p rankdice")
IDLE = "(start-up alone: --help)"
# The functions of the evaluator, and what they do.
PARTS = {
    "_losses": "loss of each image",
    "encode": "encoding the truth, once for all rules",
    "count": "counting, three rules",
    "observe": "reliability",
    "proper_scores": "log-loss and Brier score",
    "_collect": "averages",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    parser.add_argument("-r", "--resume", type=Path, help="a checkpoint (default: a small one is trained)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that the medians are of (default 5)")
    # Enough images that start-up does not hide the difference.
    parser.add_argument("--images", type=int, default=1000, help="built-in images without -r (default 1000)")
    add_clock(parser)
    parser.add_argument("overrides", nargs="*", help="of test.py, such as split=val or dataset.root=PATH")


def main(args: argparse.Namespace) -> None:
    """Print seconds and ratios of the commands, and the parts of one evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.resume or train_small(Path(folder), args.images)
        found = measure_parts(checkpoint, args)
        more = ["-r", str(checkpoint), "--out", folder, "--quiet", *args.overrides]
        candidates = {name: partial(call, "test.py", *name.split(), *more) for name in RULES}
        candidates[IDLE] = partial(call, "test.py", "--help")
        rows = in_turn(candidates, args.rounds, warm_up=0)
    print_commands(rows)
    print()
    total = sum(found.values())
    shares = [[name, f"{seconds:.2f}", f"{seconds / total:.0%}"] for name, seconds in found.items()]
    print_table(["part of scoring three rules, after start-up", f"{args.clock} seconds", "share"], shares)


def print_commands(seconds: dict[str, Seconds]) -> None:
    """Print the seconds of each command, and the ratios to each of the single rules."""
    rows = []
    for name, spent in seconds.items():
        row = [f"`{name}`"]
        for mine, first, second in zip(spent, seconds["-p max"], seconds["-p rankdice"], strict=True):
            row += [f"{mine:.2f}", f"{mine / first:.2f}", f"{mine / second:.2f}"]
        rows.append(row)
    ratios = ["/ max", "/ rankdice"]
    print_table(["python test.py -r CHECKPOINT", "seconds", *ratios, "processor", *ratios], rows)


def measure_parts(checkpoint: Path, args: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of each part of one evaluation of three rules, in this process."""
    network, cfg, _ = load(checkpoint, args.overrides)
    world = World(0, 1, pick_device())
    data = build.dataset(cfg, cfg.split)
    loader, criterion, scoring = build.eval_loader(cfg, data, world), build.loss(cfg), build.scoring(cfg, data.info)
    watch, network = Stopwatch(world.device, args.clock), network.to(world.device)
    watch.watch(network, "forward", "network")
    rules = {name: partial(watch.call, f"rule {name}", rule) for name, rule in build.rules(THREE, cfg).items()}
    start = watch.now()
    with mock.patch.multiple(evaluator, **{name: getattr(evaluator, name) for name in PARTS}):  # restored at the end
        for name, part in PARTS.items():
            watch.watch(evaluator, name, part)
        batches = watch.iterate(loader, "reading images")
        evaluator.evaluate(network, batches, rules, criterion, scoring, world, precision=cfg.trainer.precision)
    spent = dict(watch.spent)
    return {**spent, "the rest": watch.now() - start - sum(spent.values())}


def train_small(folder: Path, images: int) -> Path:
    """Train a network on the built-in data for a moment; testing it takes as long as testing a good one."""
    call("train.py", "epochs=1", f"dataset.num_images={{train: 16, val: 2, test: {images}}}", f"save_dir={folder}")
    return next(folder.rglob("best_model.pth"))


def call(command: str, *arguments: str) -> None:
    """Run a command of the project; raise UserError with its message if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / command), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command} failed: {done.stderr.strip()}")
