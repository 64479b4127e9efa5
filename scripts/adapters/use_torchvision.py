"""Any rule on a torchvision segmentation model: `pip install . torchvision`, in the root of the repository.

These models return a dict whose "out" is (N, C, H, W), at the size of the image.
"""

from __future__ import annotations

from functools import partial

import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import rankseg

NONOVERLAP = partial(rankseg.rankdice, allow_overlap=False)  # at most one class per pixel


def segment(model: torch.nn.Module, images: torch.Tensor, rule: rankseg.Predictor = NONOVERLAP) -> torch.Tensor:
    """Return one label per pixel, (N, H, W) int64; a pixel without a class is 255."""
    with torch.inference_mode():
        probs = model(images)["out"].softmax(1)
    return rankseg.label_map(rule(probs), probs=probs)


def main() -> None:
    # Trained: lraspp_mobilenet_v3_large(weights="DEFAULT"); its images need the transforms of these weights.
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    labels = segment(model, torch.rand(2, 3, 96, 128))
    print(f"labels {tuple(labels.shape)}, classes {labels.unique().tolist()}")


if __name__ == "__main__":
    main()
