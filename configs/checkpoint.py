"""Load a checkpoint with its network and configuration; lock a run's folder, and find the checkpoint to resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from configs import build, stored
from configs.errors import UserError
from configs.files import read_json
from models import CheckpointError, load_state, read_checkpoint
from models.reading import check_epoch
from trainers.checkpoint import Checkpoints
from trainers.distributed import World, barrier

_PARTS = {"optimizer", "scaler", "progress", "rng"}  # of the state of a training


def read_state(path: Path) -> dict[str, Any]:
    """Read a checkpoint to resume from; raise CheckpointError if it does not hold the whole state of a training."""
    checkpoint = read_checkpoint(path)
    state = checkpoint.get("training")
    progress = state.get("progress") if isinstance(state, dict) else None
    if not (
        isinstance(state, dict)
        and set(state) >= _PARTS
        and isinstance(progress, dict)
        and {"epoch", "updates", "step"} <= set(progress)
        and all(one is None or type(one) in (int, float) for one in progress.values())
    ):
        raise CheckpointError(f"checkpoint {path} does not hold the state of a training. Fix: delete it.")
    _check_metadata(checkpoint, path)
    return checkpoint


def claim_run(cfg: DictConfig, world: World) -> Checkpoints:
    """Lock the run's folder for this process; with ``resume=false``, remove its checkpoints.

    Raises BusyError if another process trains in it, and ConfigError if it holds another run.
    """
    checkpoints = Checkpoints(Path(cfg.run_dir), read_state, keep=cfg.trainer.keep)
    if world.is_main:
        checkpoints.claim()
        if not cfg.resume:
            checkpoints.clear()
    barrier(world)
    stored.check_same_run(checkpoints.folder, cfg)
    return checkpoints


def newest_checkpoint(checkpoints: Checkpoints, identity: Mapping[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint to resume from, if any; raise ConfigError if its images or classes differ."""
    checkpoint = checkpoints.newest()
    if checkpoint:
        path = checkpoints.folder / "provenance.json"  # has the fingerprints that older checkpoints lack
        provenance = read_json(path) if path.exists() else {}
        before = {"data": provenance.get("data") if isinstance(provenance, dict) else None, **checkpoint}
        stored.check_same_data(checkpoints.folder, before, identity)
    return checkpoint


def load(
    path: Path, overrides: Sequence[str] = (), rules: Sequence[str] | None = None
) -> tuple[nn.Module, DictConfig, dict[str, Any]]:
    """Load a checkpoint of this project or of the paper's authors.

    ``rules`` are the rules that the command applies: see `stored.unpack`. The authors' checkpoints are scored with
    ``protocol=paper``, unless an override chooses another protocol.

    Returns:
        The network, the configuration, and the checkpoint. Its ``epoch`` is an int. Its ``classes`` are the names of
        the classes that it was trained on; None or absent if they are not stored.
    """
    checkpoint = read_checkpoint(path)
    if "arch" in checkpoint:
        from models.published import is_published, load_published  # slow to import

        if is_published(checkpoint):
            network, config = load_published(checkpoint, source=f"checkpoint {path}")
            return network, stored.unpack(config, overrides, rules), {"epoch": 0, **checkpoint, "classes": None}
    if not {"model", "config", "epoch"} <= set(checkpoint):
        raise CheckpointError(
            f"{path} is not a checkpoint of this project: it lacks model, config or epoch. "
            "Fix: choose one that train.py wrote."
        )
    _check_metadata(checkpoint, path)
    cfg = stored.unpack(checkpoint["config"], overrides, rules)
    if "weights" in cfg.model:
        cfg.model.weights = None  # the checkpoint's weights replace them
    try:
        network = build.model(cfg)
    except (TypeError, ValueError, RuntimeError, MemoryError, OverflowError) as error:
        if not isinstance(error, UserError) and not str(cfg.model._target_).startswith("models."):
            raise  # a bug in a contributed model
        raise CheckpointError(f"the configuration in {path} cannot build a network: {error}") from error
    load_state(network, checkpoint["model"], path)
    return network, cfg, checkpoint


def _check_metadata(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Raise CheckpointError if the epoch or the names of the classes are invalid."""
    check_epoch(checkpoint.get("epoch"), path)
    names = checkpoint.get("classes")
    if names is not None and not (
        isinstance(names, list)
        and len(names) <= 1 << 16
        and all(type(name) is str and len(name) <= 200 and name.isprintable() for name in names)
    ):
        raise CheckpointError(f"{path}: classes are not a list of names. Fix: choose another file.")


def check_classes(checkpoint: Mapping[str, Any], classes: Sequence[str], path: Path) -> None:
    """Raise CheckpointError unless a data set has the classes that the network was trained on, in the same order."""
    trained = checkpoint.get("classes")
    if trained is not None and list(trained) != list(classes):
        raise CheckpointError(
            f"{path} was trained on the classes [{', '.join(trained)}], and the data set has "
            f"[{', '.join(classes)}]. Fix: restore their order and names, or choose another data set."
        )
