"""Where the time of a training step goes, and what the original did besides: it ran each batch a second time.

The original updated, ran the same batch through the network again, still in training mode, and scored that output
for its progress bar: masks at 0.5, then Dice, IoU and accuracy. The last row does all of it, counted by this project's
own counts; the row before it runs the network only, as `trainer.second_forward=true` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs import build
from configs.compose import compose
from configs.errors import as_training_error
from scripts.benchmarks.timing import Stopwatch, add_clock, in_turn
from trainers.distributed import World, pick_device
from trainers.evaluator import Scoring
from trainers.losses import link_probs
from trainers.metrics import count
from trainers.update import Update

PARTS = ("data", "forward", "loss", "backward", "check of the gradient", "optimizer")
WARM_UP = 2  # steps that do not count
SHOWN = "a second forward pass per step with its metrics: the step of the original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--steps", type=int, default=20, help="how many steps the medians are of (default 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add_clock(parser)
    parser.add_argument("overrides", nargs="*", help="of train.py, such as model=pspnet or batch_size=4")


def main(args: argparse.Namespace) -> None:
    """Print the median time of each part of a step, and the ratios of the three steps, made in turn."""
    device = pick_device(args.device)
    cfg = compose("train", args.overrides)
    where = World(0, 1, device)
    data = build.dataset(cfg, "train")
    batches = endless(build.train_loader(cfg, data, where))
    with as_training_error("measuring", "use a smaller batch_size"):
        rows = parts(cfg, where, batches, args)
        steps = compare(cfg, where, batches, args, build.scoring(cfg, data.info))
    total, ours = sum(rows.values()), next(iter(steps.values()))
    threads = torch.get_num_threads() if device.type == "cpu" else "-"
    rule = cfg.optimizer._target_.rpartition(".")[2]
    print(
        f"{cfg.model.name}, {cfg.loss.name}, {rule}, batch {cfg.batch_size}, {device}, "
        f"threads: {threads}, {args.clock} clock, median of {args.steps}\n"
    )
    print("| part of a step | ms | share |\n|---|---|---|")
    for name, seconds in rows.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / total:.0%} |")
    print("\n| step (without data) | ms | against ours |\n|---|---|---|")
    for name, seconds in steps.items():
        print(f"| {name} | {1000 * seconds:.1f} | {seconds / ours:.2f} |")


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


def parts(cfg: Any, where: World, batches: Iterator[Any], args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each part of an ordinary step. The backward pass is the remainder."""
    update, watch = make(cfg, where), Stopwatch(where.device, args.clock)
    watch.watch(update.model, "forward", "forward")
    watch.watch(update.criterion, "forward", "loss")
    watch.watch(update.optimizer, "step", "optimizer")
    watch.watch(update, "_step", "check of the gradient")  # and the optimizer, which is taken off below
    rows: dict[str, list[float]] = {name: [] for name in PARTS}
    for number in tqdm(range(args.steps + WARM_UP), desc="parts", leave=False, disable=None):
        watch.spent = dict.fromkeys(PARTS, 0.0)
        batch = watch.call("data", next, batches)
        watch.call("backward", update, batch)
        spent = watch.spent
        spent["backward"] -= spent["forward"] + spent["loss"] + spent["check of the gradient"]
        spent["check of the gradient"] -= spent["optimizer"]
        if number >= WARM_UP:
            for name in PARTS:
                rows[name].append(spent[name])
    return {name: median(values) for name, values in rows.items()}


def compare(
    cfg: Any, where: World, batches: Iterator[Any], args: argparse.Namespace, scoring: Scoring
) -> dict[str, float]:
    """Return the median seconds of our step and of the original's two additions, on the same batches, in turn."""
    ours, twice, shown = make(cfg, where), *(make(cfg, where, second_forward=True) for _ in range(2))
    batch: list[Any] = []

    def load() -> None:
        batch[:] = [next(batches)]

    ways: dict[str, Callable[[], object]] = {
        "data": load,
        "ours: one forward pass": lambda: ours(*batch),
        "a second forward pass per step: trainer.second_forward=true": lambda: twice(*batch),
        SHOWN: lambda: with_metrics(shown, scoring, *batch),
    }
    rows = in_turn(ways, args.steps, where.device, WARM_UP)
    return {name: getattr(spent, args.clock) for name, spent in rows.items() if name != "data"}


@torch.no_grad()
def with_metrics(update: Update, scoring: Scoring, batch: Any) -> tuple[Tensor, ...]:
    """Update, run the network again and score its output at 0.5, as the original did: Dice, IoU, accuracy."""
    kept: list[Any] = []
    network = getattr(update.model, "_orig_mod", update.model)
    hook = network.register_forward_hook(lambda module, given, made: kept.append(made.logits.detach()))
    try:
        with torch.enable_grad():
            update(batch)
    finally:
        hook.remove()
    probs = link_probs(kept[-1], update.criterion.link)  # type: ignore[arg-type]
    counts = count(probs > 0.5, scoring.encode(batch.targets.to(probs.device))).to("cpu")
    return counts.dice(), counts.iou(), counts.pixel_accuracy()
