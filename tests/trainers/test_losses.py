"""Losses against formulas written out pixel by pixel, finite differences, and the recordings."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from trainers import losses
from trainers.losses import SegmentationLoss, jaccard_steps, link_probs, lovasz_softmax

VOID = 255
LOSSES: dict[str, type[SegmentationLoss]] = {
    "ce": losses.CrossEntropy,
    "focal": losses.Focal,
    "bce": losses.BCE,
    "soft_dice": losses.SoftDice,
    "b_soft_dice": losses.BSoftDice,
    "lovasz": losses.Lovasz,
    "ce_dice": losses.CEDice,
    "bce_focal": losses.BCEFocal,
    "log_cosh_dice": losses.LogCoshDice,
}
ORIGINAL_NAMES = {
    "ce": "CrossEntropyLoss2d",
    "focal": "FocalLoss",
    "bce": "BCEWithLogitsLoss2d",
    "soft_dice": "DiceLoss",
    "b_soft_dice": "BDiceLoss",
    "lovasz": "LovaszSoftmax",
    "ce_dice": "CE_DiceLoss",
    "bce_focal": "BCEWithLogitsFocalLoss2d",
    "log_cosh_dice": "LogCoshDiceLoss",
}
every_loss = pytest.mark.parametrize("name", LOSSES)
both_ways = pytest.mark.parametrize("legacy", [False, True], ids=["corrected", "legacy"])


def batch(
    seed: int = 0, shape: tuple[int, ...] = (2, 4, 3, 5), void: float = 0.25, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Random logits and labels of which a share is void; classes 0 and C-1 do not occur."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(shape, generator=generator, dtype=dtype)
    labels = torch.randint(1, shape[1] - 1, (shape[0], *shape[2:]), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < void] = VOID
    return logits, labels


def value_and_grad(loss: nn.Module, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.detach().clone().requires_grad_()
    value = loss(logits, labels)
    value.backward()
    return value.detach(), logits.grad


def written_out(name: str, logits: Tensor, labels: Tensor, legacy: bool) -> float:
    """The loss from its formula, with Python floats, one pixel at a time."""
    rows = logits.movedim(1, -1).flatten(0, -2).tolist()
    flat = labels.flatten().tolist()
    smallest = min(label for label in flat if label != VOID)

    def softmax(row: list[float]) -> list[float]:
        total = sum(math.exp(z) for z in row)
        return [math.exp(z) / total for z in row]

    def sigmoid(row: list[float]) -> list[float]:
        return [1 / (1 + math.exp(-z)) for z in row]

    labelled = [(row, label) for row, label in zip(rows, flat, strict=True) if label != VOID]
    everything = list(zip(rows, flat, strict=True))

    def ce() -> float:
        return sum(-math.log(softmax(row)[label]) for row, label in labelled) / len(labelled)

    def focal() -> float:
        probs = [softmax(row)[label] for row, label in labelled]
        total = sum((1 - p) ** 2 * -math.log(p) for p in probs)
        return total / (len(everything) if legacy else len(labelled))

    def bce() -> float:
        terms = []
        for row, label in everything if legacy else labelled:
            for k, p in enumerate(sigmoid(row)):
                terms.append(-math.log(p) if k == label else -math.log(1 - p))
        return sum(terms) / len(terms)

    def dice(link, pairs: list) -> float:
        overlap = sum(link(row)[label] for row, label in pairs if label != VOID)
        mass = sum(sum(link(row)) for row, _ in pairs)
        present = sum(label != VOID for _, label in pairs)
        return 1 - (2 * overlap + 1) / (mass + present + 1)

    def soft_dice() -> float:
        filled = [(row, smallest if label == VOID else label) for row, label in everything]
        return dice(softmax, filled if legacy else labelled)

    def lovasz() -> float:
        """The Choquet integral of the Jaccard loss over the levels of the errors."""
        per_class = []
        for k in sorted({label for _, label in labelled}):
            fg = [label == k for _, label in labelled]
            errors = [abs(f - softmax(row)[k]) for f, (row, _) in zip(fg, labelled, strict=True)]
            levels = sorted({0.0, *errors})
            total = 0.0
            for low, high in pairwise(levels):
                wrong = [e >= high for e in errors]
                union = sum(f or w for f, w in zip(fg, wrong, strict=True))
                total += (high - low) * sum(wrong) / union
            per_class.append(total)
        return sum(per_class) / len(per_class)

    return {
        "ce": ce,
        "focal": focal,
        "bce": bce,
        "soft_dice": soft_dice,
        "b_soft_dice": lambda: dice(sigmoid, everything if legacy else labelled),
        "lovasz": lovasz,
        "ce_dice": lambda: ce() + soft_dice(),
        "bce_focal": lambda: (1 - math.exp(-bce())) ** 2 * bce(),
        "log_cosh_dice": lambda: math.log(math.cosh(soft_dice())),
    }[name]()


@every_loss
@both_ways
@pytest.mark.parametrize("void", [0.0, 0.25])
def test_values_are_those_of_the_formulas(name: str, legacy: bool, void: float) -> None:
    logits, labels = batch(1, void=void)
    assert LOSSES[name](legacy=legacy)(logits, labels).item() == pytest.approx(
        written_out(name, logits, labels, legacy), rel=1e-12
    )


@every_loss
@both_ways
def test_gradients_are_those_of_finite_differences(name: str, legacy: bool) -> None:
    logits, labels = batch(2, (2, 3, 2, 3))
    loss = LOSSES[name](legacy=legacy)
    assert torch.autograd.gradcheck(lambda z: loss(z, labels), logits.requires_grad_())


@every_loss
def test_void_never_counts(name: str) -> None:
    logits, labels = batch(3)
    void = (labels == VOID).unsqueeze(1)
    value, grad = value_and_grad(LOSSES[name](), logits, labels)
    other_value, other_grad = value_and_grad(LOSSES[name](), logits.masked_fill(void, 9.0), labels)
    assert void.any() and value == other_value and torch.equal(grad, other_grad)
    assert grad[void.expand_as(grad)].eq(0).all()


@every_loss
def test_legacy_trains_on_void_as_its_docstring_tells(name: str) -> None:
    logits, labels = batch(4)
    void = (labels == VOID).unsqueeze(1)
    _, grad = value_and_grad(LOSSES[name](legacy=True), logits, labels)
    trains = name not in ("ce", "focal", "lovasz")
    assert grad[void.expand_as(grad)].ne(0).any().item() == trains


@every_loss
def test_without_void_legacy_changes_nothing(name: str) -> None:
    logits, labels = batch(5, void=0.0)
    corrected = value_and_grad(LOSSES[name](), logits, labels)
    legacy = value_and_grad(LOSSES[name](legacy=True), logits, labels)
    torch.testing.assert_close(legacy, corrected, rtol=1e-14, atol=1e-16)


@every_loss
@both_ways
def test_an_all_void_batch_costs_nothing(name: str, legacy: bool) -> None:
    """Except where the original counts void as a negative of every class."""
    logits, labels = batch(6)
    void = torch.full_like(labels, VOID)
    value, grad = value_and_grad(LOSSES[name](legacy=legacy), logits, void)
    if legacy and name in ("bce", "bce_focal", "b_soft_dice"):
        assert value > 0 and grad.abs().sum() > 0 and LOSSES[name](legacy=True).num_terms(void) == void.numel()
    else:
        assert value == 0 and grad.shape == logits.shape and grad.eq(0).all()


@pytest.mark.golden
@pytest.mark.parametrize(
    ("name", "recorded"),
    [("bce", 1.0410138368606567), ("bce_focal", 0.43564778566360474), ("b_soft_dice", 0.9987968802452087)],
)  # the value "all_ignored" of the recorded edge cases
def test_an_all_void_batch_under_the_papers_protocol(name: str, recorded: float, recordings: Path) -> None:
    logits = torch.tensor(np.load(recordings / "full/losses.npz")["ignore_logits"])
    void = torch.full((2, 12, 14), VOID)
    assert LOSSES[name](legacy=True)(logits, void).item() == pytest.approx(recorded, rel=1e-6)


@every_loss
@both_ways
def test_a_single_labelled_pixel_is_enough(name: str, legacy: bool) -> None:
    logits, labels = batch(7)
    one = torch.full_like(labels, VOID)
    one[1, 0, 2] = 2
    value, grad = value_and_grad(LOSSES[name](legacy=legacy), logits, one)
    assert value.item() == pytest.approx(written_out(name, logits, one, legacy), rel=1e-12)
    assert grad.isfinite().all()


@every_loss
@both_ways
def test_targets_are_not_modified_and_may_be_bytes(name: str, legacy: bool) -> None:
    logits, labels = batch(8)
    loss, before = LOSSES[name](legacy=legacy), labels.clone()
    value = loss(logits, labels)
    assert torch.equal(labels, before)
    assert loss(logits, labels.byte()) == value


@every_loss
@both_ways
def test_autocast_and_half_precision_compute_in_float32(name: str, legacy: bool) -> None:
    logits, labels = batch(9, (2, 4, 16, 16), dtype=torch.bfloat16)
    loss = LOSSES[name](legacy=legacy)
    expected = loss(logits.float(), labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(logits, labels)
    assert value.dtype == torch.float32 and value == expected == loss(logits, labels)


@every_loss
@both_ways
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_saturated_logits_give_finite_losses_and_gradients(name: str, legacy: bool, size: float) -> None:
    logits, labels = batch(10, dtype=torch.float32)
    value, grad = value_and_grad(LOSSES[name](legacy=legacy), size * logits.sign(), labels)
    assert value.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 3.0])
def test_focal_is_finite_where_the_network_is_certain(gamma: float) -> None:
    logits = torch.tensor([[[[200.0, 0.0]], [[-200.0, 0.0]]]])
    value, grad = value_and_grad(losses.Focal(gamma=gamma), logits, torch.tensor([[[0, 1]]]))
    assert value == pytest.approx(0.5**gamma * math.log(2) / 2) and grad.isfinite().all()


def test_focal_without_focus_is_cross_entropy() -> None:
    logits, labels = batch(11)
    torch.testing.assert_close(losses.Focal(gamma=0.0)(logits, labels), losses.CrossEntropy()(logits, labels))
    torch.testing.assert_close(losses.BCEFocal(gamma=0.0)(logits, labels), losses.BCE()(logits, labels))


@every_loss
def test_volumes_are_scored_like_images(name: str) -> None:
    logits, labels = batch(12, (2, 4, 3, 4, 5))
    loss = LOSSES[name]()
    torch.testing.assert_close(loss(logits, labels), loss(logits.flatten(3), labels.flatten(2)))


@every_loss
def test_another_ignore_index_may_be_a_class_or_negative(name: str) -> None:
    logits, labels = batch(13)
    expected = LOSSES[name]()(logits, labels)
    for ignore_index in (-1, 0):
        loss = LOSSES[name](ignore_index=ignore_index)
        assert loss(logits, labels.masked_fill(labels == VOID, ignore_index)) == expected


@every_loss
def test_the_truth_minimises_the_expected_loss_of_strictly_proper_losses_alone(name: str) -> None:
    """The expected loss of one pixel has a zero gradient at the true probabilities iff the loss is proper."""
    truth = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    loss = LOSSES[name]()
    logits = (truth.log() if loss.link == "softmax" else truth.logit()).clone().requires_grad_()
    pixel = logits.view(1, 3, 1, 1)
    expected = sum(p * loss(pixel, torch.full((1, 1, 1), k)) for k, p in enumerate(truth))
    expected.backward()
    stationary = logits.grad.abs().max().item() < 1e-12
    assert stationary == loss.strictly_proper


def test_links() -> None:
    logits, _ = batch(14)
    softmax = {name for name, loss in LOSSES.items() if loss.link == "softmax"}
    assert softmax == {"ce", "focal", "soft_dice", "lovasz", "ce_dice", "log_cosh_dice"}
    torch.testing.assert_close(link_probs(logits, "softmax").sum(1), torch.ones(2, 3, 5, dtype=torch.float64))
    torch.testing.assert_close(link_probs(logits, "sigmoid"), 1 / (1 + (-logits).exp()))
    assert link_probs(logits.half(), "softmax").dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert link_probs(logits.bfloat16(), "sigmoid").dtype == torch.float32
    with pytest.raises(ValueError, match="link='tanh'"):
        link_probs(logits, "tanh")  # type: ignore[arg-type]


@every_loss
def test_bad_targets_are_rejected(name: str) -> None:
    logits, labels = batch(15)
    loss = LOSSES[name]()
    with pytest.raises(ValueError, match=r"label 4, 7, outside 0\.\.3 and not ignore_index=255"):
        loss(logits, torch.where(labels == 1, 4, labels).index_fill(2, torch.tensor([0]), 7))
    with pytest.raises(ValueError, match="label -1"):
        loss(logits, labels.masked_fill(labels == 1, -1))
    with pytest.raises(ValueError, match="do not fit"):
        loss(logits, labels[:, :2])
    with pytest.raises(ValueError, match="do not fit"):
        loss(logits, labels.unsqueeze(1))
    with pytest.raises(TypeError, match="integer class labels"):
        loss(logits, labels.double())


def test_lovasz_agrees_with_segmentation_models_pytorch() -> None:
    smp_losses = pytest.importorskip("segmentation_models_pytorch.losses")
    logits, labels = batch(16, (2, 5, 12, 13), dtype=torch.float32)
    ours = value_and_grad(losses.Lovasz(), logits, labels)
    theirs = value_and_grad(smp_losses.LovaszLoss("multiclass", ignore_index=VOID), logits, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_lovasz_of_hard_predictions_is_the_jaccard_loss() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 0])
    probs = torch.nn.functional.one_hot(predicted, 4).T.double()
    assert lovasz_softmax(probs, labels).item() == pytest.approx(1 - (2 / 5 + 1 / 3 + 0) / 3)


def test_lovasz_steps_stay_accurate_in_float32_on_many_pixels() -> None:
    actual = torch.rand(300_000, generator=torch.Generator().manual_seed(0)) < 0.3
    exact, ours = jaccard_steps(actual, torch.float64), jaccard_steps(actual, torch.float32)
    assert exact.sum().item() == pytest.approx(1)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["ce", "bce"])
def test_torch_agrees(name: str) -> None:
    logits, labels = batch(17)
    if name == "ce":
        theirs = nn.functional.cross_entropy(logits, labels, ignore_index=VOID)
    else:
        kept = labels != VOID
        rows = logits.movedim(1, -1)[kept]
        theirs = nn.functional.binary_cross_entropy_with_logits(rows, nn.functional.one_hot(labels[kept], 4).double())
    torch.testing.assert_close(LOSSES[name]()(logits, labels), theirs)


@every_loss
@both_ways
def test_each_configuration_builds_its_loss(root: Path, name: str, legacy: bool) -> None:
    config = OmegaConf.load(root / f"configs/loss/{name}.yaml")
    assert config.pop("name") == name
    context = {"dataset": {"ignore_index": 7}, "protocol": {"legacy_losses": legacy}, "loss": config}
    loss = instantiate(OmegaConf.create(context).loss)
    assert type(loss) is LOSSES[name] and (loss.ignore_index, loss.legacy) == (7, legacy)


def test_every_configuration_is_tested(root: Path) -> None:
    assert {path.stem for path in (root / "configs/loss").glob("*.yaml")} == set(LOSSES)


def assert_recorded(name: str, logits: np.ndarray, labels: np.ndarray, value: float, grad: np.ndarray) -> None:
    """Values to 1e-6, gradients to 1e-5 of the largest one."""
    ours = value_and_grad(LOSSES[name](legacy=True), torch.from_numpy(logits), torch.from_numpy(labels))
    assert ours[0].item() == pytest.approx(value, abs=1e-6)
    np.testing.assert_allclose(ours[1].numpy(), grad, rtol=0, atol=1e-5 * np.abs(grad).max())


@pytest.mark.golden
@every_loss
@pytest.mark.parametrize("file", ["losses_void", "losses_novoid"])
def test_losses_equal_the_short_recordings(recordings: Path, name: str, file: str) -> None:
    data = np.load(recordings / f"{file}.npz")
    assert_recorded(name, data["logits"], data["target"], data[name].item(), data[f"{name}_grad"])


@pytest.mark.golden
@every_loss
@pytest.mark.parametrize("case", ["ignore", "noignore", "ignore_min2"])
def test_losses_equal_the_full_recordings(recordings: Path, name: str, case: str) -> None:
    data = np.load(recordings / "full/losses.npz")
    recorded = f"{case}_{ORIGINAL_NAMES[name]}"
    assert_recorded(
        name, data[f"{case}_logits"], data[f"{case}_target"], data[f"{recorded}_loss"].item(), data[f"{recorded}_grad"]
    )
