"""Time of the parts of a training step, and of the second forward pass that the original code made.

After the update, the original ran the same batch through the network again, still in training mode, and scored that
output for its progress bar: masks at 0.5, then Dice, IoU and accuracy. The last row does all of this, with the metrics
of this project. The row before it runs the network again without scoring, as `trainer.second_forward=true` does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import count as integers
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from configs import build
from configs.compose import compose
from configs.errors import as_training_error
from scripts.benchmarks.timing import Stopwatch, add_clock, print_table, time_in_turn
from trainers.distributed import World, pick_device
from trainers.losses import link_probs
from trainers.metrics import Scoring, count
from trainers.update import Update

PARTS = ("data", "forward", "loss", "backward", "check of the gradient", "optimizer")
WARM_UP = 2  # steps that do not count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=20, help="steps; a time is the median over them (default 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default auto)")
    add_clock(parser)
    parser.add_argument("overrides", nargs="*", help="as for train.py, such as model=pspnet or batch_size=4")


def main(args: argparse.Namespace) -> None:
    """Print the median time of each part of a step, and of the three kinds of steps with their ratios."""
    device = pick_device(args.device)
    cfg = compose("train", args.overrides)
    world = World(0, 1, device)
    data = build.dataset(cfg, "train")
    batches = repeat_epochs(build.train_loader(cfg, data, world))
    with as_training_error("measuring", "use a smaller batch_size"):
        parts = measure_parts(cfg, world, batches, args)
        steps = compare_steps(cfg, world, batches, args, build.scoring(cfg, data.info))
    threads = torch.get_num_threads() if device.type == "cpu" else "-"
    print(
        f"{cfg.model.name}, {cfg.loss.name}, {cfg.optimizer._target_.rpartition('.')[2]}, batch {cfg.batch_size}, "
        f"{device}, threads: {threads}, {args.clock} clock, median of {args.steps}\n"
    )
    total, ours = sum(parts.values()), next(iter(steps.values()))
    rows = [[name, f"{1000 * seconds:.1f}", f"{seconds / total:.0%}"] for name, seconds in parts.items()]
    print_table(["part of a step", "ms", "share"], rows)
    print()
    rows = [[name, f"{1000 * seconds:.1f}", f"{seconds / ours:.2f}"] for name, seconds in steps.items()]
    print_table(["step (without data)", "ms", "against ours"], rows)


def repeat_epochs(loader: Any) -> Iterator[Any]:
    """Yield batches without end, epoch after epoch."""
    return (batch for epoch in integers() for batch in loader.epoch(epoch))


def make_update(cfg: Any, world: World, second_forward: bool = False) -> Update:
    """Return the update of a new network, built as in `train.py`."""
    torch.manual_seed(cfg.seed)
    update = build.update(cfg, build.model(cfg).to(world.device).train(), build.loss(cfg), world)
    update.second_forward = second_forward
    return update


def measure_parts(cfg: Any, world: World, batches: Iterator[Any], args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each part of our step. The backward pass is the rest of the update."""
    update, watch = make_update(cfg, world), Stopwatch(world.device, args.clock)
    watch.watch(update.model, "forward", "forward")
    watch.watch(update.criterion, "forward", "loss")
    watch.watch(update.optimizer, "step", "optimizer")
    watch.watch(update, "_step", "check of the gradient")  # and the optimizer, which is subtracted below
    steps = []
    for _ in tqdm(range(args.steps + WARM_UP), desc="parts", leave=False, disable=None):
        watch.spent = spent = dict.fromkeys(PARTS, 0.0)
        batch = watch.call("data", next, batches)
        watch.call("backward", update, batch)
        spent["backward"] -= spent["forward"] + spent["loss"] + spent["check of the gradient"]
        spent["check of the gradient"] -= spent["optimizer"]
        steps.append(spent)
    return {name: median(spent[name] for spent in steps[WARM_UP:]) for name in PARTS}


def compare_steps(
    cfg: Any, world: World, batches: Iterator[Any], args: argparse.Namespace, scoring: Scoring
) -> dict[str, float]:
    """Return the median seconds of three steps on the same batches: ours, with a second pass, and also with scores."""
    ours, twice, scored = make_update(cfg, world), *(make_update(cfg, world, second_forward=True) for _ in range(2))
    batch: list[Any] = []

    def load() -> None:
        batch[:] = [next(batches)]

    candidates: dict[str, Callable[[], object]] = {
        "data": load,
        "ours: one forward pass": lambda: ours(*batch),
        "a second forward pass per step: trainer.second_forward=true": lambda: twice(*batch),
        "a second forward pass per step with its metrics: the step of the original": lambda: update_and_score(
            scored, scoring, *batch
        ),
    }
    rows = time_in_turn(candidates, args.steps, world.device, WARM_UP)
    return {name: getattr(spent, args.clock) for name, spent in rows.items() if name != "data"}


@torch.no_grad()
def update_and_score(update: Update, scoring: Scoring, batch: Any) -> tuple[Tensor, ...]:
    """Update, run the network again and score its output at 0.5; return Dice, IoU and accuracy, as the original did."""
    kept: list[Any] = []
    criterion: Any = update.criterion
    network = getattr(update.model, "_orig_mod", update.model)
    hook = network.register_forward_hook(lambda module, given, made: kept.append(made.logits.detach()))
    try:
        with torch.enable_grad():
            update(batch)
    finally:
        hook.remove()
    probs = link_probs(kept[-1], criterion.link)
    counts = count(probs > 0.5, scoring.encode(batch.targets.to(probs.device))).to("cpu")
    return counts.dice(), counts.iou(), counts.pixel_accuracy()
