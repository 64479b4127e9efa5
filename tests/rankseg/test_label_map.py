"""Label maps against a loop over pixels, and the two forms of a binary problem."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import rankseg


def by_pixel(masks: torch.Tensor, unassigned: str | int, probs: torch.Tensor | None, first: int) -> torch.Tensor:
    """The definition, pixel by pixel."""
    images, classes, *shape = masks.shape
    flat, labels = masks.flatten(2), torch.empty(images, math.prod(shape), dtype=torch.int64)
    for n in range(images):
        for d in range(flat.shape[2]):
            owners = [c for c in range(classes) if flat[n, c, d]]
            if not owners and unassigned == "max":
                owners = list(range(classes))
            if not owners:
                labels[n, d] = 255 if unassigned == "void" else int(unassigned)
            elif probs is None:
                labels[n, d] = first + owners[0]
            else:
                value = probs.flatten(2)[n, :, d].tolist()
                labels[n, d] = first + max(owners, key=lambda c: (value[c], -c))
    return labels.view(images, *shape)


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (1, 1, 6), (2, 4, 3, 2, 2)])
@pytest.mark.parametrize("unassigned", ["void", "max", 0, -1])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("with_probs", [True, False])
def test_equals_the_definition(shape: tuple[int, ...], unassigned: str | int, first: int, with_probs: bool) -> None:
    generator = torch.Generator().manual_seed(len(shape))
    probs = torch.rand(shape, generator=generator).mul(4).round().div(4)  # with ties
    masks = torch.rand(shape, generator=generator) < 0.3
    given = probs if with_probs else None
    if unassigned == "max" and not with_probs:
        with pytest.raises(ValueError, match="probs"):
            rankseg.label_map(masks, unassigned, given, first=first)
        return
    got = rankseg.label_map(masks, unassigned, given, first=first)
    assert got.dtype == torch.int64
    assert torch.equal(got, by_pixel(masks, unassigned, given, first))


def test_argmax_masks_give_the_argmax() -> None:
    probs = torch.randn(2, 5, 9, 7, generator=torch.Generator().manual_seed(1)).softmax(1)
    assert torch.equal(rankseg.label_map(rankseg.argmax(probs)), probs.argmax(1))


def test_a_pixel_of_no_class_is_not_class_0() -> None:
    masks = torch.zeros(1, 3, 2, 2, dtype=torch.bool)
    assert rankseg.label_map(masks).unique().tolist() == [255]


@pytest.mark.parametrize(
    ("masks", "options", "error", "key"),
    [
        (torch.zeros(1, 2, 3), {}, TypeError, "masks"),
        (torch.zeros(2, 3, dtype=torch.bool), {}, ValueError, "masks"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), {"unassigned": "nothing"}, ValueError, "nothing"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), {"unassigned": True}, ValueError, "unassigned"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), {"probs": torch.zeros(1, 3, 3)}, ValueError, "masks"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), {"probs": torch.ones(1, 2, 3) * 2}, ValueError, "probs"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), {"first": 1.5}, TypeError, "first"),
        (torch.zeros(1, 256, 3, dtype=torch.bool), {}, ValueError, "255"),
    ],
)
def test_bad_input_is_named(masks: torch.Tensor, options: dict, error: type[Exception], key: str) -> None:
    with pytest.raises(error, match=key):
        rankseg.label_map(masks, **options)


def binary(seed: int) -> torch.Tensor:
    """One sigmoid channel (1, 1, 64, 64)."""
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed))
    return torch.sigmoid(1.5 * noise - 1.5)


@pytest.mark.parametrize("rule", [rankseg.rank_dice, rankseg.rank_iou])
@pytest.mark.parametrize("seed", range(4))
def test_one_and_two_channels_give_one_foreground(rule, seed: int) -> None:
    one = binary(seed)
    two = torch.cat([1 - one, one], 1)
    single, double = rule(one), rule(two, allow_overlap=False, classes=[1])
    assert torch.equal(single.predict[:, 0], double.predict[:, 1])
    assert torch.equal(double.predict[:, 0], ~double.predict[:, 1])
    assert torch.equal(single.cutpoint[:, 0], double.cutpoint[:, 1])
    assert double.tau.tolist() == [[4096 - int(single.tau), int(single.tau)]]
    foreground = rankseg.label_map(single.predict, 0, first=1)
    assert torch.equal(foreground, rankseg.label_map(double.predict))
    # All classes scored: the background takes pixels, as documented.
    assert rule(two, allow_overlap=False).tau[0, 1] < single.tau[0, 0]


@pytest.mark.parametrize("score", ["dice", "iou"])
def test_scoring_the_foreground_alone_raises_its_expected_score(score: str) -> None:
    rule, expected = (
        (rankseg.rank_dice, rankseg.expected_dice) if score == "dice" else (rankseg.rank_iou, rankseg.expected_iou)
    )
    probs = torch.randn(20, 4, 16, 16, generator=torch.Generator().manual_seed(2)).mul(2).softmax(1)
    means = {}
    for name, classes in (("all", None), ("foreground", [3, 1, 2])):
        predict = rule(probs, allow_overlap=False, classes=classes).predict
        assert predict.sum(1).max() == 1
        means[name] = expected(probs, predict)[:, 1:].mean(1)
    assert (means["foreground"] > means["all"]).all()
    argmax = expected(probs[:, 1:], rankseg.argmax(probs)[:, 1:]).mean(1)
    assert (means["foreground"] >= argmax - 1e-9).all()


def test_pixels_of_probability_0_stay_of_no_class() -> None:
    probs = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    probs[..., :4] = 0
    for classes in ([1], [1, 2]):
        assert not rankseg.rankdice(probs, allow_overlap=False, classes=classes)[..., :4].any()


@pytest.mark.parametrize("classes", [[], [3], [-1], [1, 1], [True], [0.5], 1, "12"])
def test_classes_that_are_not_channels(classes: object) -> None:
    with pytest.raises(ValueError, match="classes"):
        rankseg.rank_dice(torch.rand(1, 3, 4, 4), allow_overlap=False, classes=classes)


def test_classes_need_one_label_per_pixel() -> None:
    for rule in (rankseg.rank_dice, rankseg.rank_iou):
        with pytest.raises(ValueError, match="allow_overlap"):
            rule(torch.rand(1, 3, 4, 4), classes=[1])


def test_numpy_integers_are_integers_and_labels_have_a_limit() -> None:
    probs = torch.rand(1, 3, 4, 4, generator=torch.Generator().manual_seed(4))
    masks = rankseg.threshold(probs)
    plain = rankseg.label_map(masks, 7, first=2)
    assert torch.equal(rankseg.label_map(masks, np.int64(7), first=np.int64(2)), plain)
    one = rankseg.rankdice(probs, allow_overlap=False, classes=np.array([1]))
    assert torch.equal(one, rankseg.rankdice(probs, allow_overlap=False, classes=[1]))
    for labels in ({"unassigned": 1 << 63}, {"first": 1 << 63}):
        with pytest.raises((TypeError, ValueError), match=next(iter(labels))):
            rankseg.label_map(masks, **labels)
    for other in (masks.to_sparse(), masks.to("meta")):
        with pytest.raises(TypeError, match="masks"):
            rankseg.label_map(other)
