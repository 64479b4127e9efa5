"""Shell completion of train.py: what TAB asks, answered without torch, in a fraction of the time."""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(config_path=str(Path(__file__).parent), config_name="train", version_base="1.3")
def complete(cfg: DictConfig) -> None:
    """Never called: Hydra answers `-sc` by itself."""
