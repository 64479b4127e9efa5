"""Draw images of a run's split: image | truth | probability | threshold | argmax | RankDice, each mask with its Dice.

    python scripts/overview.py saved/synthetic/tiny/ce/seed0 --out overview.png

The images are those at five fixed quantiles of the gain of RankDice over the threshold (rule T).
Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from configs import build
from configs.cli import run_cli
from configs.errors import UserError, one_line
from configs.fitting import Fitter
from scripts.common import add_run_options, check_least, command_line, load_run
from trainers.distributed import join_world
from trainers.evaluator import evaluate
from trainers.metrics import mean_over_classes
from trainers.panels import add_title, panels, tiles

RULES = ("T", "max", "rankdice")
QUANTILES = (0.95, 0.75, 0.5, 0.25, 0.05)
FONT = 15  # size that stays legible when a web page shrinks the picture by a third


def headings(threshold: float) -> list[str]:
    """Return the titles of the columns, with the threshold of T."""
    rules = (f"threshold {threshold:g}", "argmax", "RankDice")
    return ["image", "truth", "probability: 0 black, 1 white", *rules]


def captions(quantile: float, dice: Mapping[str, float]) -> list[str]:
    """Return the captions of an image: its quantile, and the Dice of each rule in percent."""
    place = "median gain" if quantile == 0.5 else f"{quantile:.0%} quantile of the gain"
    scores = {rule: f"Dice {dice[rule]:.1f}" for rule in RULES}
    scores["rankdice"] += f" ({dice['rankdice'] - dice['T']:+.1f})"
    return [place, "", "", *scores.values()]


def strip(drawn: Sequence[Tensor], above: Sequence[str], titles: Sequence[str] = ()) -> Tensor:
    """Join tiles (3, H, W) uint8 in a row with a caption above each; the first row also has titles."""
    made = [add_title(tile, text, FONT) for tile, text in zip(drawn, above, strict=True)]
    if titles:
        made = [add_title(tile[:, :-2, 1:-1], text, FONT) for tile, text in zip(made, titles, strict=True)]
    return torch.cat(made, dim=2)


def main() -> None:
    parser = command_line(__doc__)
    add_run_options(parser, "split=val, protocol=paper, calibrate=temperature")
    parser.add_argument("--out", type=Path, default=Path("overview.png"), help="default: %(default)s")
    parser.add_argument("--scale", type=int, default=2, help="enlargement of the images (default: %(default)s)")
    args = parser.parse_intermixed_args()
    check_least(args, scale=1)
    if args.out.suffix.lower() not in (".png", ".jpg", ".jpeg") or args.out.is_dir():
        raise UserError(f"--out {args.out} is invalid. Fix: give the name of a .png or .jpg file")
    with join_world(args.device) as world:
        path, network, cfg, _, data = load_run(args.run, args.overrides, world.device, RULES)
        fitter = Fitter(cfg, network, path, world)
        to_probs, precision = fitter.to_probs(), fitter.precision
        fitter.save()
        rules, criterion = build.rules(RULES, cfg), build.loss(cfg)
        loader, scoring = build.eval_loader(cfg, data, world), build.scoring(cfg, data.info)
        results = evaluate(
            network, loader, rules, criterion, scoring, world,
            to_probs=to_probs, precision=precision, progress="scoring",
        )  # fmt: skip
        dice = {name: mean_over_classes(r.counts.dice(), scoring.scored) for name, r in results.items()}
        gain = dice["rankdice"] - dice["T"]
        order = [i for i in gain.argsort().tolist() if not gain[i].isnan()]  # NaN: no class is scored
        if not order:
            raise UserError(f"split={cfg.split}: no image has a class that is scored. Fix: choose another split")
        picked = [order[round(q * (len(order) - 1))] for q in QUANTILES]
        drawn = panels(network, data, loader.transform, rules, to_probs, world, picked, precision)
        rows: list[Tensor] = []
        for quantile, index, (_, panel) in zip(QUANTILES, picked, drawn, strict=True):
            stack = torch.stack(list(tiles(panel).values()))
            enlarged = stack.repeat_interleave(args.scale, 2).repeat_interleave(args.scale, 3)
            above = captions(quantile, {name: 100 * float(dice[name][index]) for name in RULES})
            rows.append(strip(list(enlarged), above, () if rows else headings(build.threshold(cfg))))
    width = max(row.shape[2] for row in rows)
    rows = [pad(row, (0, width - row.shape[2]), value=255) for row in rows]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    to_pil_image(torch.cat(rows, dim=1)).save(args.out)
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    print(one_line(f"{args.out}: RankDice against T: better on {better} images, worse on {worse}, of {len(order)}"))
    gains = ", ".join(f"{q:.0%} ({100 * gain[i]:+.1f})" for q, i in zip(QUANTILES, picked, strict=True))
    print(f"rows: gain at the quantiles {gains}")


if __name__ == "__main__":
    run_cli(main)
