"""Values that an override may get wrong, refused by their keys before anything is made of them."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

# The least that each may be.
_WHOLE = {
    "seed": 0,
    "epochs": 1,
    "batch_size": 1,
    "num_workers": 0,
    "trainer.accumulate": 1,
    "trainer.validate_every": 1,
    "trainer.save_every": 1,
    "trainer.keep": 0,
    "trainer.panels": 0,
}
_NUMBERS = {
    "optimizer.lr": 0,
    "backbone_lr_ratio": 0,
    "loader_timeout": 0,
    "trainer.save_minutes": 0,
    "trainer.clip_norm": 0,
    "threshold": 0,  # of test.py only
}
_MAY_BE_NULL = ("trainer.clip_norm", "threshold")


def check_values(cfg: DictConfig) -> None:
    """Refuse numbers that are none, or too small, and a list that is none.

    Raises:
        ValueError: with the key, its value and what it may be.
    """
    for key, least in {**_WHOLE, **_NUMBERS}.items():
        value, kind = OmegaConf.select(cfg, key), "whole number" if key in _WHOLE else "number"
        wanted = int if key in _WHOLE else (int, float)
        if value is None and key in _MAY_BE_NULL:
            continue
        if isinstance(value, bool) or not isinstance(value, wanted) or value < least:
            raise ValueError(f"{key}={value} must be a {kind} of at least {least}")
    if not OmegaConf.is_list(cfg.validation):
        raise ValueError(
            f"validation={cfg.validation} must be a list: write 'validation=[{cfg.validation}]', quoted"
        )


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
