"""Shared by several commands: command-line options, loading a run, and work in threads with results in order."""

from __future__ import annotations

import argparse
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from configs.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def command_line(about: str | None) -> argparse.ArgumentParser:
    """Return a parser whose help is the docstring of the command."""
    return argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_checkpoint_options(parser: argparse.ArgumentParser, rules: Sequence[str], default: str) -> None:
    """Add the options of a command that applies one rule to a checkpoint: -r, -p, --alpha and --device."""
    add = parser.add_argument
    help_resume = "a checkpoint of this project, or one released by the authors"
    add("-r", "--resume", required=True, type=Path, metavar="CHECKPOINT", help=help_resume)
    help_rule = f"one of: {', '.join(rules)} (default: {default})"
    add("-p", "--predictor", action="append", default=[], metavar="RULE", help=help_rule)
    help_alpha = "share of images whose Dice may be below its lower bound (default: 0.1)"
    add("--alpha", type=float, default=0.1, help=help_alpha)
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")


def check_checkpoint_options(args: argparse.Namespace) -> None:
    """Raise UserError for two rules or an invalid --alpha."""
    if len(args.predictor) > 1:
        rules = " -p ".join(args.predictor)
        raise UserError(f"-p {rules}: expected one rule. Fix: call once per rule, each time with another --out")
    if not 0 < args.alpha < 1:
        raise UserError(f"--alpha {args.alpha:g} is invalid: expected a number between 0 and 1. Fix: --alpha 0.1")


def check_least(args: argparse.Namespace, **least: int) -> None:
    """Raise UserError for a numeric option below its least value."""
    for name, value in least.items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise UserError(f"--{name}={given} is invalid: expected an integer >= {value}.")


def add_run_options(parser: argparse.ArgumentParser, overrides: str) -> None:
    """Add the arguments of a command about one run: the run, --device, and overrides with their help."""
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=f"as for test.py: {overrides}")


class LoadedRun(NamedTuple):
    """A trained network on its device, its configuration, and the split that is scored."""

    path: Path
    network: Any
    cfg: Any
    checkpoint: dict[str, Any]
    data: Any


def load_run(path: Path, overrides: Sequence[str], device: Any, rules: Sequence[str]) -> LoadedRun:
    """Load a checkpoint, or the best one of a run's folder, and the split of its configuration.

    ``rules`` are the rules that the command applies.
    """
    from configs import build  # torch is slow to import
    from configs.checkpoint import check_classes, load

    path = path / "best_model.pth" if path.is_dir() else path
    network, cfg, checkpoint = load(path, overrides, rules)
    build.make_root_absolute(cfg)
    data = build.dataset(cfg, cfg.split)
    check_classes(checkpoint, data.info.classes, path)
    return LoadedRun(path, network.to(device).eval(), cfg, checkpoint, data)


def summary(out: Path, done: str, before: int, failed: int) -> str:
    """Return the last line that a command prints: what was done, and how many inputs were done before or failed."""
    parts = [done] + [f"{before} done before"] * bool(before) + [f"{failed} failed"] * bool(failed)
    return f"{out}: {', '.join(parts)}"


def default_workers() -> int:
    """Return the number of processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def map_in_threads(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items, computed by ``workers`` threads.

    Decoding images and reading files release Python's lock, so threads run at the same time. At most ``workers + 1``
    results wait to be used, so memory is bounded. An exception of ``function`` is raised in the place of its result.
    """
    if workers < 1:
        raise UserError(f"workers={workers} is invalid: expected an integer >= 1")
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
