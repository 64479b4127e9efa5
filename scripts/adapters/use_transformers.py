"""Any rule on a transformers model: `pip install . transformers`, in the root of the repository.

SegFormer, UperNet, BEiT, DPT and others return `logits` (N, C, h, w), smaller than the image. Mask2Former and
MaskFormer return queries. As in `post_process_semantic_segmentation`, scores are resized to the original size first.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import rankseg


def probabilities(outputs: Any, sizes: list[tuple[int, int]], mask_size: int = 384) -> list[Tensor]:
    """Return the probabilities (1, C, H, W) of each image at its original (H, W).

    A query model has no distribution over the classes of a pixel. The scores of its queries are added up, and scaled to
    a sum of at most 1, which keeps their order. The library resizes the masks of Mask2Former to ``mask_size`` first.
    """
    if hasattr(outputs, "logits"):
        logits = outputs.logits.float()
        return [_resize(one[None], size).softmax(1) for one, size in zip(logits, sizes, strict=True)]
    masks = F.interpolate(outputs.masks_queries_logits.float(), (mask_size, mask_size), mode="bilinear")
    classes = outputs.class_queries_logits.float().softmax(-1)[..., :-1]  # without the null class
    scores = torch.einsum("bqc, bqhw -> bchw", classes, masks.sigmoid())
    resized = [_resize(one[None], size) for one, size in zip(scores, sizes, strict=True)]
    return [one / one.sum(1, keepdim=True).clamp(min=1) for one in resized]


def _resize(scores: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(scores, size, mode="bilinear", align_corners=False)


def segment(outputs: Any, sizes: list[tuple[int, int]], rule: rankseg.Predictor = rankseg.rankdice) -> list[Tensor]:
    """Return the masks (C, H, W) bool of each image."""
    return [rule(probs)[0] for probs in probabilities(outputs, sizes)]


def main() -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    # Trained: SegformerForSemanticSegmentation.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512")
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2)).eval()
    images = torch.rand(2, 3, 96, 128)  # as AutoImageProcessor returns them
    with torch.inference_mode():
        masks = segment(model(pixel_values=images), [(96, 128), (48, 64)])
    print(f"masks {[tuple(m.shape) for m in masks]}, pixels of each class: {masks[0].sum((1, 2)).tolist()}")


if __name__ == "__main__":
    main()
