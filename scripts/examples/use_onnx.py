"""RankDice on the output of an ONNX model: `pip install . onnxruntime`, here (and onnx to export).

A runtime hands over NumPy arrays; `torch.from_numpy` shares their memory, so nothing is copied.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import rankseg


def segment(logits: np.ndarray) -> np.ndarray:
    """Return masks (N, C, H, W) bool for a network of independent classes (sigmoid), logits (N, C, H, W)."""
    probs = torch.from_numpy(logits).sigmoid()  # softmax(1) where classes exclude each other
    return rankseg.rankdice(probs).numpy()


def main() -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"  # your own model; here one layer, to have something to run
        images = torch.rand(1, 3, 64, 80)
        torch.onnx.export(
            torch.nn.Conv2d(3, 2, 3, padding=1), (images,), path, input_names=["images"], dynamo=False
        )
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(None, {"images": images.numpy()})
    masks = segment(logits)
    print(f"masks {masks.shape}, pixels of each class: {masks.sum((2, 3)).tolist()}")


if __name__ == "__main__":
    main()
