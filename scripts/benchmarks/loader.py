"""Loading Cityscapes-size frames, all training augmentation included, against Pillow decoding alone."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from configs.errors import UserError
from datasets import Cityscapes, EvalLoader, EvalTransform, TrainLoader, TrainTransform
from scripts.benchmarks.timing import add_clock, in_turn

WIDTH, HEIGHT = 2048, 1024
DECODE = "Pillow: decode image and mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--root", type=Path, help="a Cityscapes folder; frames are made up where it is not given")
    parser.add_argument("--frames", type=int, default=12, help="how many frames a round reads (default 12)")
    parser.add_argument("--rounds", type=int, default=5, help="how many rounds the median is of (default 5)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0: this one)")
    add_clock(parser)


def main(args: argparse.Namespace) -> None:
    """Print frames a second and process of each way, and the ratio to Pillow's decoding alone; one thread each."""
    if args.clock == "cpu" and args.workers:
        raise UserError("--clock cpu does not see the loader's processes; leave out --workers or --clock")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as made:
        root = args.root or make_frames(Path(made), args.frames)
        data = Cityscapes(root, "train")
        data.pairs, data.names = data.pairs[: args.frames], data.names[: args.frames]
        rows = measure(data, args)
    speeds = {
        name: len(data) / seconds / (1 if name == DECODE else max(1, args.workers)) for name, seconds in rows.items()
    }
    print(f"{args.clock} clock, median of {args.rounds} rounds of {len(data)} frames\n")
    print("| frames of 1024x2048 | frames/s a process | against Pillow's decode |\n|---|---|---|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / speeds[DECODE]:.2f} |")


def measure(data: Cityscapes, args: argparse.Namespace) -> dict[str, float]:
    """Return the median seconds of each way for all frames."""
    mean, std = data.info.mean, data.info.std
    train = TrainLoader(data, TrainTransform(mean, std, crop=512), 6, seed=0, num_workers=args.workers, drop_last=False)
    paper = EvalLoader(data, EvalTransform(mean, std, crop=512, legacy=True), 6, num_workers=args.workers)
    corrected = EvalLoader(data, EvalTransform(mean, std), 1, num_workers=args.workers)
    ways: dict[str, Callable[[], None]] = {
        DECODE: lambda: pillow(data),
        "training: rotate, crop 512, flip, normalise": lambda: drain(train.epoch(0)),
        "evaluation, paper: resize, centre crop 512": lambda: drain(paper),
        "evaluation, corrected: whole frame": lambda: drain(corrected),
    }
    return {name: getattr(spent, args.clock) for name, spent in in_turn(ways, args.rounds).items()}


def pillow(data: Cityscapes) -> None:
    """Decode every frame and mask, and do nothing with them."""
    for pair in data.pairs:
        Image.open(pair.image).load()
        Image.open(pair.mask).load()


def drain(batches: object) -> None:
    """Take every batch."""
    for _ in batches:  # type: ignore[attr-defined]
        pass


def make_frames(root: Path, count: int) -> Path:
    """Write frames with the noise of a camera and masks of blocks, in the real layout; return the root."""
    rng = np.random.default_rng(0)
    for index in tqdm(range(count), desc="making frames", leave=False, disable=None):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        frame = (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)
        blocks = Image.fromarray(rng.choice(np.array([7, 8, 11, 21, 23, 26], dtype=np.uint8), (16, 32)))
        stem = f"aachen_{index:06d}_000019"
        for kind, end, image in (
            ("leftImg8bit", "leftImg8bit", Image.fromarray(frame)),
            ("gtFine", "gtFine_labelIds", blocks.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)),
        ):
            folder = root / kind / "train" / "aachen"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{stem}_{end}.png")
    return root
