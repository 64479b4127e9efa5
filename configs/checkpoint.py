"""From a checkpoint to a network and the configuration that it was trained with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from configs import build, stored
from models import load_state, read_checkpoint

# Our keys, and what a released configuration says of them.
_PUBLISHED = {
    "temperature": "temperature",
    "threshold": "threshold",
    "epochs": "epochs",
    "batch_size": "batch_size",
    "dataset.crop": "crop",
    "dataset.eval_crop": "eval_crop",
}


def as_stored(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """What ``models.published`` says of a released configuration, in the form that checkpoints hold.

    Its protocol is ``paper``, and what it does not say is as in the paper.
    """
    choices = {group: theirs[group] for group in ("dataset", "model", "loss", "predictor")}
    choices |= {"optimizer": "sgd", "schedule": "poly", "protocol": "paper", "trainer": "default"}
    values = {key: theirs[name] for key, name in _PUBLISHED.items() if theirs[name] is not None}
    return {"choices": choices, "values": values}


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint to go on from.

    Raises:
        ValueError: the file is no checkpoint, or holds no whole state of a training.
    """
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("training")
    parts = {"optimizer", "scaler", "progress", "rng"}
    if not (
        isinstance(state, dict) and parts <= set(state) and {"updates", "step"} <= set(state["progress"])
    ):
        raise ValueError(f"checkpoint {path} holds no state of a training, so nothing can go on from it")
    return checkpoint


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[nn.Module, DictConfig, dict[str, Any]]:
    """The network and the configuration of a checkpoint, and the checkpoint itself; both formats are recognised.

    The authors' released checkpoints are scored under ``protocol=paper`` unless an override says otherwise.

    Raises:
        ValueError: the file is no checkpoint, or not one of this project or of the paper's authors.
    """
    checkpoint = read_checkpoint(path)
    from models.published import is_published, load_published  # slow to import: a bad path is said before

    if is_published(checkpoint):
        network, theirs = load_published(checkpoint, where=f"checkpoint {path}")
        return network, stored.unpack(as_stored(theirs), overrides), checkpoint
    if not {"model", "config", "epoch"} <= set(checkpoint):
        raise ValueError(f"{path} is a checkpoint of another project: it lacks model, config or epoch")
    cfg = stored.unpack(checkpoint["config"], overrides)
    if "weights" in cfg.model:
        cfg.model.weights = None  # they are about to be replaced
    try:
        network = build.model(cfg)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} and its configuration make no network: {error}") from None
    load_state(network, checkpoint["model"], path)
    return network, cfg, checkpoint
