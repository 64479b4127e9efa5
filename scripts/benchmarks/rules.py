"""The prediction rules: exact RankDice with each backend against argmax, the approximations and PyPI `rankseg`.

Every row is a median of `--rounds` rounds in which all candidates take turns, so that a drifting machine affects
all alike. Each table has two ratios: of processor time, which other users of the machine hardly change, and of wall
time. `--busy N` measures while N processes, started and ended here, keep the processor busy. `--parts` chooses tables.
`--peer PYTHON` names the interpreter of an environment with `rankseg==0.0.8` (the names clash).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import rankseg
from rankseg.nonoverlap import surrogate_objective
from scripts.benchmarks.timing import Seconds, in_turn

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
    """Declare the options."""
    parser.add_argument("--rounds", type=int, default=5, help="rounds a median is of (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="processor threads (default 1)")
    parser.add_argument("--busy", type=int, default=0, help="busy processes next to the main table (default 0)")
    parser.add_argument("--size", type=int, default=512, help="pixels a side of the main row (default 512)")
    parser.add_argument("--largest", type=int, default=2048, help="largest side of the other sizes (default 2048)")
    parser.add_argument("--peer", help="python of an environment with rankseg==0.0.8")
    parser.add_argument("--volume", action="store_true", help="a 1x2x256x256x256 volume too (1 GiB)")
    parser.add_argument("--logits", type=Path, help=".npz with `logits` (N, C, H, W) of a network, for real maps")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="tables to print (default all)")


def ratios(value: Seconds, other: Seconds) -> str:
    """Return the ratios of both clocks as two cells of a table."""
    return f"{value.cpu / other.cpu:.2f} | {value.wall / other.wall:.2f}"


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep the processor busy with so many other processes."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def with_backend(name: str, rule: Callable[..., object], probs: Tensor, **options: object) -> object:
    """Call a rule with the backend `name`."""
    before = os.environ.get("RANKSEG_BACKEND")
    os.environ["RANKSEG_BACKEND"] = name
    try:
        return rule(probs, **options)
    finally:
        if before is None:
            del os.environ["RANKSEG_BACKEND"]
        else:
            os.environ["RANKSEG_BACKEND"] = before


def main(args: argparse.Namespace) -> None:
    """Print the rows."""
    torch.set_num_threads(args.threads)
    beside = f", {args.busy} busy processes" if args.busy else ""
    print(
        f"torch {torch.__version__}, threads: {args.threads}, median of {args.rounds}, backend "
        f"{rankseg.backend()}{beside}\n"
    )
    with busy(args.busy):
        for name in args.parts:
            PARTS[name](args)


def main_table(args: argparse.Namespace) -> None:
    """The exact rules on the CPU, and on a GPU if there is one."""
    speed(args, "cpu")
    if torch.cuda.is_available():
        print(f"\non {torch.cuda.get_device_name()}")
        speed(args, "cuda")


def fields(size: int, images: int = 6, classes: int = 19) -> dict[str, Tensor]:
    """Probability maps (N, C, size, size): independent pixels, smooth objects, and the saturated ones of a net."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images, classes, size, size, generator=generator)
    coarse = torch.randn(images, classes, max(2, size // 32), max(2, size // 32), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return {
        "independent": torch.softmax(3 * noise, dim=1),
        "smooth": torch.softmax(4 * smooth, dim=1),
        "saturated": torch.softmax(20 * smooth, dim=1),
    }


def peer(args: argparse.Namespace, probs: Tensor, rounds: int, **options: object) -> tuple[Seconds, Tensor]:
    """Median seconds and the prediction of PyPI `rankseg` on `probs`, in its own environment."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "probs.pt", Path(folder) / "found.pt"
        torch.save(probs, source)
        command = [args.peer, "-c", PEER, source, json.dumps(options), args.threads, rounds, target]
        out = subprocess.run(map(str, command), cwd=folder, check=True, capture_output=True, text=True).stdout
        return Seconds(*json.loads(out.splitlines()[-1])), torch.load(target)


def candidates_for(probs: Tensor, device: str = "cpu") -> dict[str, Callable[[], object]]:
    """The rules to compare on `probs`, each with every backend that is installed."""
    backends = ["python"] + (["native"] if device == "cpu" and rankseg.backend() == "native" else [])
    rules: dict[str, Callable[[], object]] = {
        "argmax + one-hot": lambda: rankseg.argmax(probs),
        "p == amax (ties overlap)": lambda: probs == probs.amax(1, keepdim=True),
    }
    for name in backends[::-1]:
        rules |= {
            f"rank_dice, {name}": lambda n=name: with_backend(n, rankseg.rank_dice, probs),
            f"rank_iou, {name}": lambda n=name: with_backend(n, rankseg.rank_iou, probs),
            f"rank_dice, non-overlapping, {name}": lambda n=name: with_backend(
                n, rankseg.rank_dice, probs, allow_overlap=False
            ),
        }
    return rules


def speed(args: argparse.Namespace, device: str) -> None:
    """Exact rules against argmax + one-hot, and against the peer's RMA."""
    print(f"| 6x19x{args.size}x{args.size} float32 | rule | processor s | wall s | against argmax: processor | wall |")
    print("|---|---|---|---|---|---|")
    for kind, probs in fields(args.size).items():
        probs = probs.to(device)
        rows = in_turn(candidates_for(probs, device), args.rounds, device)
        if args.peer and device == "cpu":
            options = {"metric": "dice", "solver": "RMA", "output_mode": "multilabel"}
            rows["peer, RMA, screening"] = peer(args, probs, args.rounds, safe_screening="auto", **options)[0]
        for name, value in rows.items():
            ratio = ratios(value, rows["argmax + one-hot"])
            print(f"| {kind} | {name} | {value.cpu:.3f} | {value.wall:.3f} | {ratio} |")


def calls(run: Callable[[], object], number: int) -> None:
    """Call `run` several times."""
    for _ in range(number):
        run()


def shapes(args: argparse.Namespace) -> None:
    """Other sizes, numbers of classes and half precision, on saturated maps."""
    shape_header("saturated")
    for size, images, classes, dtype in (
        (64, 1, 2, torch.float32),
        (256, 1, 2, torch.float32),
        (512, 1, 2, torch.float32),
        (args.largest, 1, 2, torch.float32),
        (512, 1, 19, torch.float32),
        (512, 1, 150, torch.float32),
        (512, 6, 19, torch.float16),
    ):
        size = min(size, args.largest)
        probs = fields(size, images, classes)["saturated"].to(dtype)
        shape_rows(probs, args)


def shape_header(title: str) -> None:
    """Print the head of a table of `shape_rows`."""
    print(f"\n| {title} | backend | rank_dice, processor ms | against argmax: processor | wall |")
    print("|---|---|---|---|---|")


def shape_rows(probs: Tensor, args: argparse.Namespace) -> None:
    """rank_dice with each backend on one tensor."""
    # Small maps: one sample is many calls, so that the clock can see it.
    repeat = max(1, (1 << 17) // probs[0, 0].numel())
    rules = candidates_for(probs)
    kept = ["argmax + one-hot", *(f"rank_dice, {name}" for name in ("native", "python"))]
    rows = in_turn({name: partial(calls, rules[name], repeat) for name in kept if name in rules}, args.rounds)
    shape = f"{'x'.join(map(str, probs.shape))} {str(probs.dtype).removeprefix('torch.')}"
    for name, value in rows.items():
        if name != "argmax + one-hot":
            ratio = ratios(value, rows["argmax + one-hot"])
            print(f"| {shape} | {name.split(', ')[1]} | {1000 * value.cpu / repeat:.3f} | {ratio} |")


def real(args: argparse.Namespace) -> None:
    """Maps of a network, one image a call, at their size and at `--size`: the first, the middle and the last image."""
    if args.logits is None:
        return
    import numpy as np

    logits = torch.from_numpy(np.load(args.logits)["logits"]).float()
    shape_header(f"softmax of {args.logits.name}")
    for index in (0, len(logits) // 2, len(logits) - 1):
        image = logits[index : index + 1]
        large = torch.nn.functional.interpolate(image, (args.size, args.size), mode="bilinear")
        for maps in (image, large):
            shape_rows(maps.softmax(1), args)


def trna(args: argparse.Namespace) -> None:
    """The published approximations on 1x2x128x128."""
    probs = torch.softmax(torch.randn(1, 2, 128, 128, generator=torch.Generator().manual_seed(0)), dim=1)
    names = ("exact (app=0)", "T-RNA (app=1)", "BA (app=2)")
    rows = in_turn({name: partial(rankseg.rank_dice, probs, app) for app, name in enumerate(names)}, args.rounds)
    print("\n| 1x2x128x128 | seconds | against T-RNA |\n|---|---|---|")
    for name, value in rows.items():
        print(f"| {name} | {value.cpu:.4f} | {value.cpu / rows[names[1]].cpu:.2f} |")


def peak_extra(run: Callable[[], object]) -> int:
    """Bytes by which the resident memory of this process peaks while `run` runs (Linux, glibc)."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide what is taken
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    run()
    return status("VmHWM") - before


def memory(args: argparse.Namespace) -> None:
    """Peak memory over the input, masks included."""
    if not Path("/proc/self/clear_refs").exists():
        return
    print("\n| peak extra memory | MiB | of the input |\n|---|---|---|")
    inputs = {f"6x19x{args.size}x{args.size}, {kind}": maps for kind, maps in fields(args.size).items()}
    if args.volume:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.randn(1, 2, 16, 16, 16, generator=generator)
        volume = torch.nn.functional.interpolate(coarse, size=(256, 256, 256), mode="trilinear")
        inputs["1x2x256x256x256"] = torch.softmax(6 * volume, dim=1)
    for name, probs in inputs.items():
        extra = peak_extra(lambda p=probs: rankseg.rank_dice(p))
        print(f"| {name} | {extra / 2**20:.0f} | {extra / (probs.numel() * probs.element_size()):.2f} |")


def one_label(args: argparse.Namespace) -> None:
    """Surrogate objective of one-label masks: argmax, the peer's multiclass rule, ours."""
    if not args.peer:
        return
    print("\n| one label per pixel, 4x19x256x256 | argmax | peer | rank_dice | bound (overlap allowed) |")
    print("|---|---|---|---|---|")
    for sharpness in (2, 6):
        noise = torch.randn(4, 19, 256, 256, generator=torch.Generator().manual_seed(0))
        probs = torch.softmax(sharpness * noise, dim=1)
        flat, present = probs.flatten(2), probs.flatten(2).amax(2) > 0.5
        _, labels = peer(args, probs, 1, metric="dice", solver="RMA", output_mode="multiclass")

        def value(labels: Tensor, flat: Tensor = flat, present: Tensor = present) -> float:
            return float(surrogate_objective(flat, labels.flatten(1), present, "dice", 0.0).mean())

        masks = rankseg.rank_dice(probs, allow_overlap=False).predict
        ours = torch.where(masks.any(1), masks.float().argmax(1), 19)
        free = rankseg.rank_dice(probs)
        mass, mean = (flat * free.predict.flatten(2)).double().sum(2), flat.double().sum(2)
        bound = float((2 * mass / (free.tau + mean + 1) * present).sum(1).div(present.sum(1)).mean())
        cells = [value(probs.argmax(1)), value(labels), value(ours), bound]
        print(f"| sharpness {sharpness} | " + " | ".join(f"{cell:.5f}" for cell in cells) + " |")


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "main": main_table,
    "shapes": shapes,
    "real": real,
    "approximations": trna,
    "memory": memory,
    "objective": one_label,
}
