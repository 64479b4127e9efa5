"""Which pixels of a label map count.

Shapes: N images, *S spatial axes (two or three).
"""

from __future__ import annotations

from torch import Tensor


def valid_pixels(targets: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Return the mask of labelled pixels, and refuse labels that no class has.

    targets: (N, *S) integer labels, void marked by `ignore_index`. Returns (N, *S) bool, False on void.
    Raises TypeError where the labels are not integers, and ValueError where one is neither in
    [0, num_classes) nor `ignore_index`.
    """
    if targets.is_floating_point() or targets.is_complex():
        raise TypeError(f"targets are {targets.dtype}: pass integer class labels, not one-hot ones")
    targets = targets.long()  # comparing uint8 with a negative ignore_index would wrap
    valid = targets != ignore_index
    wrong = valid & ((targets < 0) | (targets >= num_classes))
    if wrong.any():
        values = targets[wrong].unique().tolist()
        shown = ", ".join(str(int(value)) for value in values[:5]) + (", ..." if len(values) > 5 else "")
        raise ValueError(
            f"targets hold label {shown}, outside 0..{num_classes - 1} and not ignore_index={ignore_index}: "
            "remap the labels of the data set, or correct num_classes or ignore_index"
        )
    return valid
