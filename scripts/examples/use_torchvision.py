"""RankDice on a torchvision segmentation model: `pip install . torchvision`, here.

These models answer with a dict whose "out" is (N, C, H, W), at the size of the image.
"""

from __future__ import annotations

import torch
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import rankseg


def segment(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return one label a pixel, (N, H, W) int64, the map that maximises the expected Dice."""
    with torch.inference_mode():
        probs = model(images)["out"].softmax(1)
    masks = rankseg.rankdice(probs, allow_overlap=False)  # at most one class a pixel
    return masks.int().argmax(1)  # a pixel of no class becomes 0, the background


def main() -> None:
    # Your own: lraspp_mobilenet_v3_large(weights="DEFAULT"), and its weights' transforms for the images
    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=21).eval()
    labels = segment(model, torch.rand(2, 3, 96, 128))
    print(f"labels {tuple(labels.shape)}, classes {labels.unique().tolist()}")


if __name__ == "__main__":
    main()
