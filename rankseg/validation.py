"""Checks of the arguments. Every error names the remedy.

Shapes: N images, C classes, *S spatial axes (any number, at least one).
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

# Values this far outside of [0, 1] are rounding of softmax or sigmoid, and are clamped.
_ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-5}

# Near 2^53 = 9e15, float64 cannot represent every volume + smooth.
LARGEST_SMOOTH = 1e15
# The reciprocal of a smaller number overflows, at once or in a product.
SMALLEST_SMOOTH = 1e-300

_P = ParamSpec("_P")
_R = TypeVar("_R")


def check_probs(probs: Tensor) -> Tensor:
    """Return `probs` (N, C, *S) as a plain, detached tensor with values in [0, 1], or raise TypeError / ValueError.

    See `check_form` and `check_values` for the conditions.
    """
    return check_values(check_form(probs))


def check_form(probs: Tensor) -> Tensor:
    """Return `probs` (N, C, *S) as a plain, detached tensor. No value is read.

    Subclasses of torch.Tensor that only add attributes (torch.nn.Parameter, MONAI's MetaTensor) are read as plain
    tensors.

    Raises:
        TypeError: not a tensor, a nested or sparse tensor, not a floating dtype, on the device "mps" or "meta", or a
            call inside torch.func.vmap, torch.export, torch.jit.trace or the like.
        ValueError: fewer than 3 dimensions, no class, or an empty spatial axis.
    """
    if isinstance(probs, (list, tuple)):
        raise TypeError(
            f"probs must be one torch.Tensor, got a {type(probs).__name__}; call once for each map[None], "
            "or pad maps of different sizes with zeros (zeros change nothing) and stack them"
        )
    if not isinstance(probs, Tensor):
        raise TypeError(f"probs must be a torch.Tensor, got {type(probs).__name__}; convert it with torch.as_tensor")
    _reject_tracing(probs)
    if probs.device.type == "mps":
        raise TypeError("probs is on the device 'mps', which has no float64; pass probs.cpu()")
    probs = plain(probs, "probs")
    if probs.dtype not in _ROUNDING:
        raise TypeError(f"probs must be float16, bfloat16, float32 or float64, got {probs.dtype}; pass probabilities")
    if probs.ndim < 3:
        raise ValueError(
            f"probs must be (N, C, *S), got shape {tuple(probs.shape)}; a single map (H, W) is probs[None, None]"
        )
    if probs.shape[1] == 0:
        raise ValueError(f"probs has no class (shape {tuple(probs.shape)}); axis 1 must hold at least one")
    if 0 in probs.shape[2:]:
        raise ValueError(f"probs has an empty spatial axis (shape {tuple(probs.shape)}); each needs a pixel")
    return probs


def check_values(probs: Tensor) -> Tensor:
    """Return `probs` with all values in [0, 1].

    Values outside [0, 1] by rounding alone are clamped (into a copy: inputs are never modified).

    Raises:
        ValueError: NaN, infinity, or values outside [0, 1].
    """
    if probs.numel() == 0:
        return probs
    # min and max are NaN as soon as one value is: two reductions check everything.
    low, high = torch.stack(torch.aminmax(probs)).tolist()
    if math.isnan(low) or math.isnan(high):
        raise ValueError("probs holds NaN; look for a division by zero or an overflow in the network")
    if low < 0 or high > 1:
        slack = _ROUNDING[probs.dtype]
        if low < -slack or high > 1 + slack:
            raise ValueError(
                f"probs must be in [0, 1], got values in [{low:.6g}, {high:.6g}]; apply softmax or sigmoid to logits"
            )
        probs = probs.clamp(0, 1)
    return probs


def _reject_tracing(probs: Tensor) -> None:
    """Raise TypeError inside transforms that record or batch operations: the solver branches on values."""
    inside = ""
    if torch.jit.is_tracing():
        inside = "torch.jit.trace"
    elif getattr(torch.compiler, "is_exporting", bool)():  # since torch 2.7
        inside = "torch.export"
    elif torch._C._functorch.is_functorch_wrapped_tensor(probs):
        inside = "torch.func.vmap (or another transform of torch.func)"
    elif torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        inside = "torch.fx.experimental.proxy_tensor.make_fx"
    elif type(probs).__module__ == "torch._subclasses.fake_tensor":
        inside = "FakeTensorMode"
    if inside:
        raise TypeError(
            f"{inside} is unsupported, because the computation depends on the values of probs; "
            "call the rule outside of it, on the tensor (N, C, *S)"
        )


def eager_only(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Wrap `function`: torch.jit.script rejects it in one line, and torch.compile calls it without compiling it."""
    uncompiled = functools.cache(lambda: torch.compiler.disable(function))

    @functools.wraps(function)
    def eager(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # torch.compile imports torch._dynamo, which takes seconds, so this does not.
        if "torch._dynamo" in sys.modules:
            return uncompiled()(*args, **kwargs)
        return function(*args, **kwargs)

    eager.__script_unsupported = (  # type: ignore[attr-defined]
        f"{function.__name__} is unsupported by torch.jit.script; call it outside of the scripted module"
    )
    # What torch.compiler.disable sets, without the seconds that importing torch._dynamo takes.
    eager._torchdynamo_disable = True  # type: ignore[attr-defined]
    eager._torchdynamo_disable_msg = (  # type: ignore[attr-defined]  # shown by fullgraph=True and strict export
        f"{function.__name__} is unsupported inside of a graph, because it depends on the values of probs; "
        "call it outside, or leave out fullgraph=True"
    )
    return eager


def plain(tensor: Tensor, name: str) -> Tensor:
    """Return `tensor` detached, without a subclass; raise TypeError if it is nested, sparse or on the device meta."""
    if tensor.is_nested:
        raise TypeError(f"{name} is a nested tensor; pad its maps with zeros (torch.nested.to_padded_tensor)")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got layout {tensor.layout}; use {name}.to_dense()")
    # Subclasses with a dispatch of their own (DTensor, for example) do not hold their values themselves.
    if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
        with torch._C.DisableTorchFunctionSubclass():
            tensor = tensor.as_subclass(Tensor)
    if type(tensor) is Tensor and tensor.is_meta:
        raise TypeError(f"{name} is on the device 'meta', which holds no values; pass a tensor with values")
    return tensor.detach()


def check_smooth(smooth: float) -> float:
    """Return `smooth` as 0.0 or a float from `SMALLEST_SMOOTH` to `LARGEST_SMOOTH`, or raise TypeError / ValueError.

    A smaller number above 0 becomes `SMALLEST_SMOOTH`, which changes no score by more than that.
    """
    if isinstance(smooth, bool) or not isinstance(smooth, Real):
        raise TypeError(f"smooth must be a number, got {smooth!r}; 0.0 is the plain score")
    if not 0 <= smooth <= LARGEST_SMOOTH:
        raise ValueError(
            f"smooth={smooth!r} is invalid: expected a number from 0 to {LARGEST_SMOOTH:g}; 0.0 is the plain score"
        )
    return max(float(smooth), SMALLEST_SMOOTH) if smooth else 0.0


def check_masks(masks: Tensor, probs: Tensor) -> Tensor:
    """Return `masks` (N, C, *S) bool of the shape of `probs`, or raise TypeError / ValueError."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks must be a torch.Tensor, got {type(masks).__name__}; convert it with torch.as_tensor")
    masks = plain(masks, "masks")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks must be bool, got {masks.dtype}; compare first, as in masks > 0.5")
    if masks.shape != probs.shape:
        raise ValueError(
            f"masks must have the shape of probs {tuple(probs.shape)}, got {tuple(masks.shape)}; "
            "one mask for each image and class"
        )
    return masks.to(probs.device)


def check_flag(name: str, value: Any) -> bool:
    """Return `value` as a bool; raise TypeError for other objects, such as the text "false", which counts as true."""
    if isinstance(value, (str, Tensor)) or value not in (False, True):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def check_valid(valid: Tensor | None, probs: Tensor) -> None:
    """Raise TypeError / ValueError unless `valid` is None or (N, *S) bool for `probs` (N, C, *S)."""
    if valid is None:
        return
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        got = valid.dtype if isinstance(valid, Tensor) else type(valid).__name__
        raise TypeError(f"valid must be a bool torch.Tensor, got {got}; compare first, as in labels != 255")
    if valid.shape != probs.shape[:1] + probs.shape[2:]:
        raise ValueError(f"valid must be (N, *S), got {tuple(valid.shape)} for probs {tuple(probs.shape)}")


def to_device(probs: Tensor, device: torch.device | str | None) -> Tensor:
    """Return `probs` on `device`; None leaves it where it is.

    Raises:
        ValueError: the device is not available, or has no float64 ("mps") or no values ("meta").
    """
    if device is None:
        return probs
    try:
        target = torch.device(device)
        if target.type == "meta":
            raise RuntimeError("it holds no values")
        if target.type == "mps":
            raise RuntimeError("it has no float64, in which the scores are computed")
        return probs.to(target)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, TypeError) as error:  # AssertionError: torch is built without the device
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used ({reason}); leave device out to compute where probs is"
        ) from None


def check_choice(name: str, value: Any, allowed: tuple[Any, ...]) -> Any:
    """Return the element of `allowed` that equals `value` (True is not 1, 1.0 is not 1), or raise ValueError."""
    if isinstance(value, Integral) and not isinstance(value, bool):
        value = int(value)  # NumPy's integers
    for option in allowed:
        if type(value) is type(option) and value == option:
            return option
    listed = ", ".join(repr(option) for option in allowed)
    raise ValueError(f"{name} must be one of {listed}, got {value!r}")
