"""Scores against loops over pixels, against segmentation_models_pytorch, and against the recordings."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.errors import ConfigError
from trainers.metrics import PAPER_EPSILON, Counts, Scoring, count, mean_over_classes

VOID = 255


def example(seed: int = 0, shape: tuple[int, ...] = (3, 4, 5, 6), void: float = 0.2) -> tuple[Tensor, Tensor]:
    """Random masks (N, C, *S) and labels (N, *S) of which a share is void; the last class is absent."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(shape, generator=generator) > 0.6
    labels = torch.randint(0, shape[1] - 1, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = VOID
    return masks, labels


def counted_by_hand(masks: Tensor, labels: Tensor, void: str) -> dict[str, list]:
    """The four counts, one pixel at a time."""
    n, c = masks.shape[:2]
    inter, pred, act = ([[0] * c for _ in range(n)] for _ in range(3))
    pixels = [0] * n
    for i in range(n):
        for j, label in enumerate(labels[i].flatten().tolist()):
            if label == VOID and void == "masked":
                continue
            pixels[i] += 1
            for k in range(c):
                in_a, in_b = bool(masks[i, k].flatten()[j]), label == k
                pred[i][k] += in_a
                act[i][k] += in_b
                inter[i][k] += in_a and in_b
    return {"intersection": inter, "predicted": pred, "actual": act, "pixels": pixels}


def score(masks: Tensor, labels: Tensor, **convention) -> Counts:
    return count(masks, Scoring(masks.shape[1], (), VOID, **convention).encode(labels))


def summary(counts: Counts, scored: Iterable[int], **convention) -> dict[str, Any]:
    return Scoring(counts.actual.shape[1], tuple(scored), VOID, **convention).summary(counts)


@pytest.mark.parametrize("void", ["masked", "counted"])
@pytest.mark.parametrize("shape", [(3, 4, 5, 6), (1, 2, 1, 1), (2, 3, 4, 3, 5), (1, 3, 33, 32)])
def test_counts_equal_a_loop_over_pixels(void: str, shape: tuple[int, ...]) -> None:
    masks, labels = example(1, shape)
    counts = score(masks, labels, void=void)
    for name, expected in counted_by_hand(masks, labels, void).items():
        assert getattr(counts, name).tolist() == expected, name
        assert getattr(counts, name).dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(pixels=st.integers(1, 5000), share=st.sampled_from([0.0, 0.5, 1.0]), seed=st.integers(0, 99))
def test_any_number_of_pixels_is_counted_exactly(pixels: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    masks = torch.rand(2, 3, pixels, generator=generator) < share
    counts = count(masks, Scoring(3, ()).encode(torch.zeros(2, pixels, dtype=torch.int64)))
    assert torch.equal(counts.predicted, masks.sum(-1))
    assert torch.equal(counts.intersection[:, 0], masks[:, 0].sum(-1))


def test_counts_above_what_float32_can_hold_are_exact() -> None:
    size = 2**24 + 1
    counts = count(
        torch.ones(1, 1, size, dtype=torch.bool), Scoring(1, ()).encode(torch.zeros(1, size, dtype=torch.uint8))
    )
    assert counts.predicted.item() == counts.actual.item() == counts.pixels.item() == size
    assert Counts.cat([counts, counts]).pooled().intersection.item() == 2 * size


def test_memory_layout_does_not_matter() -> None:
    masks, labels = example(2, (2, 4, 32, 32))
    strided = masks.to(memory_format=torch.channels_last)
    assert not strided.is_contiguous()
    assert torch.equal(score(strided, labels).predicted, score(masks, labels).predicted)
    assert torch.equal(
        score(masks[:, :, ::2], labels[:, ::2]).intersection,
        score(masks[:, :, ::2].clone(), labels[:, ::2].clone()).intersection,
    )


def test_what_is_predicted_on_void_counts_only_where_void_is_counted() -> None:
    labels = torch.tensor([[0, 0, 1, VOID]])
    masks = torch.tensor([[[True, True, False, True], [False, False, True, True]]])
    masked, counted = score(masks, labels), score(masks, labels, void="counted")
    assert masked.dice().tolist() == [[1.0, 1.0]]
    assert counted.dice().tolist() == [[4 / 5, 2 / 3]]
    assert masked.pixels.item() == 3 and counted.pixels.item() == 4


def test_soft_dice_void_counts_as_the_smallest_class_of_the_batch() -> None:
    masks, labels = example(3)
    labels = labels.where(labels != 0, 1)  # class 0 does not occur
    before = labels.clone()
    legacy = score(masks, labels, void="counted", legacy_soft_dice_void=True)
    assert torch.equal(labels, before)
    expected = score(masks, labels.where(labels != VOID, 1), void="counted")
    assert torch.equal(legacy.actual, expected.actual) and torch.equal(legacy.intersection, expected.intersection)


@pytest.mark.parametrize("ignore_index", [-1, 0, 7])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_any_ignore_index_marks_void(ignore_index: int, dtype: torch.dtype) -> None:
    masks, labels = example(4)
    labels = labels.where(labels != 0, 1)
    moved = labels.masked_fill(labels == VOID, ignore_index).to(dtype)
    for void in ("masked", "counted"):
        expected = score(masks, labels, void=void)
        ours = count(masks, Scoring(4, (), ignore_index, void).encode(moved))
        for name in ("intersection", "predicted", "actual", "pixels"):
            assert torch.equal(getattr(ours, name), getattr(expected, name)), name


def test_bytes_are_not_compared_with_a_negative_ignore_index() -> None:
    _, labels = example(13)
    with pytest.raises(ValueError, match="label 255"):
        Scoring(4, (), -1).encode(labels.byte())


def test_scores_are_undefined_only_where_prediction_and_truth_are_both_empty() -> None:
    labels = torch.tensor([[0, 0, 1, 1]])
    masks = torch.tensor([[[0, 0, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]]).bool()
    for epsilon in (0.0, PAPER_EPSILON):
        counts = score(masks, labels)
        dice, iou = counts.dice(epsilon)[0], counts.iou(epsilon)[0]
        assert dice[0] == iou[0] == 0  # missed
        assert dice[1] == pytest.approx(1, abs=1e-5) and iou[1] == pytest.approx(1, abs=1e-5)
        assert dice[2] == iou[2] == 0  # predicted, but absent
        assert dice[3].isnan() and iou[3].isnan()


def test_iou_is_a_function_of_dice_and_the_legacy_one_is_its_half() -> None:
    counts = score(*example(5, (8, 5, 9, 9)))
    dice = counts.dice()
    torch.testing.assert_close(counts.iou(), dice / (2 - dice), equal_nan=True, rtol=1e-14, atol=0)
    torch.testing.assert_close(counts.iou(legacy_bce_iou=True), dice / 2, equal_nan=True, rtol=1e-14, atol=0)


@pytest.mark.parametrize("void", ["masked", "counted"])
def test_pixel_accuracy_is_the_share_of_agreeing_pixel_class_pairs(void: str) -> None:
    masks, labels = example(6)
    ours = score(masks, labels, void=void).pixel_accuracy()
    for i in range(len(labels)):
        kept = labels[i] != VOID if void == "masked" else torch.ones_like(labels[i]).bool()
        truth = torch.stack([labels[i] == k for k in range(4)])
        assert ours[i] == pytest.approx((masks[i] == truth)[:, kept].double().mean().item())


def test_an_image_that_is_all_void_has_no_score() -> None:
    masks, labels = example(7)
    labels[1] = VOID
    counts = score(masks, labels)
    assert counts.dice()[1].isnan().all() and counts.pixel_accuracy()[1].isnan()
    rest = score(masks[[0, 2]], labels[[0, 2]])
    assert summary(counts, [0, 1, 2])["mean_dice"] == summary(rest, [0, 1, 2])["mean_dice"]


def test_counts_agree_with_segmentation_models_pytorch() -> None:
    smp_metrics = pytest.importorskip("segmentation_models_pytorch.metrics")
    masks, labels = example(8, (4, 5, 16, 16), void=0.0)
    onehot = F.one_hot(labels, 5).movedim(-1, 1)
    tp, fp, fn, _ = smp_metrics.get_stats(masks.long(), onehot, mode="multilabel")
    counts = score(masks, labels)
    assert torch.equal(counts.intersection, tp)
    assert torch.equal(counts.predicted, tp + fp) and torch.equal(counts.actual, tp + fn)


def test_batches_join_and_images_can_be_reordered() -> None:
    masks, labels = example(9, (5, 4, 6, 6))
    whole = score(masks, labels)
    parts = Counts.cat([score(masks[:2], labels[:2]), score(masks[2:], labels[2:])])
    assert len(parts) == 5
    assert torch.equal(parts.dice().nan_to_num(-1), whole.dice().nan_to_num(-1))
    with pytest.raises(ValueError, match="no rows"):
        Counts.cat([])


def test_pooled_scores_are_those_of_one_long_image() -> None:
    masks, labels = example(10, (3, 4, 8, 8))
    long_masks, long_labels = masks.transpose(0, 1).flatten(1)[None], labels.flatten()[None]
    expected = score(long_masks, long_labels)
    pooled = score(masks, labels).pooled()
    assert torch.equal(pooled.dice().nan_to_num(-1), expected.dice().nan_to_num(-1))
    result = summary(score(masks, labels), [0, 1, 2])
    assert result["pooled_mean_iou"] == pytest.approx(expected.iou()[0, :3].mean().item())
    assert result["pooled_class_dice"]["1"] == pytest.approx(expected.dice()[0, 1].item())


def test_averages_leave_undefined_scores_out_and_follow_the_papers_order() -> None:
    nan = math.nan
    scores = torch.tensor([[0.5, nan, 1.0], [nan, nan, 0.0], [nan, nan, nan]], dtype=torch.float64)
    assert mean_over_classes(scores, [0, 1, 2]).tolist()[:2] == [0.75, 0.0]
    assert mean_over_classes(scores, [0, 1]).isnan().tolist() == [False, True, True]

    # Image 1: dice 1 and 0, image 2: dice 1 and undefined. Images first: (1/2 + 1) / 2, not (1 + 0) / 2.
    two = Counts(*(torch.tensor(rows) for rows in ([[1, 0], [1, 0]], [[1, 1], [1, 0]], [[1, 0], [1, 0]], [2, 2])))
    result = summary(two, [0, 1])
    assert result["mean_dice"] == 0.75
    assert result["class_dice"] == {"0": 1.0, "1": 0.0}
    assert summary(two, [0])["mean_dice"] == 1.0


def test_rounding_applies_to_every_number() -> None:
    counts = score(*example(11))
    scoring = Scoring(4, (0, 1, 2), paper=True)
    exact, rounded = scoring.averages(counts), scoring.summary(counts)
    assert rounded["mean_dice"] == round(exact["mean_dice"], 3) != exact["mean_dice"]
    assert rounded["class_iou"]["0"] == round(exact["class_iou"]["0"], 3)


def test_a_score_defined_nowhere_is_nan() -> None:
    labels = torch.zeros(2, 3, 3, dtype=torch.int64)
    result = summary(score(F.one_hot(labels, 2).movedim(-1, 1).bool(), labels), [1], paper=True)
    assert math.isnan(result["mean_dice"]) and math.isnan(result["pooled_mean_iou"])
    assert math.isnan(result["class_iou"]["1"]) and result["class_iou"]["0"] == 1.0


def test_bad_input_is_rejected() -> None:
    masks, labels = example(12)
    scoring = Scoring(4, ())
    truth = scoring.encode(labels)
    with pytest.raises(ValueError, match=r"label 9, outside 0\.\.3"):
        scoring.encode(labels.masked_fill(labels == 1, 9))
    with pytest.raises(ValueError, match="label -1"):
        scoring.encode(labels.masked_fill(labels == 1, -1))
    with pytest.raises(TypeError, match="float32"):
        scoring.encode(labels.float())
    with pytest.raises(ConfigError, match=r"protocol\.void=dropped"):
        Scoring(4, (), void="dropped")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="legacy_soft_dice_void"):
        Scoring(4, (), legacy_soft_dice_void=True)
    with pytest.raises(TypeError, match=r"masks are .*float32"):
        count(masks.float(), truth)
    with pytest.raises(ValueError, match=r"masks are \(3, 3, 5, 6\)"):
        count(masks[:, :3], truth)


def assert_equal(ours: Tensor, recorded: np.ndarray) -> None:
    """Equal but for the last digit of the recording's float32; NaN in the same places."""
    np.testing.assert_allclose(ours.numpy(), recorded, rtol=2.5e-7, atol=0)


def assert_recorded(counts: Counts, recorded: dict[str, np.ndarray], halved: bool, scored: list[int]) -> None:
    dice = counts.dice(PAPER_EPSILON)
    iou = counts.iou(PAPER_EPSILON, legacy_bce_iou=halved)
    assert_equal(dice, recorded["dice"])
    assert_equal(iou, recorded["iou"])
    assert_equal(counts.pixel_accuracy(PAPER_EPSILON), recorded["pixacc"])
    assert_equal(mean_over_classes(dice, scored), recorded["mdice_image"])
    assert_equal(mean_over_classes(iou, scored), recorded["miou_image"])
    ours = Scoring(dice.shape[1], tuple(scored), paper=True, legacy_bce_iou=halved).averages(counts)
    names = {"Pixel_Accuracy": "pixel_accuracy", "Mean_Dice": "mean_dice", "Mean_IoU": "mean_iou"}
    for theirs, name in names.items():
        assert_equal(torch.tensor(ours[name]).double(), recorded[theirs])
    for theirs, name in {"Class_Dice": "class_dice", "Class_IoU": "class_iou"}.items():
        assert_equal(torch.tensor(list(ours[name].values()), dtype=torch.float64), recorded[theirs])


@pytest.mark.golden
@pytest.mark.parametrize("prediction", ["label", "multi"])
@pytest.mark.parametrize("target_kind", ["index", "float_onehot"])
@pytest.mark.parametrize("scored", ["all", "fg", "one"])
def test_metrics_equal_the_short_recordings(recordings: Path, prediction: str, target_kind: str, scored: str) -> None:
    data = np.load(recordings / "metrics.npz")
    masks = torch.from_numpy(data[f"{prediction}_pred"])
    if prediction == "label":
        masks = F.one_hot(masks, 7).movedim(-1, 1).bool()
    prefix = f"{prediction}__{target_kind}__{scored}__"
    recorded = {key.removeprefix(prefix): data[key] for key in data.files if key.startswith(prefix)}
    classes = {"all": list(range(7)), "fg": list(range(1, 7)), "one": [1]}[scored]
    counts = score(masks, torch.from_numpy(data["target"]), void="counted")
    assert_recorded(counts, recorded, target_kind == "float_onehot", classes)


@pytest.mark.golden
@pytest.mark.parametrize("prediction", ["map", "multihot"])
@pytest.mark.parametrize("target_kind", ["labels", "onehot_f32"])
def test_metrics_equal_the_full_recordings(recordings: Path, prediction: str, target_kind: str) -> None:
    data = np.load(recordings / "full/metrics.npz")
    aggregates = json.loads((recordings / "full/metrics.json").read_text())["cases"]
    if prediction == "map":
        masks = F.one_hot(torch.from_numpy(data["pred_map"]).long(), 6).movedim(-1, 1).bool()
    else:
        shape = tuple(data["pred_multihot_shape"])
        bits = np.unpackbits(data["pred_multihot_packed"])[: math.prod(shape)]
        masks = torch.from_numpy(bits.reshape(shape)).bool()
    labels = torch.from_numpy(data["target"])
    counts = Counts.cat([score(masks[part], labels[part], void="counted") for part in (slice(0, 3), slice(3, 5))])
    halved = target_kind == "onehot_f32"
    dice, iou = counts.dice(PAPER_EPSILON), counts.iou(PAPER_EPSILON, legacy_bce_iou=halved)

    coi = {"all": range(6), "1_2_3": [1, 2, 3], "0": [0], "4": [4], "5": [5], "1to5": range(1, 6)}
    for name, classes in coi.items():
        case = f"{prediction}__{target_kind}__coi_{name}"
        assert_equal(mean_over_classes(dice, classes), data[f"{case}__mDice"])
        assert_equal(mean_over_classes(iou, classes), data[f"{case}__mIoU"])
        ours = summary(counts, classes, paper=True, legacy_bce_iou=halved)
        theirs = aggregates[case]
        for key in ("Pixel_Accuracy", "Mean_Dice", "Mean_IoU"):
            assert ours[key.lower()] == round(theirs[key], 3)
        for key in ("Class_Dice", "Class_IoU"):
            recorded = {k: round(float(v), 3) for k, v in theirs[key].items()}
            assert ours[key.lower()] == pytest.approx(recorded, abs=0, nan_ok=True)
    case = f"{prediction}__{target_kind}__coi_all"
    assert_equal(dice, data[f"{case}__cDice"])
    assert_equal(iou, data[f"{case}__cIoU"])
    assert_equal(counts.pixel_accuracy(PAPER_EPSILON), data[f"{case}__pixAcc"])
