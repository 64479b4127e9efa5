"""Segmentation masks that maximise the expected Dice or IoU, exactly and without sorting all pixels.

    probs = model(images).softmax(1)                  # (N, C, *S)
    predict, tau, cutpoint = rankseg.rank_dice(probs)

Method: Dai & Li, "RankSEG: A Consistent Ranking-based Framework for Segmentation", JMLR 24(224), 2023.
"""

from rankseg import calibration
from rankseg.engines import backend
from rankseg.expected import confidence, expected_dice, expected_iou
from rankseg.masks import RankResult, label_map
from rankseg.rules import Predictor, argmax, rank_dice, rank_iou, rankdice, rankiou, threshold

__all__ = [
    "Predictor",
    "RankResult",
    "argmax",
    "backend",
    "calibration",
    "confidence",
    "expected_dice",
    "expected_iou",
    "label_map",
    "rank_dice",
    "rank_iou",
    "rankdice",
    "rankiou",
    "threshold",
]
