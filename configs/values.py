"""Values that no run can have, refused by name before anything is read or written."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

Check = tuple[Callable[[Any], bool], str]  # whether a value will do, and what to give instead


def whole(least: int, most: int | None = None) -> Check:
    """A whole number."""

    def will_do(value: Any) -> bool:
        return type(value) is int and least <= value and (most is None or value <= most)

    return (
        will_do,
        f"a whole number, {least} or more" if most is None else f"a whole number, {least} to {most}",
    )


def number(least: float = 0, least_too: bool = True) -> Check:
    """A finite number."""

    def will_do(value: Any) -> bool:
        finite = type(value) in (int, float) and math.isfinite(value)
        return finite and (value > least or (least_too and value == least))

    return will_do, f"a number, {least:g} or more" if least_too else f"a number above {least:g}"


def or_null(check: Check) -> Check:
    """The same, or null."""
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def one_of(*allowed: Any) -> Check:
    """One of a few."""
    words = [str(value).lower() if isinstance(value, bool) else str(value) for value in allowed]
    return lambda value: any(value is a or (type(value) is str and value == a) for a in allowed), " or ".join(
        words
    )


def _is_size(value: Any) -> bool:
    sides = list(value) if OmegaConf.is_list(value) and len(value) == 2 else [value]
    return all(type(side) is int and side > 0 for side in sides)


SIZE: Check = (_is_size, "a whole number, 1 or more, [height,width]")


def _is_names(value: Any) -> bool:
    return OmegaConf.is_list(value) and all(isinstance(name, str) for name in value)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


CHECKS: dict[str, Check] = {
    "seed": whole(0, 2**63 - 1),
    "epochs": whole(1),
    "batch_size": whole(1),
    "num_workers": whole(0, 256),
    "backbone_lr_ratio": number(),
    "loader_timeout": number(),
    "on_error": one_of("raise", "skip"),
    "verify": one_of(True, False),
    "resume": one_of(True, False),
    "validation": (_is_names, "a list of rules, such as [T,max]"),
    "save_dir": (_is_path, "a folder"),
    "run_dir": (_is_path, "a folder"),
    "dataset.resize": or_null(SIZE),
    "dataset.crop": or_null(SIZE),
    "dataset.eval_crop": or_null(whole(1)),
    "optimizer.lr": number(least_too=False),
    "optimizer.weight_decay": number(),
    "schedule.power": number(),
    "loss.gamma": number(),
    "temperature": (
        lambda value: value == "fit" or number(least_too=False)[0](value),
        "a number above 0, or fit",
    ),
    "threshold": or_null((lambda value: number()[0](value) and value <= 1, "a number, 0 to 1")),
    "correct_focal": one_of(True, False),
    "trainer.precision": one_of("fp32", "bf16", "fp16"),
    "trainer.accumulate": whole(1),
    "trainer.clip_norm": or_null(number(least_too=False)),
    "trainer.validate_every": whole(1),
    "trainer.save_every": whole(1),
    "trainer.keep": whole(0),
    "trainer.save_minutes": number(),
    "trainer.panels": whole(0),
}


_ABSENT = object()


def check_values(cfg: DictConfig) -> None:
    """Raise ValueError for a value that cannot be meant, naming its key and what to give."""
    for key, (will_do, words) in CHECKS.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is not _ABSENT and not will_do(value):
            raise ValueError(f"{key}={'null' if value is None else value}: give {words}")


def check_uncalibrated(cfg: DictConfig, command: str) -> None:
    """Refuse what changes probabilities, for a command that shows them as the network gives them.

    Raises:
        ValueError: with what to pass.
    """
    if cfg.temperature != 1 or cfg.correct_focal:
        raise ValueError(
            f"{command} shows probabilities as the network gives them, not with temperature={cfg.temperature}, "
            f"correct_focal={cfg.correct_focal}: pass temperature=1 correct_focal=false"
        )
