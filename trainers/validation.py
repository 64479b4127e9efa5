"""Validation after an epoch: score every rule, log the scores, draw pictures, and return one score of the network."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

from torch import nn

from rankseg import Predictor
from trainers.distributed import World
from trainers.evaluator import Scoring, evaluate
from trainers.journal import Journal
from trainers.losses import SegmentationLoss

NEUTRAL = "T"  # the rule whose mDice chooses the best epoch: the threshold favours no ranking rule


@dataclass(eq=False)
class Validation:
    """Score a network on the validation images.

    Attributes:
        data, loader: the images, and their batches; ``loader.transform`` made them.
        rules: name -> rule; the score of rule ``T`` chooses the best epoch.
        epochs: their number, for the printed line.
        panels: how many images are drawn for TensorBoard.
    """

    data: Any
    loader: Any
    rules: Mapping[str, Predictor]
    criterion: SegmentationLoss
    scoring: Scoring
    journal: Journal
    world: World
    _: KW_ONLY
    epochs: int
    precision: str = "fp32"
    panels: int = 0

    def __call__(self, network: nn.Module, epoch: int, step: int) -> float:
        """Return the mDice of rule T, or 0 if no image defines it."""
        results = evaluate(
            network,
            self.loader,
            self.rules,
            self.criterion,
            self.scoring,
            self.world,
            precision=self.precision,
            progress="validating",
        )
        for name, result in results.items():
            self.journal.log(step, f"val_{name}", epoch=epoch, **result.scores)
        if self.journal.events is not None:
            self._draw(network, step)
        dice = {name: result.scores["mean_dice"] for name, result in results.items()}
        if self.world.is_main:
            shown = "  ".join(f"{name} {100 * score:.2f}" for name, score in dice.items())
            loss = results[NEUTRAL].scores["test_loss"]
            print(f"epoch {epoch:>3}/{self.epochs}  val loss {loss:.4f}  mDice: {shown}", flush=True)
        return dice[NEUTRAL] if math.isfinite(dice[NEUTRAL]) else 0.0

    def _draw(self, network: nn.Module, step: int) -> None:
        from trainers.panels import panels, sheet  # slow to import

        first = range(min(self.panels, len(self.data)))
        drawn = panels(
            network,
            self.data,
            self.loader.transform,
            self.rules,
            self.criterion.link,
            self.world,
            first,
            draw=sheet,
            precision=self.precision,
        )
        for name, picture in drawn:
            self.journal.image(step, f"val/{name}", picture)
