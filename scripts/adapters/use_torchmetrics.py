"""Any rule as the prediction step of a torchmetrics metric: `pip install . torchmetrics`, in the repository.

metric = WithRule(DiceScore(3, average="macro", input_format="one-hot"), rankseg.rankdice)
metric.update(logits.softmax(1), labels)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

import rankseg


class WithRule(WrapperMetric):
    """Score masks that a rule makes of probabilities (N, C, *S) against labels (N, *S) in 0..C-1.

    ``metric`` must take one-hot predictions and targets (``input_format="one-hot"``). It gets both as int64.
    """

    def __init__(self, metric: Metric, rule: rankseg.Predictor = rankseg.rankdice) -> None:
        super().__init__()
        self.metric, self.rule = metric, rule

    def update(self, probs: Tensor, labels: Tensor) -> None:
        self.metric.update(self.rule(probs).long(), _one_hot(labels, probs.shape[1]))

    def forward(self, probs: Tensor, labels: Tensor) -> Any:
        """Add a batch and return its own score."""
        return self.metric(self.rule(probs).long(), _one_hot(labels, probs.shape[1]))

    def compute(self) -> Any:
        return self.metric.compute()

    def reset(self) -> None:
        super().reset()
        self.metric.reset()


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    return torch.nn.functional.one_hot(labels.long(), classes).movedim(-1, 1)


if __name__ == "__main__":
    from torchmetrics.segmentation import DiceScore

    metric = WithRule(DiceScore(3, average="macro", input_format="one-hot"))
    metric.update(torch.randn(2, 3, 32, 32).softmax(1), torch.randint(3, (2, 32, 32)))
    print("Dice", float(metric.compute()))
