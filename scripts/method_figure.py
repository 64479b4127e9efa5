"""Draw the figure of docs/method.md: from probabilities to the mask of the highest expected Dice.

    python scripts/method_figure.py [docs/method.png]

The example is a blurred object in 32 x 32 pixels. The four panels are its probabilities, the same probabilities sorted,
the exact expected Dice of every volume, and the masks of threshold and RankDice. Nothing in it is random.
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs.cli import run_cli
from configs.errors import one_line
from rankseg import expected_dice, rank_dice
from scripts import ROOT
from scripts.analysis.charts import load_pyplot
from scripts.common import command_line

SIDE = 32
COLORS = {"T": "#d95f02", "RankDice": "#1f5fbf"}


def blurred_object() -> torch.Tensor:
    """Return probabilities (1, 1, H, W): a smooth hill that falls from 0.85 to 0.02."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    distance = ((x - 14) / 9) ** 2 + ((y - 16) / 7) ** 2
    return (0.02 + 0.83 * torch.exp(-distance))[None, None].double()


def score_every_volume(probs: torch.Tensor) -> torch.Tensor:
    """Return the expected Dice of the mask of the τ most probable of D pixels, for τ = 0 … D: (D + 1,)."""
    pixels = probs.numel()
    rank = probs.flatten().argsort(descending=True).argsort().view(SIDE, SIDE)
    masks = rank < torch.arange(pixels + 1)[:, None, None]
    return expected_dice(probs.expand(pixels + 1, 1, SIDE, SIDE), masks[:, None])[:, 0]


def draw(path: Path) -> None:
    """Write the figure and print the numbers in it."""
    plt, probs = load_pyplot(), blurred_object()
    scores, ordered = score_every_volume(probs), probs.flatten().sort(descending=True).values
    masks = {"T": probs >= 0.5, "RankDice": rank_dice(probs).predict}
    labels = {"T": "threshold 0.5", "RankDice": "RankDice"}
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.1), layout="constrained")
    shown = axes[0].imshow(probs[0, 0], cmap="Greys", vmin=0, vmax=1)
    figure.colorbar(shown, ax=axes[0], fraction=0.046)
    axes[0].set_title("1. probabilities p")
    axes[1].plot(range(1, len(ordered) + 1), ordered, color="black")
    axes[1].set(title="2. sorted", xlabel="pixel, most probable first", ylabel="p", ylim=(0, 1))
    axes[2].plot(range(len(scores)), scores, color="black")
    axes[2].set(title="3. expected Dice of each volume", xlabel="volume τ in pixels", ylim=(0, 0.8))
    axes[3].imshow(probs[0, 0], cmap="Greys", vmin=0, vmax=1)
    axes[3].set_title("4. masks")
    for name, mask in masks.items():
        volume, color = int(mask.sum()), COLORS[name]
        print(f"{labels[name]}: volume {volume}, expected Dice {scores[volume]:.4f}")
        axes[1].axvline(volume, color=color, linestyle="--", label=f"{labels[name]}: {volume}")
        axes[2].plot(volume, scores[volume], "o", color=color, label=f"{labels[name]}: {scores[volume]:.3f}")
        axes[3].contour(mask[0, 0], levels=[0.5], colors=color, linewidths=2)
    for axis in axes[1:3]:
        axis.legend(frameon=False)
    for axis in (axes[0], axes[3]):
        axis.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    print(one_line(path))


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("path", nargs="?", type=Path, default=ROOT / "docs" / "method.png", help="file to write")
    draw(parser.parse_args().path)


if __name__ == "__main__":
    run_cli(main)
