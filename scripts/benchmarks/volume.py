"""Time and memory of scripts/decode.py on one large 3-D case.

The case is softmax probabilities of smooth noise with one label per voxel. Each call is a process of its own. Memory
is the peak of its anonymous memory. Pages of mapped files do not count: the system drops them when memory is short.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from configs.errors import UserError
from scripts import ROOT
from scripts.benchmarks.timing import print_table, read_memory

INTERVAL = 0.02  # seconds between two readings of the memory


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", default="4,320,512,1024", help="C,D,H,W of the case (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float16")
    rules = "max,rankdice,rankdice_nonoverlap"
    parser.add_argument("--rules", default=rules, help="rules to measure, one per call (default: %(default)s)")


def main(args: argparse.Namespace) -> None:
    """Print time and memory for each rule."""
    sizes = args.shape.split(",")
    shape = tuple(int(size) for size in sizes if size.isdecimal() and int(size))
    if len(shape) != len(sizes) or len(shape) != 4:
        raise UserError(f"--shape {args.shape} is invalid: expected C,D,H,W, four integers above 0.")
    with tempfile.TemporaryDirectory(dir=ROOT) as name:
        large, small, out = Path(name) / "large", Path(name) / "small", Path(name) / "out"
        size = write_case(large, shape, args.dtype)
        write_case(small, (4, 4, 4, 4), "float32")  # its memory is that of the program itself
        base = decode(small, out, "max")[1]
        print(f"{args.dtype}, {shape}, {size / 1e9:.2f} GB, with labels, {torch.get_num_threads()} threads\n")
        measured = ((rule, *decode(large, out, rule)) for rule in args.rules.split(","))
        rows = ([f"`{rule}`", f"{seconds:.0f}", memory, memory - base] for rule, seconds, memory in measured)
        print_table(["rule", "seconds", "memory of the process, MiB", "above that of a case of 1 kB"], rows)


def write_case(folder: Path, shape: tuple[int, ...], dtype: str) -> int:
    """Write probabilities and labels slab by slab; return the size of the probabilities in bytes."""
    for part in ("probs", "labels"):
        (folder / part).mkdir(parents=True)
    probs = np.lib.format.open_memmap(folder / "probs/case.npy", "w+", np.dtype(dtype), shape)
    labels = np.lib.format.open_memmap(folder / "labels/case.npy", "w+", np.uint8, shape[1:])
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, shape[0], *(max(2, side // 32) for side in shape[1:]), generator=generator)
    depth = coarse.shape[2] - 1
    for z in range(shape[1]):
        at = z / max(1, shape[1] - 1) * depth
        low = min(int(at), depth - 1)
        plane = torch.lerp(coarse[:, :, low], coarse[:, :, low + 1], at - low)
        fine = torch.nn.functional.interpolate(plane, shape[2:], mode="bilinear")
        p = (4 * fine).softmax(1)[0]
        probs[:, z] = p.numpy()
        draw = torch.rand(shape[2:], generator=generator)
        labels[z] = (draw >= p.cumsum(0)[:-1]).sum(0).numpy()
    return probs.nbytes


def decode(case: Path, out: Path, rule: str) -> tuple[float, int]:
    """Decode the case with a rule; return the seconds and the peak of anonymous memory in MiB."""
    command = [sys.executable, str(ROOT / "scripts" / "decode.py"), str(case / "probs")]
    command += ["--labels", str(case / "labels"), "-p", rule, "--out", str(out / rule), "--force", "--quiet"]
    command += ["--classes-axis", "first"]
    started, peak = time.perf_counter(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, read_memory("RssAnon", process.pid))
            time.sleep(INTERVAL)
    if process.returncode:
        raise UserError(f"decode.py ended with exit code {process.returncode}; its message is above.")
    return time.perf_counter() - started, peak >> 20
