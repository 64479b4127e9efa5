"""Run the simulated examples of the paper, in which the true probabilities are known.

    python scripts/simulate.py                                  all four examples
    python scripts/simulate.py thresholds --images 200          Example 2: fixed thresholds against RankDice
    python scripts/simulate.py exponential linear --sizes 28 64 --heatmaps figures/

exponential  p = b^-(i+j), b = 1.01, 1.05, 1.10
linear       p = max(0, 1 − b(i+j) / (2 width)), b = 1, 2, 4
step         a top-left block of U(1/2, 1), half as wide as the image, in noise of mean β
thresholds   64 x 64: such a block at a random place, side ρ·64, ρ from U(.1, .5), in noise of mean 0.1

The noise is normal with standard deviation 0.1, truncated to [0, 1]; i and j count from 0. The paper does not give b
for `linear`, β, the width of the block in `step`, or the law of ρ: these are our choices. Labels are drawn from the
probabilities, independently for each pixel, and all rules are scored on the same labels. The tables show the mean Dice
(standard error) in percent. The same --seed gives the same tables.
Exit codes: 0 done, 2 bad input, 3 the disk failed.
"""

from __future__ import annotations

import math
import os
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import UserError, one_line
from rankseg import rank_dice
from rankseg.rules import threshold
from scripts.analysis.charts import load_pyplot
from scripts.common import check_least, command_line
from trainers.text import markdown_table

SIZES = (28, 64, 128, 256)
THRESHOLDS = tuple(k / 10 for k in range(1, 10))
_NOISE = 0.1  # standard deviation of the background
_CHUNK = 1 << 24  # labels drawn at a time


class Row(NamedTuple):
    """One setting: the Dice of each rule as mean and standard error in percent, and its mean volume in pixels.

    `gain` is RankDice − T 0.5, paired. `cutoffs` are the least, mean and largest cut-off of RankDice over the images:
    the smallest probability that it selects, 1 if it selects nothing.
    """

    setting: str
    size: int
    dice: dict[str, tuple[float, float]]
    volume: dict[str, float]
    gain: tuple[float, float]
    cutoffs: tuple[float, float, float]


def exponential(size: int, base: float, *_: object) -> Tensor:
    """Return (size, size) probabilities base^-(i+j)."""
    return base ** -_diagonal(size)


def linear(size: int, slope: float, *_: object) -> Tensor:
    """Return (size, size) probabilities that fall linearly along the diagonal, clipped at 0."""
    return (1 - slope * _diagonal(size) / (2 * size)).clamp(min=0)


def _diagonal(size: int) -> Tensor:
    index = torch.arange(size, dtype=torch.float64)
    return index[:, None] + index[None, :]


def block(size: int, side: int, top: int, left: int, level: float, generator: torch.Generator) -> Tensor:
    """Return (size, size) probabilities: a square of U(1/2, 1) in truncated normal noise of mean `level`."""
    probs = truncated_normal((size, size), level, generator)
    square = torch.rand(side, side, generator=generator, dtype=torch.float64)
    probs[top : top + side, left : left + side] = 0.5 + 0.5 * square
    return probs


def truncated_normal(shape: tuple[int, ...], mean: float, generator: torch.Generator) -> Tensor:
    """Draw from the normal law with this mean and standard deviation 0.1, truncated (not clipped) to [0, 1]."""
    ends = torch.tensor([(0 - mean) / _NOISE, (1 - mean) / _NOISE], dtype=torch.float64)
    low, high = torch.special.ndtr(ends)
    uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
    return (mean + _NOISE * torch.special.ndtri(low + (high - low) * uniform)).clamp(0, 1)


def step(size: int, level: float, generator: torch.Generator) -> Tensor:
    """Return a square in the top-left corner, half as wide as the image, in noise of mean `level`."""
    return block(size, size // 2, 0, 0, level, generator)


def random_block(size: int, generator: torch.Generator) -> Tensor:
    """Return a pattern of Example 2: a square of random side at a random place, in noise of mean 0.1."""
    share, down, right = torch.rand(3, generator=generator, dtype=torch.float64).tolist()
    side = max(1, round((0.1 + 0.4 * share) * size))
    free = size - side + 1
    return block(size, side, int(down * free), int(right * free), 0.1, generator)


def dice_of_draws(probs: Tensor, masks: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
    """Return (draws, rules) Dice of masks (H, W) against labels drawn from probs (H, W); 0/0 = 0."""
    flat = torch.stack([mask.flatten() for mask in masks]).double()  # (rules, D)
    volumes, probs, parts = flat.sum(1), probs.flatten(), []
    step = max(1, _CHUNK // len(probs))
    for start in range(0, draws, step):
        shape = (min(step, draws - start), len(probs))
        labels = (torch.rand(shape, generator=generator, dtype=torch.float64) < probs).double()
        total = volumes + labels.sum(1, keepdim=True)
        parts.append(2 * labels @ flat.T / total.clamp(min=1))
    return torch.cat(parts)


# Example -> format of the names of its settings, their values, and the function that makes an image.
PATTERNS: dict[str, tuple[str, tuple[float, ...], Callable[..., Tensor]]] = {
    "exponential": ("b = {:.2f}", (1.01, 1.05, 1.10), exponential),
    "linear": ("b = {:g}", (1.0, 2.0, 4.0), linear),
    "step": ("β = {:g}", (0.1, 0.2, 0.3, 0.4), step),
}
EXAMPLES = (*PATTERNS, "thresholds")


def settings(example: str, sizes: Sequence[int], seed: int) -> Iterator[tuple[str, int, Callable[[], Tensor]]]:
    """Yield the settings of an example: a name, the size, and a function that makes the next image."""
    if example == "thresholds":
        yield "ρ random", 64, partial(random_block, 64, _generator(seed, "thresholds"))
        return
    form, values, pattern = PATTERNS[example]
    for size, value in product(sizes, values):
        yield form.format(value), size, partial(pattern, size, value, _generator(seed, f"step {size} {value}"))


def _generator(seed: int, name: str) -> torch.Generator:
    """Return a separate generator for each setting, independent of the other settings."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def simulate(
    example: str, sizes: Sequence[int] = SIZES, images: int = 100, draws: int = 100, seed: int = 0
) -> list[Row]:
    """Return a row for each setting of one of EXAMPLES.

    `exponential` and `linear` have one image for each setting, and standard errors are of the mean over draws. The
    other examples have `images` random images, and standard errors are of the mean over images, because the draws of
    one image share its mask.
    """
    fixed = THRESHOLDS if example == "thresholds" else (0.5,)
    rules: dict[str, Callable[[Tensor], Tensor]] = {f"T {at:g}": partial(threshold, at=at) for at in fixed}
    rules["RankDice (BA)"] = lambda p: rank_dice(p, app=2).predict
    rules["RankDice"] = lambda p: rank_dice(p).predict
    images = images if example in ("step", "thresholds") else 1
    rows = []
    for setting, size, make in settings(example, sizes, seed):
        labels = _generator(seed, f"labels {example} {setting} {size}")
        scores, volumes, cutoffs = [], [], []
        for probs in [make() for _ in range(images)]:
            masks = [rule(probs[None, None])[0, 0] for rule in rules.values()]
            dice = dice_of_draws(probs, masks, draws, labels)
            scores.append(dice if images == 1 else dice.mean(0, keepdim=True))
            volumes.append(torch.stack([mask.sum() for mask in masks]).double())
            cutoffs.append(float(probs[masks[-1]].min()) if masks[-1].any() else 1.0)
        table = dict(zip(rules, 100 * torch.cat(scores).T, strict=True))  # of the images or draws
        rows.append(
            Row(
                setting,
                size,
                dice={name: _mean_and_error(values) for name, values in table.items()},
                volume=dict(zip(rules, torch.stack(volumes).mean(0).tolist(), strict=True)),
                gain=_mean_and_error(table["RankDice"] - table["T 0.5"]),
                cutoffs=(min(cutoffs), fmean(cutoffs), max(cutoffs)),
            )
        )
    return rows


def _mean_and_error(values: Tensor) -> tuple[float, float]:
    return float(values.mean()), float(values.std()) / math.sqrt(len(values))


def markdown(example: str, rows: Sequence[Row]) -> str:
    """Return the table of an example; RankDice − T 0.5 is paired, draw by draw or image by image."""
    head = ["setting", "size", *rows[0].dice, "RankDice − T 0.5", "smallest p chosen", "volume T 0.5 → RankDice"]
    cells = []
    for row in rows:
        low, mean, high = row.cutoffs
        span = f"{mean:.3f}" if low == high else f"{mean:.3f} [{low:.3f}, {high:.3f}]"
        scores = [f"{dice:.2f} ({error:.2f})" for dice, error in row.dice.values()]
        volumes = f"{row.volume['T 0.5']:.0f} → {row.volume['RankDice']:.0f}"
        gain = f"{row.gain[0]:+.2f} ({row.gain[1]:.2f})"
        cells.append([row.setting, f"{row.size}²", *scores, gain, span, volumes])
    return f"**{example}**\n\n{markdown_table(head, cells, labels=2)}"


def draw_heatmaps(example: str, folder: Path, seed: int = 0) -> Path:
    """Draw one map for each setting, with the outlines of T 0.5 (dashed) and RankDice (solid); return the path."""
    plt = load_pyplot()
    found = list(settings(example, (64,), seed))
    size = 3.4 * len(found) + 0.8, 3.6
    figure, axes = plt.subplots(1, len(found), figsize=size, squeeze=False, layout="constrained")
    for axis, (setting, side, make) in zip(axes[0], found, strict=True):
        probs = make()
        image = axis.imshow(probs, vmin=0, vmax=1, cmap="viridis")
        for mask, style in ((probs >= 0.5, "--"), (rank_dice(probs[None, None]).predict[0, 0], "-")):
            if mask.any() and not mask.all():
                axis.contour(mask.double(), levels=[0.5], colors="white", linestyles=style, linewidths=1.2)
        axis.set(title=f"{example}, {setting}, {side}²", xticks=[], yticks=[])
    figure.colorbar(image, ax=axes[0].tolist(), label="probability", shrink=0.85)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"simulate_{example}.png"
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("examples", nargs="*", metavar="EXAMPLE", help=f"any of {', '.join(EXAMPLES)} (default: all)")
    add("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="image widths (default: 28 64 128 256)")
    add("--images", type=int, default=100, help="random images of each setting of step and thresholds (default: 100)")
    add("--draws", type=int, default=100, help="label maps drawn for each image (default: 100)")
    add("--seed", type=int, default=0, help="seed of patterns and labels (default: 0)")
    add("--heatmaps", type=Path, metavar="FOLDER", help="folder to write a PNG of the images of each example to")
    args = parser.parse_args(arguments)
    check_least(args, images=2, draws=2)  # for standard errors
    unknown = [name for name in args.examples if name not in EXAMPLES]
    if unknown:
        raise UserError(f"{unknown[0]} is not an example. Fix: choose from {', '.join(EXAMPLES)}.")
    if min(args.sizes) < 2:
        raise UserError(f"--sizes {min(args.sizes)} is invalid: expected integers >= 2.")
    tables = []
    for example in args.examples or EXAMPLES:
        tables.append(markdown(example, simulate(example, args.sizes, args.images, args.draws, args.seed)))
        if args.heatmaps:
            path = draw_heatmaps(example, args.heatmaps, seed=args.seed)
            print(one_line(f"written: {path}"), file=sys.stderr)
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    run_cli(main)
