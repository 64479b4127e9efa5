"""What a prediction rule costs in test.py: the whole command, one rule against another, and where its time goes."""

from __future__ import annotations

import argparse
import functools
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tqdm import tqdm

from configs import build
from configs.checkpoint import load
from configs.errors import UserError
from scripts import ROOT
from scripts.benchmarks.timing import Seconds, Stopwatch, add_clock
from trainers import evaluator
from trainers.distributed import World, pick_device

THREE = ("T", "max", "rankdice")
WAYS = {"-p max": ("max",), "-p rankdice": ("rankdice",), "-p T -p max -p rankdice": THREE}
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
    """Declare the options."""
    parser.add_argument("-r", "--resume", type=Path, help="a checkpoint; a small one is trained where none is given")
    parser.add_argument("--rounds", type=int, default=5, help="how many rounds the medians are of (default 5)")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="built-in images to score where no checkpoint is given: enough that start-up does not hide the "
        "difference (default 1000)",
    )
    add_clock(parser)
    parser.add_argument("overrides", nargs="*", help="of test.py, such as split=val or dataset.root=PATH")


def main(args: argparse.Namespace) -> None:
    """Print seconds and ratios of the commands, each in turn so that drift meets all alike, and the parts."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.resume or small(Path(folder), args.images)
        found = parts(checkpoint, args)
        rows: dict[str, list[Seconds]] = {name: [] for name in (*WAYS, IDLE)}
        with tqdm(total=args.rounds * len(rows), unit="command", disable=None) as bar:
            for _ in range(args.rounds):
                for name in rows:
                    bar.set_description(name)
                    rows[name].append(call("test.py", *arguments(name, checkpoint, Path(folder), args)))
                    bar.update()
    print_commands({name: Seconds(*map(median, zip(*spent, strict=True))) for name, spent in rows.items()})
    print_parts(found, args.clock)


def arguments(name: str, checkpoint: Path, folder: Path, args: argparse.Namespace) -> list[str]:
    """The command line of a way."""
    if name == IDLE:
        return ["--help"]
    chosen = [word for rule in WAYS[name] for word in ("-p", rule)]
    return ["-r", str(checkpoint), *chosen, "--out", str(folder), "--quiet", *args.overrides]


def print_commands(rows: dict[str, Seconds]) -> None:
    """One row a command: seconds, and the ratios to each of the single rules."""
    one, other = rows["-p max"], rows["-p rankdice"]
    print("| python test.py -r CHECKPOINT | seconds | / max | / rankdice | processor | / max | / rankdice |")
    print("|---|---|---|---|---|---|---|")
    for name, spent in rows.items():
        cells = [
            f"{mine:.2f} | {mine / first:.2f} | {mine / second:.2f}"
            for mine, first, second in zip(spent, one, other, strict=True)
        ]
        print(f"| `{name}` | {' | '.join(cells)} |")


def print_parts(rows: dict[str, float], clock: str) -> None:
    """One row a part, in the order of time."""
    total = sum(rows.values())
    print(f"\n| part of scoring three rules, after start-up | {clock} seconds | share |\n|---|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {seconds:.2f} | {seconds / total:.0%} |")


def parts(checkpoint: Path, args: argparse.Namespace) -> dict[str, float]:
    """The seconds of each part of one evaluation of three rules, in this process."""
    network, cfg, _ = load(checkpoint, args.overrides)
    where = World(0, 1, pick_device())
    data = build.dataset(cfg, cfg.split)
    loader, criterion = build.eval_loader(cfg, data, where), build.loss(cfg)
    rules = build.rules(THREE, cfg)
    watch, network = Stopwatch(where.device, args.clock), network.to(where.device)
    watch.watch(network, "forward", "network")
    rules = {name: functools.partial(watch.call, f"rule {name}", rule) for name, rule in rules.items()}
    original = {name: getattr(evaluator, name) for name in PARTS}
    start = watch.now()
    try:
        for name, part in PARTS.items():
            watch.watch(evaluator, name, part)
        batches = watch.iterate(loader, "reading images")
        scoring = build.scoring(cfg, data.info)
        evaluator.evaluate(network, batches, rules, criterion, scoring, where, precision=cfg.trainer.precision)
    finally:
        for name, function in original.items():
            setattr(evaluator, name, function)
    spent = dict(watch.spent)
    return {**spent, "the rest": watch.now() - start - sum(spent.values())}


def small(folder: Path, images: int) -> Path:
    """A network trained for a moment on the built-in data; testing takes as long as for a good one."""
    call("train.py", "epochs=1", f"dataset.num_images={{train: 16, val: 2, test: {images}}}", f"save_dir={folder}")
    return next(folder.rglob("best_model.pth"))


def call(command: str, *arguments: str) -> Seconds:
    """Run a command of the project and return what it took; say what it said if it fails."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, str(ROOT / command), *arguments], capture_output=True, text=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise UserError(f"{command} failed: {done.stderr.strip()}")
    return Seconds(wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
