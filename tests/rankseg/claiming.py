"""Tensors that claim another device: the torch path of a GPU, checked without one.

A `Claiming` tensor says that it is on the device "meta" and keeps its values on the CPU. As on a GPU, an operation that
mixes it with a tensor of the CPU raises (zero-dimensional ones excepted). Inside `Ledger`, factory functions with
that device make such tensors, and the ledger counts launches and the operations for which the host has to wait.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")

# Operations whose result has a size, or a value on the host, that depends on the values.
_WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal")
# Operations that only change how memory is read, or reserve it.
_VIEWS = {
    "view", "_unsafe_view", "reshape", "expand", "slice", "select", "unsqueeze", "squeeze", "transpose", "permute",
    "t", "alias", "as_strided", "detach", "split", "split_with_sizes", "unbind", "_reshape_alias", "movedim",
    "diagonal", "empty", "empty_like", "empty_strided", "new_empty", "view_as"
}  # fmt: skip


class Claiming(Tensor):
    """A tensor of the CPU that claims `DEVICE`."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Claiming:
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        made = Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)
        made.inner = inner
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Claiming({self.inner})"

    def tolist(self) -> Any:
        return self.to("cpu").tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, None)


class Ledger(TorchDispatchMode):
    """Count what a device is asked to do; make `Claiming` tensors for factory functions with its device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.is_inference_mode_enabled():  # operations made of others arrive as a whole: take them apart
            with self:
                found = func.decompose(*args, **(kwargs or {}))
            if found is not NotImplemented:
                return found
        return run(func, args, kwargs or {}, self)


def run(func: Any, args: Any, kwargs: dict[str, Any], ledger: Ledger | None) -> Any:
    """Execute one operation on the values, with the checks and the counts of a device."""
    leaves = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    claimed = [x for x in leaves if isinstance(x, Claiming)]
    name = func.overloadpacket.__name__
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    moves = name in ("_to_copy", "copy_", "_copy_from")
    there = target == DEVICE if target is not None else bool(claimed)
    if not claimed and not there:
        return func(*args, **kwargs)
    plain = [x for x in leaves if not isinstance(x, Claiming) and x.ndim > 0]
    if claimed and plain and not moves:
        raise RuntimeError(f"{name}: tensors on {DEVICE} and on the CPU in one operation")
    if target is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    if ledger is not None:
        boolean = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in tree_leaves(args[1])
        )
        crosses = moves and (bool(plain) or bool(claimed) != there)
        if name in _WAITS or boolean or crosses:
            ledger.waits[name] += 1
        if name not in _VIEWS:
            ledger.launches[name] += 1
    if not there:
        return out
    known = {id(x.inner): x for x in claimed}

    def outer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else Claiming(x.resolve_conj())

    return tree_map(outer, out)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, Claiming) else x
