"""The exact expected score of any mask; from it, a confidence and a gate for absent classes. No labels are needed.

The confidence of a mask A is E[Dice(A, B)], B the random object, its pixels independent with the probabilities given.
That of an empty mask is P(B empty) = Π (1 - p), the probability that empty is right.

The gate. A class that is absent from mask and truth has no score and is left out of a mean over images. Let m be that
mean and π = P(B empty). A mask A adds E[Dice(A, B)] to the numerator and 1 to the denominator of the mean; the empty
mask adds 0 to the numerator and 1 - π to the denominator. The ratio is largest if A is chosen when (Dinkelbach, 1967)

    E[Dice(A, B)] - m  >  -m (1 - π),     that is     P(B present) · E[Dice | B present]  >  m π.

So an empty mask is as good as an expected Dice of m π. `gate_by_presence` applies this rule with π = Π (1 - p);
`gate_by_score` replaces the right-hand side by a constant, which validation data can fit.

Shapes: N images, C classes, *S spatial axes, R = N·C rows, D pixels of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankseg.engines import compiled_engine, one_thread
from rankseg.exact import NEGLIGIBLE, Window, window_scores
from rankseg.gather import blocks, gather, row_numbers, tile_of, tiles
from rankseg.masks import rows_of
from rankseg.validation import check_form, check_masks, check_probs, check_smooth, check_values, eager_only


@eager_only
def expected_dice(probs: Tensor, masks: Tensor, smooth: float = 0.0) -> Tensor:
    """Return E[(2|A∩B| + smooth) / (|A| + |B| + smooth)] of masks A: (N, C) float64.

    B is the random object, its pixels independent with probabilities `probs` (N, C, *S); `masks` (N, C, *S) bool.
    0/0 is 0. The relative error is about 1e-12; for maps in half or single precision up to 1e-10.

    Raises:
        TypeError, ValueError: see `rankseg.validation`.
    """
    return _expected("dice", probs, masks, smooth)


@eager_only
def expected_iou(probs: Tensor, masks: Tensor, smooth: float = 0.0) -> Tensor:
    """Return E[(|A∩B| + smooth) / (|A∪B| + smooth)] of masks A: (N, C) float64.

    As `expected_dice`, for the IoU.
    """
    return _expected("iou", probs, masks, smooth)


@torch.no_grad()
def _expected(score: str, probs: Tensor, masks: Tensor, smooth: float) -> Tensor:
    probs = check_form(probs)
    masks = check_masks(masks, probs)
    smooth = check_smooth(smooth)
    if probs.numel() == 0:
        return torch.zeros(probs.shape[:2], dtype=torch.float64, device=probs.device)
    engine = compiled_engine(probs)
    if engine is not None and (compiled := engine.expected(probs, masks, score, smooth)) is not None:
        return compiled
    with one_thread(probs.device):
        return _with_torch(score, check_values(probs), masks, smooth)


def _with_torch(score: str, probs: Tensor, masks: Tensor, smooth: float) -> Tensor:
    """Compute `_expected` with torch operations."""
    result = torch.zeros(probs.shape[0] * probs.shape[1], dtype=torch.float64, device=probs.device)
    flat, rows = rows_of(probs), torch.arange(result.numel(), device=probs.device)
    # The confident pixels of small objects need a logarithm each; power sums represent the others.
    mean = flat.sum(1, dtype=torch.float32)
    low = (0.9 * NEGLIGIBLE * (mean + smooth)).to(flat.dtype)
    got = gather(flat, rows, low, masks=rows_of(masks))
    log_absent = _log_absent(flat, rows_of(masks)) if 0 < smooth < 1 else None
    # The pixels of the mask get a positive sign, the others a negative one.
    # After sorting, the zeros that fill a row are between the two.
    signed = torch.where(got.flags, got.values, -got.values)
    for members, values in blocks(got.rows, signed, got.width):
        volumes = torch.arange(values.shape[1] + 1, device=values.device)
        inside = (values > 0).sum(1, keepdim=True)
        window = Window(values.abs(), got.included[members], got.excluded[members])
        absent = None if log_absent is None else log_absent[members]
        scores = window_scores(score, window, smooth, volumes == inside, log_absent=absent)
        result[members] = scores.gather(1, inside)[:, 0]
    return result.view(probs.shape[:2])


def _log_absent(flat: Tensor, masks: Tensor) -> Tensor:
    """Return log P(no object pixel) = Σ log(1 - p) of rows with an empty mask, (R,): their score needs it."""
    result = torch.zeros(flat.shape[0], dtype=torch.float64, device=flat.device)
    empty = (~masks.any(1)).nonzero()[:, 0]
    numbers = row_numbers(empty)
    for row_slice, column_slice in tiles(empty.numel(), flat.shape[1], flat.device):
        tile = tile_of(flat, numbers, row_slice, column_slice).double()
        result[empty[row_slice]] += torch.log1p(-tile).sum(1)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Confidence and gates


@torch.no_grad()
def absence(probs: Tensor) -> Tensor:
    """Return the probability Π (1 - p) that a class has no pixel: (N, C) float64."""
    probs = check_probs(probs)
    return torch.log1p(-probs.flatten(2).double()).sum(2).exp()


@torch.no_grad()
def mask_scores(probs: Tensor, masks: Tensor) -> Tensor:
    """Return the expected Dice of each mask, 0 for empty masks: (N, C) float64.

    As `rankseg.expected_dice` for `smooth=0`, without work for classes whose mask is empty.
    """
    probs = check_probs(probs)
    masks = check_masks(masks, probs)
    flat, chosen = probs.flatten(2).flatten(0, 1), masks.flatten(2).flatten(0, 1)
    rows = chosen.any(1).nonzero()[:, 0]
    scores = torch.zeros(flat.shape[0], dtype=torch.float64, device=probs.device)
    if rows.numel():
        scores[rows] = expected_dice(flat[rows, None], chosen[rows, None])[:, 0]
    return scores.view(probs.shape[:2])


@eager_only
@torch.no_grad()
def confidence(probs: Tensor, masks: Tensor) -> Tensor:
    """Return the expected Dice of each mask, and P(class absent) for an empty mask: (N, C) float64.

    Raises:
        TypeError, ValueError: see `rankseg.validation`.
    """
    scores = mask_scores(probs, masks)
    empty = ~check_masks(masks, probs).flatten(2).any(2)
    return torch.where(empty, absence(probs), scores) if empty.any() else scores


def image_confidence(confidences: Tensor, predicted: Tensor) -> Tensor:
    """Average confidences (N, C) over the predicted classes, or over all classes if none is predicted: (N,).

    `predicted` (N, C) bool marks the classes whose mask has a pixel. Pass only the scored classes.
    """
    counted = predicted | ~predicted.any(1, keepdim=True)
    return (confidences * counted).sum(1) / counted.sum(1)


@torch.no_grad()
def soft_dice_confidence(probs: Tensor, masks: Tensor) -> Tensor:
    """Return 2 Σ_{j∈A} p_j / (|A| + Σ p), (N, C) float64, 0/0 = 0: the approximation SDC of arXiv 2402.10665."""
    probs = check_probs(probs)
    masks = check_masks(masks, probs)
    total = probs.flatten(2).sum(2, dtype=torch.float64)
    inside = (probs * masks).flatten(2).sum(2, dtype=torch.float64)
    denominator = masks.flatten(2).sum(2) + total
    return torch.where(denominator > 0, 2 * inside / denominator.clamp(min=1e-300), 0.0)


@torch.no_grad()
def mean_max_probability(probs: Tensor) -> Tensor:
    """Return the mean over pixels of the largest probability, (N,) float64; one channel implies a second, 1 - p."""
    probs = check_probs(probs)
    largest = torch.maximum(probs, 1 - probs) if probs.shape[1] == 1 else probs
    return largest.amax(1).flatten(1).mean(1, dtype=torch.float64)


@torch.no_grad()
def mean_entropy(probs: Tensor) -> Tensor:
    """Return the mean over pixels of the entropy -Σ_c p log p, (N,) float64; one channel implies a second, 1 - p."""
    probs = check_probs(probs)
    values = torch.cat([probs, 1 - probs], dim=1) if probs.shape[1] == 1 else probs
    return torch.special.entr(values.float()).sum(1).flatten(1).mean(1, dtype=torch.float64)


def _keep(masks: Tensor, kept: Tensor) -> Tensor:
    return masks & kept.view(*kept.shape, *[1] * (masks.ndim - 2))


@torch.no_grad()
def gate_by_score(probs: Tensor, masks: Tensor, least: float | Tensor) -> Tensor:
    """Empty the masks whose expected Dice is below `least`, a number or one per class (C,): (N, C, *S) bool.

    Raises:
        ValueError: `least` is outside [0, 1], or not one number per class.
    """
    scores = mask_scores(probs, masks)
    bound = torch.as_tensor(least, dtype=torch.float64)  # a number is checked on the host: no wait for the device
    if bound.shape not in ((), scores.shape[1:]) or not ((bound >= 0) & (bound <= 1)).all():
        raise ValueError(f"least={least} is invalid: expected a Dice in [0, 1], such as 0.4, or one for each class")
    return _keep(check_masks(masks, probs), scores >= bound.to(probs.device))


@torch.no_grad()
def gate_by_presence(probs: Tensor, masks: Tensor, mean: float) -> Tensor:
    """Empty the masks whose expected Dice is at most `mean` · P(class absent): (N, C, *S) bool.

    `mean` is the mean Dice of the images, as found on validation data.

    Raises:
        ValueError: `mean` is outside [0, 1].
    """
    if not 0 <= mean <= 1:
        raise ValueError(f"mean={mean} is invalid: expected the mean Dice of validation images, in [0, 1]")
    scores = mask_scores(probs, masks)
    return _keep(check_masks(masks, probs), scores > mean * absence(probs))
