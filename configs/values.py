"""Check single configuration values before any file is read or written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from configs.errors import ConfigError

Check = tuple[Callable[[Any], bool], str]  # whether a value is valid, and what is expected


def integer(least: int, most: int | None = None) -> Check:
    """Return the check for an integer within bounds."""

    def is_valid(value: Any) -> bool:
        return type(value) is int and least <= value and (most is None or value <= most)

    return is_valid, f"an integer >= {least}" if most is None else f"an integer from {least} to {most}"


def number(least: float = 0, *, exclusive: bool = False, most: float = math.inf) -> Check:
    """Return the check for a finite number within bounds; ``exclusive`` excludes the lower one."""

    def is_valid(value: Any) -> bool:
        finite = type(value) in (int, float) and math.isfinite(value)
        return finite and (value > least or (not exclusive and value == least)) and value <= most

    words = f"a number {'>' if exclusive else '>='} {least:g}"
    return is_valid, words if most == math.inf else f"{words} and <= {most:g}"


def or_null(check: Check) -> Check:
    return lambda value: value is None or check[0](value), f"{check[1]}, or null"


def choice(*allowed: str) -> Check:
    """Return the check for one of a few words."""
    return lambda value: type(value) is str and value in allowed, " or ".join(allowed)


def _is_size(value: Any) -> bool:
    sides = list(value) if _is_list(value) and len(value) == 2 else [value]
    return all(type(side) is int and 0 < side <= 1 << 16 for side in sides)


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or OmegaConf.is_list(value)


def _is_image_count(value: Any) -> bool:
    counts = list(value.values()) if OmegaConf.is_dict(value) else [value]
    least = 0 if OmegaConf.is_dict(value) else 1  # 0: a split that is not used
    return value is None or all(type(count) is int and least <= count <= 10_000_000 for count in counts)


SIZE: Check = (_is_size, "an integer from 1 to 65536, or [height,width]")
NAME: Check = (
    lambda value: isinstance(value, str) and re.fullmatch(r"[\w.+-][\w.+ -]{0,99}", value) is not None,
    "at most 100 letters, digits, spaces and . + - _",
)
SUB_FOLDER: Check = (
    lambda value: isinstance(value, str) and all(NAME[0](part) and part != ".." for part in value.split("/")),
    "a folder inside that of the run",
)
PATH: Check = (lambda value: isinstance(value, str) and bool(value.strip()), "a folder")
LOCAL_PATH: Check = (
    lambda value: isinstance(value, str) and not value.startswith(("//", "\\\\")),
    "a folder of this machine, not of the network",
)
FLAG: Check = (lambda value: type(value) is bool, "true or false")


CHECKS: dict[str, Check] = {
    "seed": integer(0, 2**63 - 1),
    "epochs": integer(1),
    "batch_size": integer(1),
    "num_workers": integer(0, 256),
    "backbone_lr_ratio": number(),
    "loader_timeout": number(),
    "on_error": choice("raise", "skip"),
    "verify": FLAG,
    "resume": FLAG,
    "validation": (
        lambda value: _is_list(value) and all(isinstance(name, str) for name in value),
        "a list of rules, such as [T,max]",
    ),
    "save_dir": PATH,
    "run_dir": PATH,
    "suffix": (lambda value: value == "" or NAME[0](value), f"{NAME[1]}, or nothing"),
    "split": NAME,
    "dataset.name": NAME,
    "protocol.name": NAME,
    "dataset.root": or_null(LOCAL_PATH),
    "dataset.num_images": (_is_image_count, "an integer from 1 to 10000000, or one for each split"),
    "dataset.num_classes": integer(1, 1 << 16),
    "dataset.ignore_index": integer(-(2**31), 2**31 - 1),
    "dataset.resize": or_null(SIZE),
    "dataset.crop": or_null(SIZE),
    "dataset.eval_crop": or_null(integer(1, 1 << 16)),
    "dataset.rotate": integer(0, 180),
    "dataset.flip": number(most=1),
    "dataset.dithered_masks": FLAG,
    "model.name": NAME,
    "optimizer.lr": number(exclusive=True),
    "optimizer.weight_decay": number(),
    "optimizer.momentum": number(),
    "schedule.power": number(),
    "schedule.floor": number(),
    "loss.gamma": number(),
    "loss.legacy": FLAG,
    "predictor.at": number(most=1),
    "predictor.per_class": FLAG,
    "predictor.pruning": FLAG,
    "protocol.rules": (
        lambda value: OmegaConf.is_dict(value) and all(isinstance(name, str) for name in value.values()),
        "a mapping from rules to the rules that replace them",
    ),
    "protocol.results": SUB_FOLDER,
    "protocol.void": choice("masked", "counted"),
    "protocol.label_fill": integer(-(2**31), 2**31 - 1),
    "protocol.legacy_losses": FLAG,
    "protocol.legacy_preprocessing": FLAG,
    "protocol.legacy_bce_iou": FLAG,
    "protocol.legacy_soft_dice_void": FLAG,
    "temperature": (lambda value: value == "fit" or number(exclusive=True)[0](value), "a number > 0, or fit"),
    "calibrate": choice("none", "temperature", "class"),
    "gate": (lambda value: value in ("none", "fit") or (type(value) is float and value == 0.5), "0.5, none or fit"),
    "threshold": or_null(number(most=1)),
    "correct_focal": FLAG,
    "trainer.precision": choice("fp32", "bf16", "fp16"),
    "trainer.accumulate": integer(1),
    "trainer.clip_norm": or_null(number(exclusive=True)),
    "trainer.channels_last": FLAG,
    "trainer.compile": FLAG,
    "trainer.deterministic": FLAG,
    "trainer.second_forward": FLAG,
    "trainer.validate_every": integer(1),
    "trainer.save_every": integer(1),
    "trainer.keep": integer(0),
    "trainer.save_minutes": number(),
    "trainer.tensorboard": FLAG,
    "trainer.panels": integer(0),
}
_ABSENT = object()


def check_values(cfg: DictConfig) -> None:
    """Raise ConfigError for an invalid value, naming its key and what is expected."""
    for key, (is_valid, words) in CHECKS.items():
        value = OmegaConf.select(cfg, key, default=_ABSENT)
        if value is not _ABSENT and not is_valid(value):
            raise ConfigError(f"{key}={'null' if value is None else value} is invalid: expected {words}")
