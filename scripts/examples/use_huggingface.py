"""RankDice on a Hugging Face segmentation model: `pip install . transformers`, here.

SegFormer, UperNet, MobileViT, BEiT, DPT and others answer with `outputs.logits` (N, C, h, w), smaller than the
image. Resize the LOGITS, then make probabilities, then let the rule decide on the whole image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

import rankseg


def segment(outputs, size: tuple[int, int]) -> torch.Tensor:
    """Return masks (N, C, H, W) bool for outputs with `logits` (N, C, h, w) and the images' (H, W)."""
    logits = F.interpolate(outputs.logits.float(), size, mode="bilinear", align_corners=False)
    return rankseg.rankdice(logits.softmax(1))


def main() -> None:
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    # Your own: SegformerForSemanticSegmentation.from_pretrained("nvidia/segformer-b0-finetuned-ade-512-512")
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=2)).eval()
    images = torch.rand(2, 3, 96, 128)  # as AutoImageProcessor gives them
    with torch.inference_mode():
        masks = segment(model(pixel_values=images), (96, 128))
    print(
        f"masks {tuple(masks.shape)}, pixels of each class in the first image: {masks[0].sum((1, 2)).tolist()}"
    )


if __name__ == "__main__":
    main()
