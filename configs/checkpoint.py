"""From a checkpoint to a network and the configuration that it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from configs import build, stored
from models import read_checkpoint
from models.published import is_published, load_published


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[nn.Module, DictConfig, dict[str, Any]]:
    """The network and the configuration of a checkpoint, and the checkpoint itself; both formats are recognised.

    The authors' released checkpoints are scored under ``protocol=paper`` unless an override says otherwise.

    Raises:
        ValueError: the file is no checkpoint, or not one of this project or of the paper's authors.
    """
    checkpoint = read_checkpoint(path, "cpu")
    if is_published(checkpoint):
        network, theirs = load_published(checkpoint)
        choices = {group: theirs[group] for group in ("dataset", "model", "loss")}
        values = {"temperature": theirs.get("temperature", 1.0)}
        return (
            network,
            stored.unpack({"choices": {**choices, "protocol": "paper"}, "values": values}, overrides),
            checkpoint,
        )
    cfg = stored.unpack(checkpoint.get("config"), overrides)
    cfg.model.weights = None  # they are about to be replaced
    network = build.model(cfg)
    network.load_state_dict(checkpoint["model"])
    return network, cfg, checkpoint
