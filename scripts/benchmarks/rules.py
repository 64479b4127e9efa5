"""Time and memory of the prediction rules: RankDice with each backend, argmax, approximations, PyPI's `rankseg`.

Times are medians over `--rounds` rounds. All candidates take turns in each round, so that a change of the machine's
speed affects all alike. There are two ratios: of processor time, which other users of the machine hardly change, and of
wall time. `--busy N` starts N processes that keep the processor busy during the benchmark. `--peer PYTHON` is the
interpreter of an environment with PyPI's `rankseg==0.0.8`, which has the same name as this package.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor

import rankseg
from rankseg.nonoverlap import surrogate_objective
from scripts.benchmarks.timing import Seconds, print_table, read_memory, time_in_turn

Table = tuple[list[str], list[list[str]]]  # head and rows
PEER = """
import json, sys, time, torch
from rankseg import RankSEG
torch.set_num_threads(int(sys.argv[3]))
probs, options = torch.load(sys.argv[1]), json.loads(sys.argv[2])
rule, seconds = RankSEG(**options), []
for _ in range(int(sys.argv[4])):
    begin = time.process_time(), time.perf_counter(); found = rule.predict(probs)
    seconds.append((time.perf_counter() - begin[1], time.process_time() - begin[0]))
torch.save(found, sys.argv[5])
print(json.dumps([sorted(column)[len(column) // 2] for column in zip(*seconds)]))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=5, help="rounds; a time is the median over them (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads of torch (default 1)")
    parser.add_argument("--busy", type=int, default=0, help="busy processes next to the benchmark (default 0)")
    parser.add_argument("--size", type=int, default=512, help="width and height of the maps in pixels (default 512)")
    parser.add_argument("--largest", type=int, default=2048, help="largest size in the table of shapes (default 2048)")
    parser.add_argument(
        "--depth", type=int, default=836, help="planes of the volume; each has --size x --size pixels (default 836)"
    )
    parser.add_argument("--peer", help="Python interpreter of an environment with PyPI's rankseg==0.0.8")
    parser.add_argument("--logits", type=Path, help=".npz with `logits` (N, C, H, W) of a network, for --parts real")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to print (default all)")


def main(args: argparse.Namespace) -> None:
    """Print the tables that `--parts` names."""
    torch.set_num_threads(args.threads)
    backend, load = rankseg.backend(), f", {args.busy} busy processes" if args.busy else ""
    print(f"torch {torch.__version__}, threads: {args.threads}, median of {args.rounds}, backend {backend}{load}")
    with keep_busy(args.busy):
        for name in args.parts:
            for head, rows in PARTS[name](args):
                print()
                print_table(head, rows)


@contextmanager
def keep_busy(processes: int) -> Iterator[None]:
    """Keep the processor busy with this number of other processes."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def make_maps(size: int, images: int = 6, classes: int = 19) -> dict[str, Tensor]:
    """Return probabilities (N, C, size, size): independent pixels, smooth maps, and saturated ones like a network's."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, classes, size, size, generator=generator)
    coarse = torch.randn(images, classes, max(2, size // 32), max(2, size // 32), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return {
        "independent": torch.softmax(3 * noise, dim=1),
        "smooth": torch.softmax(4 * smooth, dim=1),
        "saturated": torch.softmax(20 * smooth, dim=1),
    }


def run_peer(args: argparse.Namespace, probs: Tensor, rounds: int, **options: object) -> tuple[Seconds, Tensor]:
    """Return the median seconds and the prediction of PyPI's `rankseg` on `probs`, run by the Python of `--peer`."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "probs.pt", Path(folder) / "found.pt"
        torch.save(probs, source)
        command = [args.peer, "-c", PEER, source, json.dumps(options), args.threads, rounds, target]
        out = subprocess.run([*map(str, command)], cwd=folder, check=True, capture_output=True, text=True).stdout
        return Seconds(*json.loads(out.splitlines()[-1])), torch.load(target)


def candidates_for(probs: Tensor) -> dict[str, Callable[[], object]]:
    """Return the rules to compare on `probs`, the ranking rules with each backend that is installed."""
    rules: dict[str, Callable[[], object]] = {
        "argmax + one-hot": lambda: rankseg.argmax(probs),
        "p == amax (ties overlap)": lambda: probs == probs.amax(1, keepdim=True),
    }
    native = probs.device.type == "cpu" and rankseg.backend() == "native"
    for name in ("native", "python") if native else ("python",):
        run = partial(run_with_backend, name)
        rules[f"rank_dice, {name}"] = partial(run, rankseg.rank_dice, probs)
        rules[f"rank_iou, {name}"] = partial(run, rankseg.rank_iou, probs)
        rules[f"rank_dice, non-overlapping, {name}"] = partial(run, rankseg.rank_dice, probs, allow_overlap=False)
    return rules


def run_with_backend(name: str, rule: Callable[..., object], probs: Tensor, **options: object) -> None:
    with mock.patch.dict(os.environ, RANKSEG_BACKEND=name):
        rule(probs, **options)


def ratios(value: Seconds, other: Seconds) -> list[str]:
    """Return the ratios of processor time and of wall time as two table cells."""
    return [f"{value.cpu / other.cpu:.2f}", f"{value.wall / other.wall:.2f}"]


def speed(args: argparse.Namespace) -> Iterator[Table]:
    """Compare the exact rules with argmax, on the CPU also with the peer's RMA, then on a GPU if there is one."""
    head = ["rule", "processor s", "wall s", "against argmax: processor", "wall"]
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        rows = []
        for kind, probs in make_maps(args.size).items():
            found = time_in_turn(candidates_for(probs.to(device)), args.rounds, device)
            if args.peer and device == "cpu":
                options = {"metric": "dice", "solver": "RMA", "output_mode": "multilabel", "safe_screening": "auto"}
                found["peer, RMA, screening"] = run_peer(args, probs, args.rounds, **options)[0]
            for name, value in found.items():
                seconds = f"{value.cpu:.3f}", f"{value.wall:.3f}"
                rows.append([kind, name, *seconds, *ratios(value, found["argmax + one-hot"])])
        place = f", {torch.cuda.get_device_name()}" if device == "cuda" else ""
        yield [f"6x19x{args.size}x{args.size} float32{place}", *head], rows


def shapes(args: argparse.Namespace) -> Iterator[Table]:
    """Compare the backends on saturated maps of other sizes, numbers of classes, and half precision."""
    settings = [(size, 1, 2, torch.float32) for size in (64, 256, 512, args.largest)]
    settings += [(512, 1, 19, torch.float32), (512, 1, 150, torch.float32), (512, 6, 19, torch.float16)]
    maps = (
        ("", make_maps(min(size, args.largest), images, classes)["saturated"].to(dtype))
        for size, images, classes, dtype in settings
    )
    yield compare_backends("saturated", maps, args)


def real(args: argparse.Namespace) -> Iterator[Table]:
    """Compare the backends on three images of --logits, first, middle and last, at their own size and at `--size`."""
    if args.logits is None:
        return
    logits = torch.from_numpy(np.load(args.logits)["logits"]).float()
    maps = []
    for index in (0, len(logits) // 2, len(logits) - 1):
        image = logits[index : index + 1]
        large = torch.nn.functional.interpolate(image, (args.size, args.size), mode="bilinear")
        maps += [(f"image {index}, ", image.softmax(1)), (f"image {index}, ", large.softmax(1))]
    yield compare_backends(f"softmax of {args.logits.name}", maps, args)


def repeat(run: Callable[[], object], number: int) -> None:
    for _ in range(number):
        run()


def compare_backends(title: str, maps: Iterable[tuple[str, Tensor]], args: argparse.Namespace) -> Table:
    """Return a table of rank_dice with each backend against argmax on probability maps, each after its name."""
    rows = []
    for label, probs in maps:
        # Small maps: many calls are timed together, because one is too short for the clock.
        number = max(1, (1 << 17) // probs[0, 0].numel())
        kept = ("argmax + one-hot", "rank_dice, native", "rank_dice, python")
        rules = {name: partial(repeat, rule, number) for name, rule in candidates_for(probs).items() if name in kept}
        found = time_in_turn(rules, args.rounds)
        argmax = found.pop("argmax + one-hot")
        shape = f"{label}{'x'.join(map(str, probs.shape))} {str(probs.dtype).removeprefix('torch.')}"
        for name, value in found.items():
            milliseconds = f"{1000 * value.cpu / number:.3f}"
            rows.append([shape, name.removeprefix("rank_dice, "), milliseconds, *ratios(value, argmax)])
    return [title, "backend", "rank_dice, processor ms", "against argmax: processor", "wall"], rows


def approximations(args: argparse.Namespace) -> Iterator[Table]:
    """Compare the published approximations on 1x2x128x128."""
    probs = torch.softmax(torch.randn(1, 2, 128, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    names = ("exact (app=0)", "T-RNA (app=1)", "BA (app=2)")
    rows = time_in_turn({name: partial(rankseg.rank_dice, probs, app) for app, name in enumerate(names)}, args.rounds)
    base = rows[names[1]].cpu
    cells = [[name, f"{value.cpu:.4f}", f"{value.cpu / base:.2f}"] for name, value in rows.items()]
    yield ["1x2x128x128", "seconds", "against T-RNA"], cells


def peak_extra(run: Callable[[], object]) -> int:
    """Return by how many bytes `run` raises the peak resident memory of this process (Linux with glibc only)."""
    ctypes.CDLL(None).malloc_trim(0)  # otherwise `run` would reuse freed memory that the process still holds
    Path("/proc/self/clear_refs").write_text("5")
    before = read_memory("VmRSS")
    run()
    return read_memory("VmHWM") - before


def memory(args: argparse.Namespace) -> Iterator[Table]:
    """Measure the peak memory of rank_dice in addition to its input; the masks are included. Linux only."""
    if not Path("/proc/self/clear_refs").exists():
        return
    rows = []
    for kind, probs in make_maps(args.size).items():
        extra = peak_extra(partial(rankseg.rank_dice, probs))
        share = extra / (probs.numel() * probs.element_size())
        rows.append([f"6x19x{args.size}x{args.size}, {kind}", f"{extra / 2**20:.0f}", f"{share:.2f}"])
    yield ["peak memory besides the input, with masks", "MiB", "of the input"], rows


def volume(args: argparse.Namespace) -> Iterator[Table]:
    """Measure the time of rank_dice on one float16 volume of 3 classes, and its peak memory without input and masks."""
    generator, size = torch.Generator().manual_seed(0), args.size
    coarse = torch.randn(1, 3, max(2, args.depth // 32), max(2, size // 32), max(2, size // 32), generator=generator)
    coarse = torch.nn.functional.interpolate(coarse, (args.depth, size // 4, size // 4), mode="trilinear")
    probs = torch.empty(1, 3, args.depth, size, size, dtype=torch.float16)
    for plane in range(args.depth):  # the whole volume in float32 would take four times its memory
        logits = torch.nn.functional.interpolate(coarse[:, :, plane], (size, size), mode="bilinear")
        probs[:, :, plane] = torch.softmax(20 * logits, dim=1)
    run = partial(rankseg.rank_dice, probs)
    seconds = time_in_turn({"rank_dice": run}, args.rounds)["rank_dice"]
    cells = [f"{'x'.join(map(str, probs.shape))}, {probs.numel() / 1e6:.0f} M values"]
    cells += [f"{seconds.cpu:.2f}", f"{seconds.wall:.2f}"]
    if Path("/proc/self/clear_refs").exists():
        extra = peak_extra(run) - probs.numel()  # a mask takes one byte per value
        cells += [f"{extra / 2**20:.0f}", f"{extra / (2 * probs.numel()):.3f}"]
    yield (
        ["float16, saturated", "processor s", "wall s", "peak memory besides input and masks, MiB", "of the input"],
        [cells],
    )


def one_label(args: argparse.Namespace) -> Iterator[Table]:
    """Compare the surrogate objective of non-overlapping masks of argmax, the peer and rank_dice; needs --peer."""
    if not args.peer:
        return
    rows = []
    for sharpness in (2, 6):
        noise = torch.randn(4, 19, 256, 256, generator=torch.Generator().manual_seed(0))
        probs = torch.softmax(sharpness * noise, dim=1)
        flat, present = probs.flatten(2), probs.flatten(2).amax(2) > 0.5
        masks = rankseg.rank_dice(probs, allow_overlap=False).predict
        ours = torch.where(masks.any(1), masks.float().argmax(1), 19)
        theirs = run_peer(args, probs, 1, metric="dice", solver="RMA", output_mode="multiclass")[1]
        values = [
            surrogate_objective(flat, labels.flatten(1), present, "dice", 0.0).mean()
            for labels in (probs.argmax(1), theirs, ours)
        ]
        free = rankseg.rank_dice(probs)
        mass, mean = (flat * free.predict.flatten(2)).double().sum(2), flat.double().sum(2)
        values.append((2 * mass / (free.tau + mean + 1) * present).sum(1).div(present.sum(1)).mean())
        rows.append([f"sharpness {sharpness}", *(f"{float(value):.5f}" for value in values)])
    yield ["one label per pixel, 4x19x256x256", "argmax", "peer", "rank_dice", "bound (overlap allowed)"], rows


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Table]]] = {
    "main": speed,
    "shapes": shapes,
    "real": real,
    "approximations": approximations,
    "memory": memory,
    "volume": volume,
    "objective": one_label,
}
