"""The drawn data: reproducible, calibrated by construction, uncertain enough that ranking pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from configs.errors import UserError
from datasets.synthetic import Synthetic, smooth_basis


def masks_of(data: Synthetic, index: int) -> Tensor:
    """The annotation as (C, H, W) bool."""
    return one_hot(data.read(index)[1].long(), data.info.num_classes).permute(2, 0, 1).bool()


def dice(predicted: Tensor, actual: Tensor) -> float:
    """Mean Dice over the classes of (C, H, W) masks, background and classes absent from both left out."""
    predicted, actual = predicted[1:].flatten(1), actual[1:].flatten(1)
    total = predicted.sum(1) + actual.sum(1)
    return (2 * (predicted & actual).sum(1) / total).nanmean().item()


def ranked(probs: Tensor) -> Tensor:
    """RankDice by its definition, slowly: the best volume under E[Dice] to first order, classes likely present."""
    flat = probs.flatten(1).double()
    values = flat.sort(dim=1, descending=True).values
    volume = torch.arange(1, flat.shape[1] + 1)
    best = (values.cumsum(1) / (volume + flat.sum(1, keepdim=True) + 1)).argmax(1, keepdim=True)
    return ((flat >= values.gather(1, best)) & (flat.amax(1, keepdim=True) > 0.5)).view_as(probs)


def test_images_depend_on_seed_split_and_index_only():
    data = Synthetic("val", num_images=4, size=48)
    image, mask = data.read(2)
    torch.manual_seed(1)
    again = Synthetic("val", num_images=9, size=48).read(2)
    assert torch.equal(image, again[0]) and torch.equal(mask, again[1])
    others = (
        Synthetic("val", size=48).read(3),
        Synthetic("train", size=48).read(2),
        Synthetic("val", size=48, seed=1).read(2),
    )
    assert all(not torch.equal(image, other) for other, _ in others)


def test_drawing_leaves_the_random_state_alone():
    before = torch.get_rng_state()
    Synthetic("val", num_images=1, size=32).read(0)
    assert torch.equal(before, torch.get_rng_state())


def test_sizes_and_counts():
    assert [len(Synthetic(split)) for split in ("train", "val", "test")] == [400, 100, 100]
    data = Synthetic("val", num_images={"train": 8, "val": 4}, size=48, num_classes=3)
    assert len(data) == 4 and data.info.num_classes == 3 and data.info.scored == (1, 2)
    assert data.read(0)[0].shape == (3, 48, 48) and data.posterior(0).shape == (3, 48, 48)
    with pytest.raises(IndexError):
        data.read(4)


def test_small_and_large_objects_of_every_class_occur():
    data = Synthetic("train", num_images=100)
    areas = torch.stack([masks_of(data, index).flatten(1).sum(1) for index in range(100)])
    assert (areas > 0).any(0).all()
    present = areas[:, 1:][areas[:, 1:] > 0].float() / 96**2
    assert present.quantile(0.1) < 0.01 and present.quantile(0.9) > 0.05


def test_the_fields_of_annotation_have_unit_variance_at_every_pixel():
    basis = smooth_basis(40, 3.0)
    assert torch.allclose((basis**2).sum(1), torch.ones(40))


def test_the_posterior_is_calibrated():
    data = Synthetic("train", num_images=300, size=48)
    probs = torch.stack([data.posterior(index) for index in range(300)])
    truth = torch.stack([masks_of(data, index) for index in range(300)])
    assert torch.allclose(probs.sum(1), torch.ones(()), atol=1e-5)
    for low in torch.arange(0.05, 0.95, 0.1):
        here = (probs > low) & (probs <= low + 0.1)
        assert here.sum() > 2000
        assert abs(truth[here].double().mean() - probs[here].double().mean()) < 0.035, low


def test_with_the_true_posterior_ranking_beats_the_threshold():
    """Nothing in the drawing knows of a rule: what is checked is that the data are uncertain enough to matter."""
    data = Synthetic("val", num_images=100)
    scores = torch.tensor(
        [
            [dice(rule, masks_of(data, index)) for rule in (probs >= 0.5, ranked(probs))]
            for index, probs in ((index, data.posterior(index)) for index in range(100))
        ]
    )
    threshold, ranking = scores.nanmean(0).tolist()
    assert ranking > threshold + 0.01
    assert 0.4 < threshold < 0.9


@pytest.mark.parametrize("num_images", [0, 7.5, "abc", {"train": 8}, {"val": None}])
def test_a_number_of_images_that_is_not_an_integer_is_named(num_images: object) -> None:
    with pytest.raises(UserError, match=r"num_images=\S+ is invalid: expected an integer >= 1"):
        Synthetic("val", num_images=num_images)
