"""What the rules accept, what they refuse, and the remedy they name.

Shapes: N images, C classes, *S spatial axes (any number, at least one).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A softmax in half precision can leave [0, 1] by its own rounding and by no more.
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-5}


def check_probs(probs: Tensor) -> Tensor:
    """Return `probs` (N, C, *S), detached and within [0, 1], or say why it is refused.

    Values outside [0, 1] by rounding alone are clamped (into a copy: inputs are never modified).

    Raises:
        TypeError: not a tensor, or not a floating dtype.
        ValueError: fewer than 3 dimensions, no class, an empty spatial axis, NaN, infinity, or values
            outside [0, 1].
    """
    if isinstance(probs, (list, tuple)):
        raise TypeError(
            f"probs must be one torch.Tensor, got a {type(probs).__name__}; call once for each map[None], "
            "or pad maps of unlike sizes with zeros (they change nothing) and stack them"
        )
    if not isinstance(probs, Tensor):
        raise TypeError(
            f"probs must be a torch.Tensor, got {type(probs).__name__}; convert it with torch.as_tensor"
        )
    if probs.dtype not in _ROUNDING:
        raise TypeError(
            f"probs must be float16, bfloat16, float32 or float64, got {probs.dtype}; pass probabilities"
        )
    if probs.ndim < 3:
        raise ValueError(
            f"probs must be (N, C, *S), got shape {tuple(probs.shape)}; a single map (H, W) is probs[None, None]"
        )
    if probs.shape[1] == 0:
        raise ValueError(f"probs has no class (shape {tuple(probs.shape)}); axis 1 must hold at least one")
    if 0 in probs.shape[2:]:
        raise ValueError(f"probs has an empty spatial axis (shape {tuple(probs.shape)}); each needs a pixel")
    probs = probs.detach()
    if probs.numel() == 0:
        return probs
    # min and max are NaN as soon as one value is: two reductions check everything.
    low, high = (value.item() for value in torch.aminmax(probs))
    if math.isnan(low) or math.isnan(high):
        raise ValueError("probs holds NaN; look for a division by zero or an overflow in the network")
    if low < 0 or high > 1:
        slack = _ROUNDING[probs.dtype]
        if low < -slack or high > 1 + slack:
            raise ValueError(
                f"probs must lie in [0, 1], got values in [{low:.6g}, {high:.6g}]; apply softmax or sigmoid to logits"
            )
        probs = probs.clamp(0, 1)
    return probs


def check_smooth(smooth: float) -> float:
    """Return `smooth` as a finite float of at least 0, or raise TypeError / ValueError."""
    if isinstance(smooth, bool) or not isinstance(smooth, (int, float)):
        raise TypeError(f"smooth must be a number, got {smooth!r}; 0.0 is the plain score")
    if not math.isfinite(smooth) or smooth < 0:
        raise ValueError(f"smooth must be finite and at least 0, got {smooth!r}; 0.0 is the plain score")
    return float(smooth)


def check_masks(masks: Tensor, probs: Tensor) -> Tensor:
    """Return `masks` (N, C, *S) bool of the shape of `probs`, or raise TypeError / ValueError."""
    if not isinstance(masks, Tensor):
        raise TypeError(
            f"masks must be a torch.Tensor, got {type(masks).__name__}; convert it with torch.as_tensor"
        )
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}; compare first, as in masks > 0.5")
    if masks.shape != probs.shape:
        raise ValueError(
            f"masks must have the shape of probs {tuple(probs.shape)}, got {tuple(masks.shape)}; "
            "one mask for each image and class"
        )
    return masks.to(probs.device)


def moved(probs: Tensor, device: torch.device | str | None) -> Tensor:
    """`probs` where it is wanted; None leaves it where it is.

    Raises:
        ValueError: there is no such device here.
    """
    if device is None:
        return probs
    try:
        return probs.to(device)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # the latter where torch is built without it
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used ({reason}); leave device out to compute where probs are"
        ) from None


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed` (True is not taken for 1)."""
    if not any(value == option and type(value) is type(option) for option in allowed):
        listed = ", ".join(repr(option) for option in allowed)
        raise ValueError(f"{name} must be one of {listed}, got {value!r}")
