"""Any rule on a segmentation_models_pytorch model: `pip install . segmentation-models-pytorch`, in the repository.

The models return logits (N, C, H, W) for images whose sides are multiples of the encoder's stride. Leave
``activation=None`` (the default), and pass the ``mode`` of the training loss. It decides the link: softmax for
"multiclass", sigmoid for "multilabel" and "binary".
"""

from __future__ import annotations

import segmentation_models_pytorch as smp
import torch

import rankseg


def probabilities(logits: torch.Tensor, mode: str) -> torch.Tensor:
    """Return probabilities for smp's modes "binary", "multiclass" and "multilabel"."""
    if mode not in ("binary", "multiclass", "multilabel"):
        raise ValueError(f"mode={mode!r} is invalid: expected binary, multiclass or multilabel.")
    return logits.softmax(1) if mode == "multiclass" else logits.sigmoid()


def segment(
    model: torch.nn.Module, images: torch.Tensor, mode: str, rule: rankseg.Predictor = rankseg.rankdice
) -> torch.Tensor:
    """Return masks (N, C, H, W) bool, as `smp.metrics.get_stats` takes them (after `.long()`)."""
    with torch.inference_mode():
        return rule(probabilities(model(images), mode))


def main() -> None:
    model = smp.Unet("resnet18", encoder_weights=None, classes=3).eval()  # encoder_weights="imagenet" downloads
    masks = segment(model, torch.rand(2, 3, 64, 96), "multiclass")
    print(f"masks {tuple(masks.shape)}, pixels of each class: {masks[0].sum((1, 2)).tolist()}")


if __name__ == "__main__":
    main()
