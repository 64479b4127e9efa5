"""Any rule on the output of an ONNX model: `pip install . onnxruntime`, in the root of the repository.

A runtime returns NumPy arrays; `torch.from_numpy` shares their memory, so nothing is copied.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import rankseg


def segment(logits: np.ndarray, link: str = "softmax", rule: rankseg.Predictor = rankseg.rankdice) -> np.ndarray:
    """Return masks (N, C, *S) bool of logits (N, C, *S). Use link="sigmoid" if a pixel may have several classes."""
    if link not in ("softmax", "sigmoid"):
        raise ValueError(f"link={link!r} is invalid: expected softmax or sigmoid.")
    values = torch.from_numpy(logits)
    return rule(values.softmax(1) if link == "softmax" else values.sigmoid()).numpy()


def main() -> None:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"  # your own model; here one layer, to have something to run
        images = torch.rand(1, 3, 64, 80)
        torch.onnx.export(torch.nn.Conv2d(3, 2, 3, padding=1), (images,), path, input_names=["images"], dynamo=False)
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(None, {"images": images.numpy()})
    masks = segment(logits)
    print(f"masks {masks.shape}, pixels of each class: {masks.sum((2, 3)).tolist()}")


if __name__ == "__main__":
    main()
