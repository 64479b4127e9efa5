"""Time to load Cityscapes-sized frames for training and evaluation, against decoding them with Pillow alone."""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from configs.errors import UserError
from datasets.cityscapes import Cityscapes
from datasets.loaders import EvalLoader, TrainLoader
from datasets.transforms import EvalTransform, TrainTransform
from scripts.benchmarks.timing import add_clock, print_table, time_in_turn

WIDTH, HEIGHT = 2048, 1024
DECODE = "Pillow: decode image and mask"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, help="root folder of Cityscapes (default: generated frames)")
    parser.add_argument("--frames", type=int, default=12, help="frames to load in each round (default 12)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; a time is the median over them (default 5)")
    parser.add_argument("--workers", type=int, default=0, help="loader processes (default 0: load in this process)")
    add_clock(parser)


def main(args: argparse.Namespace) -> None:
    """Print the frames per second and process of each loader, and the ratio to decoding alone; each has one thread."""
    if args.clock == "cpu" and args.workers:
        raise UserError(
            f"--clock cpu does not count the processes of --workers {args.workers}. Fix: leave out one of them."
        )
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = Cityscapes(args.root or make_frames(Path(folder), args.frames), "train")
        data.pairs, data.names = data.pairs[: args.frames], data.names[: args.frames]
        mean, std, workers = data.info.mean, data.info.std, args.workers
        train = TrainLoader(data, TrainTransform(mean, std, crop=512), 6, seed=0, num_workers=workers, drop_last=False)
        paper = EvalLoader(data, EvalTransform(mean, std, crop=512, legacy=True), 6, num_workers=workers)
        corrected = EvalLoader(data, EvalTransform(mean, std), 1, num_workers=workers)
        candidates = {
            DECODE: lambda: decode(data),
            "training: rotate, crop 512, flip, normalise": lambda: deque(train.epoch(0), maxlen=0),
            "evaluation, paper: resize, centre crop 512": lambda: deque(paper, maxlen=0),
            "evaluation, corrected: whole frame": lambda: deque(corrected, maxlen=0),
        }
        seconds = {name: getattr(spent, args.clock) for name, spent in time_in_turn(candidates, args.rounds).items()}
    speeds = {name: len(data) / spent / (1 if name == DECODE else max(1, workers)) for name, spent in seconds.items()}
    print(f"{args.clock} clock, median of {args.rounds} rounds of {len(data)} frames\n")
    rows = [[name, f"{speed:.1f}", f"{speed / speeds[DECODE]:.2f}"] for name, speed in speeds.items()]
    print_table(["frames of 1024x2048", "frames/s per process", "against Pillow's decode"], rows)


def decode(data: Cityscapes) -> None:
    """Decode every image and mask with Pillow."""
    for pair in data.pairs:
        Image.open(pair.image).load()
        Image.open(pair.mask).load()


def make_frames(root: Path, count: int) -> Path:
    """Write smooth noisy frames and blocky masks in the layout of Cityscapes; return the root."""
    rng = np.random.default_rng(0)
    for index in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (16, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), dtype=np.float32)
        frame = (smooth + rng.normal(0, 2, smooth.shape)).clip(0, 255).astype(np.uint8)
        blocks = Image.fromarray(rng.choice(np.array([7, 8, 11, 21, 23, 26], dtype=np.uint8), (16, 32)))
        mask = blocks.resize((WIDTH, HEIGHT), Image.Resampling.NEAREST)
        stem = f"train/aachen/aachen_{index:06d}_000019"
        for name, image in (
            (f"leftImg8bit/{stem}_leftImg8bit.png", Image.fromarray(frame)),
            (f"gtFine/{stem}_gtFine_labelIds.png", mask),
        ):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            image.save(root / name)
    return root
