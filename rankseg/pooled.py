"""Masks that maximise the pooled Dice or IoU: the score of a whole split, as if it were one image.

Benchmarks report the pooled score. Pixels are assumed independent, so its expectation is that of one image with all
pixels of the split. Sums over millions of pixels are close to their means. So for a mask A of class c

    E[pooled Dice]  =  2 Σ_{j∈A} p_j / (|A| + Σ p)        up to a relative error of O(1 / Σ p),
    E[pooled IoU]   =    Σ_{j∈A} p_j / (|A| + Σ p - Σ_{j∈A} p_j)

The best mask keeps the pixels of probability θ or more in all images. With D the largest Dice, θ = D / 2; it is the
root of Σ (p - θ)_+ = θ Σ p. For the IoU, with J the largest IoU, θ = J / (1 + J). Every mask has J = D / (2 - D), so
both cut-offs are the same number, and one set of masks maximises both scores.

A histogram of the probabilities is enough, and no labels are needed. Its bins are the float16 numbers in [0, 1]: the
bits of non-negative floats, read as integers, have the order of the floats. The spacing is 2^-12 between 1/4 and 1/2,
and the score is flat at its maximum. If the probabilities near the cut-off are spread, the masks lose about 1e-7 of the
expected score or less. If a large share of all pixels has nearly the probability of the cut-off, rounding can decide
over all of them: such masks lose up to about 1e-3. The value that `best` returns has the precision of float16, relative
to its size about 5e-4 at most.

Shapes: N images, C classes, *S spatial axes, K bins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankseg.validation import check_choice, check_probs, check_valid

BINS = 0x3C00 + 1  # the float16 numbers from 0 to 1


class ProbabilityHistogram:
    """Counts of probabilities per class: add batches, merge those of other processes, read the cut-offs.

    Attributes:
        count: (C, K + 1) int64, None before the first batch: the pixels of each bin, then those above 1/2, some of
            which are rounded into the bin of 1/2. The order of batches does not change integers.
    """

    def __init__(self) -> None:
        self.count: Tensor | None = None

    @torch.no_grad()
    def update(self, probs: Tensor, valid: Tensor | None = None) -> None:
        """Add a batch: `probs` (N, C, *S); `valid` (N, *S) bool marks the pixels to count, default all.

        Raises:
            TypeError, ValueError: see `rankseg.validation.check_probs`; or `valid` or the number of classes is wrong.
        """
        probs = check_probs(probs)
        check_valid(valid, probs)
        counts = []
        for p in probs.movedim(1, 0):
            values = p.flatten() if valid is None else p[valid]
            bins = values.to(torch.float16).abs().view(torch.int16).to(torch.int32)  # abs: -0.0 has other bits
            counts.append(torch.cat([torch.bincount(bins, minlength=BINS), (values > 0.5).sum().view(1)]))
        self._add(torch.stack(counts))

    def merge(self, other: ProbabilityHistogram) -> ProbabilityHistogram:
        """Add the counts of `other`, for example of another process; return self.

        Raises:
            ValueError: `other` has another number of classes.
        """
        if other.count is not None:
            self._add(other.count)
        return self

    def _add(self, count: Tensor) -> None:
        if self.count is None:
            self.count = count.clone()
            return
        if len(count) != len(self.count):
            raise ValueError(
                f"classes={len(count)} does not match classes={len(self.count)} of earlier batches; "
                "use one histogram for each number of classes"
            )
        self.count = self.count + count.to(self.count.device)

    def best(self, score: str = "dice") -> Tensor:
        """Return the largest expected pooled score of each class: (C,) float64.

        It is NaN if all probabilities are 0 in float16, which is 0 up to 2^-25 = 3e-8.

        Raises:
            ValueError: no data yet, or `score` is neither "dice" nor "iou".
        """
        check_choice("score", score, ("dice", "iou"))
        if self.count is None:
            raise ValueError("the histogram is empty: call update before reading it")
        value = torch.arange(BINS, dtype=torch.int16, device=self.count.device).view(torch.float16).double()
        # Entry k of the sums belongs to the mask of all pixels in bins k, k + 1, ...
        count = self.count[:, :BINS]
        pixels = count.double().flip(1).cumsum(1).flip(1)
        captured = (count * value).flip(1).cumsum(1).flip(1)
        ratio = (2 * captured / (pixels + captured[:, :1])).amax(1)
        return ratio if score == "dice" else ratio / (2 - ratio)

    def cutoffs(self, score: str = "dice", pruning: bool = True) -> Tensor:
        """Return the cut-off of each class, (C,) float64: `rankseg.threshold(probs, at=cutoffs)` makes the masks.

        With `pruning`, a class whose probabilities never exceed 1/2 in the split is not selected: its cut-off is 1.
        As in `rankseg.rank_dice`, such a class is probably absent. If it is, one predicted pixel makes its score 0.
        Raises ValueError as `best` does.
        """
        best = self.best(score)
        cutoffs = torch.where(best.isnan(), 1.0, best / 2 if score == "dice" else best / (1 + best))
        if pruning and self.count is not None:
            cutoffs = torch.where(self.count[:, BINS] > 0, cutoffs, 1.0)
        return cutoffs
