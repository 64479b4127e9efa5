"""Fit a segmentation network: ``python train.py [group=option] [key=value]``; ``--help`` shows what there is."""

from __future__ import annotations

import sys

if __name__ == "__main__" and {"-sc", "--shell-completion"} & set(sys.argv):
    from configs.completion import answer

    answer()  # before torch is imported: a TAB should not take seconds
    sys.exit()

import math
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import nn

from configs import build, stored
from configs.checkpoint import read_state
from configs.cli import guarded, list_skipped
from configs.compose import GROUPS, quote_overrides
from configs.files import write_json, write_text
from configs.values import check_values
from datasets import EvalLoader, SegmentationDataset
from trainers.checkpoint import Checkpoints
from trainers.distributed import World, barrier, world, wrap
from trainers.evaluator import evaluate
from trainers.journal import Journal
from trainers.losses import SegmentationLoss
from trainers.reproducibility import provenance, seed_everything
from trainers.trainer import Trainer
from trainers.update import Update

ROOT = Path(__file__).resolve().parent


def fit(cfg: DictConfig, choices: dict[str, str], where: World) -> None:
    """Train one cell of the grid, from the start or from where it was interrupted."""
    check_values(cfg)
    build.absolute_root(cfg)
    folder = Path(cfg.run_dir)
    config = stored.pack(cfg, choices)
    checkpoints = Checkpoints(folder, read_state, keep=cfg.trainer.keep)
    if where.is_main:
        checkpoints.claim()
        if not cfg.resume:
            checkpoints.clear()
    barrier(where)
    same_run(folder, cfg)
    if checkpoints.finished(cfg.epochs):
        say(where, f"{folder}: finished before, nothing to do (resume=false trains again)")
        return

    seed_everything(cfg.seed, cfg.trainer.deterministic)
    train_set, val_set = build.dataset(cfg, "train"), build.dataset(cfg, "val")
    if cfg.verify and where.is_main:
        for data in (train_set, val_set):
            data.verify(on_error=cfg.on_error)
    barrier(where)
    loader, val_loader = build.train_loader(cfg, train_set, where), build.eval_loader(cfg, val_set, where)
    criterion = build.loss(cfg)
    network = build.model(cfg).to(where.device)
    if cfg.trainer.channels_last:
        network = network.to(memory_format=torch.channels_last)
    model = wrap(network, where)
    optimizer = build.optimizer(cfg, network)
    update = Update(
        cast(nn.Module, torch.compile(model)) if cfg.trainer.compile else model,
        criterion,
        optimizer,
        where,
        precision=cfg.trainer.precision,
        accumulate=cfg.trainer.accumulate,
        clip_norm=cfg.trainer.clip_norm,
        channels_last=cfg.trainer.channels_last,
        second_forward=cfg.trainer.second_forward,
    )
    checkpoint = checkpoints.newest()
    journal = open_journal(cfg, folder, checkpoint, val_set, where)

    trainer = Trainer(
        update,
        build.schedule(cfg),
        loader,
        validation(cfg, val_set, val_loader, criterion, journal, where),
        checkpoints,
        journal,
        config,
        epochs=cfg.epochs,
        validate_every=cfg.trainer.validate_every,
        save_every=cfg.trainer.save_every,
        save_minutes=cfg.trainer.save_minutes,
    )
    if checkpoint:
        trainer.restore(checkpoint)
        say(where, f"{folder}: going on after epoch {trainer.progress.epoch}, step {trainer.progress.step}")
    else:
        count = sum(p.numel() for p in network.parameters())
        say(
            where,
            f"{folder}: {len(train_set)} images, {cfg.epochs} epochs of {len(loader)} steps, "
            f"{count / 1e6:.1f} M parameters",
        )
    shared = 1 if where.device.type == "cuda" else where.size  # SyncBatchNorm needs a GPU
    norm = cfg.batch_size // shared // cfg.trainer.accumulate
    say(where, f"batch {cfg.batch_size} on {where.size} x {where.device}, BatchNorm over {norm} images")
    if where.is_main:
        write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
        prints = {"train": train_set.fingerprint(), "val": val_set.fingerprint()}
        write_json(
            folder / "provenance.json", provenance(ROOT, seed=cfg.seed, data=prints, world_size=where.size)
        )
    trainer.fit()
    options = {group: cfg[group].get("name", choices[group]) for group in GROUPS}
    numbers = {"lr": cfg.optimizer.lr, **{key: cfg[key] for key in ("epochs", "batch_size", "seed")}}
    journal.hparams({**options, **numbers}, trainer.progress.best or 0.0)
    journal.close()
    list_skipped({**loader.skipped, **val_loader.skipped})
    say(where, f"done. Score it: python test.py -r {shlex.quote(str(checkpoints.best))} -p all")


def validation(
    cfg: DictConfig,
    data: SegmentationDataset,
    loader: EvalLoader,
    criterion: SegmentationLoss,
    journal: Journal,
    where: World,
) -> Callable[[nn.Module, int, int], float]:
    """What to do after an epoch: score every rule, log, draw; the score of ``predictor`` picks the best epoch."""
    names = dict.fromkeys([*cfg.validation, cfg.predictor.name])
    rules = build.rules(names, cfg)
    scoring, precision = build.scoring(cfg, data.info), cfg.trainer.precision

    def validate(network: nn.Module, epoch: int, step: int) -> float:
        results = evaluate(
            network, loader, rules, criterion, scoring, where, precision=precision, progress="validating"
        )
        for name, result in results.items():
            journal.log(step, f"val_{name}", epoch=epoch, **result.scores)
        if journal.events is not None:
            from trainers.panels import panels, sheet  # slow to import

            first = range(min(cfg.trainer.panels, len(data)))
            drawn = panels(network, data, loader.transform, rules, criterion.link, where, first, draw=sheet)
            for name, picture in drawn:
                journal.image(step, f"val/{name}", picture)
        dice = {name: result.scores["mean_dice"] for name, result in results.items()}
        shown = "  ".join(f"{name} {100 * score:.2f}" for name, score in dice.items())
        loss = results[cfg.predictor.name].scores["test_loss"]
        say(where, f"epoch {epoch:>3}/{cfg.epochs}  val loss {loss:.4f}  mDice: {shown}")
        return dice[cfg.predictor.name] if math.isfinite(dice[cfg.predictor.name]) else 0.0

    return validate


def open_journal(
    cfg: DictConfig,
    folder: Path,
    checkpoint: dict[str, Any] | None,
    data: SegmentationDataset,
    where: World,
) -> Journal:
    """The run's journal, gone on with where there is a checkpoint.

    Apart from ``fit``, as launchers pickle what stands here: beside ``torch``, ``classes`` would be ``torch.classes``.
    """
    return Journal(
        folder if where.is_main else None, rows_until(checkpoint), cfg.trainer.tensorboard, data.info.classes
    )


def rows_until(checkpoint: dict[str, Any] | None) -> int:
    """The last step whose rows in the journal belong to a checkpoint: an epoch's rows come when it is finished."""
    if checkpoint is None:
        return 0
    progress = checkpoint["training"]["progress"]
    return progress["updates"] - (progress["step"] > 0)


def same_run(folder: Path, cfg: DictConfig) -> None:
    """Refuse to go on with a run that was configured otherwise."""
    path = folder / "config.yaml"
    if not cfg.resume or not path.exists():
        return
    before = stored.read_config(path)
    changed = stored.differences(before, OmegaConf.to_container(cfg, resolve=True))
    if changed:
        raise ValueError(
            f"{folder} holds a run of another configuration ({'; '.join(changed[:4])}): "
            "give this one a name with suffix=-NAME, or replace that one with resume=false"
        )


def say(where: World, text: str) -> None:
    """Print a line, once."""
    if where.is_main:
        print(text, flush=True)


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Hydra's entry: one cell, or each cell of a multirun."""
    choices: dict[str, Any] = dict(HydraConfig.get().runtime.choices)

    def cell() -> None:
        with world(cfg.device) as where:
            fit(cfg, choices, where)

    if HydraConfig.get().mode == RunMode.RUN:
        guarded(cell)  # here, because Hydra would add a line of its own
    else:
        cell()


if __name__ == "__main__":
    # The jobs of a launcher start from nothing, wherever they are, and import this project too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    guarded(main)
