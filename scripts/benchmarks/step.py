"""Where the time of a training step goes, and what the original's second forward pass a step would cost."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import nn

from configs import build
from trainers.device import pick_device
from trainers.distributed import World
from trainers.errors import explained
from trainers.update import Update

PARTS = ("data", "forward", "loss", "backward", "optimizer")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument(
        "--steps", type=int, default=20, help="how many steps the medians are of (default 20)"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    parser.add_argument("overrides", nargs="*", help="of train.py, such as model=pspnet or batch_size=4")


def main(args: argparse.Namespace) -> None:
    """Print the median time of each part of a step, and the ratio of the two steps, made in turn."""
    device = pick_device(args.device)
    cfg = build.compose("train", args.overrides)
    where = World(0, 1, device)
    data = build.dataset(cfg, "train")
    batches = endless(build.train_loader(cfg, data, where))
    with explained("measuring", "use a smaller batch_size"):
        rows = parts(cfg, where, batches, args.steps)
        once, twice = compare(cfg, where, batches, args.steps)
    total = sum(rows.values())
    threads = torch.get_num_threads() if device.type == "cpu" else "-"
    print(f"{cfg.model.name}, {cfg.loss.name}, batch {cfg.batch_size}, {device}, threads: {threads}\n")
    print("| part of a step | ms | share |\n|---|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / total:.0%} |")
    print("\n| step (without data) | ms | against ours |\n|---|---|---|")
    print(f"| ours: one forward pass | {1000 * once:.1f} | 1.00 |")
    print(f"| a second forward pass a step, as in the original | {1000 * twice:.1f} | {twice / once:.2f} |")


def endless(loader: Any) -> Iterator[Any]:
    """Batches, epoch after epoch."""
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def make(cfg: Any, where: World, second_forward: bool = False) -> Update:
    """An update of a fresh network, with everything that the configuration asks for."""
    torch.manual_seed(cfg.seed)
    network = build.model(cfg).to(where.device)
    if cfg.trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    network.train()
    return Update(
        torch.compile(network) if cfg.trainer.compile else network,
        build.loss(cfg),
        build.optimizer(cfg, network),
        where,
        precision=cfg.trainer.precision,
        accumulate=cfg.trainer.accumulate,
        clip_norm=cfg.trainer.clip_norm,
        channels_last=cfg.trainer.channels_last,
        second_forward=second_forward,
    )


def parts(cfg: Any, where: World, batches: Iterator[Any], steps: int) -> dict[str, float]:
    """The median seconds of each part of an ordinary step; what is none of the others is the backward pass."""
    spent = dict.fromkeys(PARTS, 0.0)
    update = make(cfg, where)
    timed(update.model, "forward", spent, "forward", where)
    timed(update.criterion, "forward", spent, "loss", where)
    timed(update.optimizer, "step", spent, "optimizer", where)
    rows: dict[str, list[float]] = {name: [] for name in PARTS}
    for number in range(steps + 2):
        spent.update(dict.fromkeys(PARTS, 0.0))
        begun = now(where)
        batch = next(batches)
        loaded = now(where)
        update(batch)
        spent["data"] = loaded - begun
        spent["backward"] = now(where) - loaded - spent["forward"] - spent["loss"] - spent["optimizer"]
        if number >= 2:  # the first ones warm up
            for name in PARTS:
                rows[name].append(spent[name])
    return {name: median(values) for name, values in rows.items()}


def timed(owner: Any, method: str, spent: dict[str, float], name: str, where: World) -> None:
    """Make a method of one object count the seconds that it takes."""
    original: Callable[..., Any] = getattr(owner, method)

    def measured(*arguments: Any, **options: Any) -> Any:
        begun = now(where)
        result = original(*arguments, **options)
        spent[name] += now(where) - begun
        return result

    if isinstance(owner, nn.Module):
        object.__setattr__(owner, method, measured)
    else:
        setattr(owner, method, measured)


def compare(cfg: Any, where: World, batches: Iterator[Any], steps: int) -> tuple[float, float]:
    """The median seconds of a step with one forward pass and with two, on the same batches, in turn."""
    updates = [make(cfg, where), make(cfg, where, second_forward=True)]
    seconds: list[list[float]] = [[], []]
    for number in range(steps + 2):
        batch = next(batches)
        for which in (0, 1) if number % 2 else (1, 0):
            begun = now(where)
            updates[which](batch)
            if number >= 2:
                seconds[which].append(now(where) - begun)
    return median(seconds[0]), median(seconds[1])


def now(where: World) -> float:
    """The time, when all work so far is done."""
    if where.device.type == "cuda":
        torch.cuda.synchronize(where.device)
    return time.perf_counter()
