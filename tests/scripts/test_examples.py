"""The examples for other people's models: each runs, and its masks are those of the rule on the right map."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rankseg
from scripts.examples import use_huggingface, use_onnx, use_torchvision

EXAMPLES = Path(use_onnx.__file__).parent


@dataclass
class Outputs:
    """As `transformers` answers: a dataclass with logits smaller than the image."""

    logits: Tensor


def test_huggingface_logits_are_resized_before_the_rule() -> None:
    logits = 3 * torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    masks = use_huggingface.segment(Outputs(logits), (32, 48))
    large = torch.nn.functional.interpolate(logits, (32, 48), mode="bilinear")
    assert masks.shape == (2, 4, 32, 48) and masks.dtype == torch.bool
    assert torch.equal(masks, rankseg.rankdice(large.softmax(1)))


def test_huggingface_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    use_huggingface.main()
    assert "masks (2, 2, 96, 128)" in capsys.readouterr().out


def test_torchvision_model(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    use_torchvision.main()
    assert "labels (2, 96, 128)" in capsys.readouterr().out


def test_torchvision_labels_are_those_of_the_rule() -> None:
    probs = (3 * torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))).softmax(1)
    labels = use_torchvision.segment(lambda images: {"out": probs.log()}, torch.rand(1, 3, 16, 16))
    masks = rankseg.rankdice(probs, allow_overlap=False)
    assert torch.equal(labels, masks.int().argmax(1))
    assert torch.equal(torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).bool() & masks, masks)


def test_onnx_arrays() -> None:
    logits = np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype(np.float32)
    expected = rankseg.rankdice(torch.from_numpy(logits.copy()).sigmoid())
    assert np.array_equal(use_onnx.segment(logits), expected.numpy())


def test_onnx_runtime(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    use_onnx.main()
    assert "masks (1, 2, 64, 80)" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("use_*.py")), ids=lambda path: path.stem)
def test_examples_are_short_and_need_the_method_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 45
    assert "import rankseg\n" in text
    assert not any(
        f"from {name}" in text for name in ("configs", "datasets", "models", "scripts", "trainers")
    )
