"""Fit a segmentation network: ``python train.py [group=option] [key=value]``; ``--help`` lists groups and keys."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads sleep instead of spinning

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from configs.cli import run_cli
from configs.compose import GROUPS, quote_overrides

if TYPE_CHECKING:  # torch is imported where it is used, so that shell completion answers at once
    from torch import nn

    from trainers.checkpoint import Checkpoints
    from trainers.distributed import World
    from trainers.trainer import Trainer

ROOT = Path(__file__).resolve().parent


def fit(cfg: DictConfig, choices: dict[str, str], world: World) -> None:
    """Train one run, from the start or from where it was interrupted."""
    from configs import build, stored
    from configs.cli import list_skipped
    from configs.values import check_values
    from trainers.journal import Journal
    from trainers.reproducibility import seed_everything
    from trainers.trainer import Trainer, last_logged_step
    from trainers.validation import Validation

    check_values(cfg)
    build.absolute_root(cfg)
    config = stored.pack(cfg, choices)
    checkpoints = claim_run(cfg, world)
    seed_everything(cfg.seed, cfg.trainer.deterministic)
    train_set, val_set = build.dataset(cfg, "train"), build.dataset(cfg, "val")
    prints = {"train": train_set.fingerprint(), "val": val_set.fingerprint()}
    contents = {"train": train_set.checksum(), "val": val_set.checksum()}
    identity = {"classes": list(train_set.info.classes), "data": prints, "contents": contents}
    checkpoint = newest_of_same_data(checkpoints, identity)

    network = build.model(cfg).to(world.device)  # before the images are verified, as weights may be missing
    build.check_outputs(cfg, network, train_set.info)
    criterion = build.loss(cfg)
    update = build.update(cfg, network, criterion, world)
    loader, val_loader = build.train_loader(cfg, train_set, world), build.eval_loader(cfg, val_set, world)
    journal = Journal(
        checkpoints.folder if world.is_main else None,
        last_logged_step(checkpoint),
        cfg.trainer.tensorboard,
        train_set.info.classes,
    )
    validation = Validation(
        val_set,
        val_loader,
        build.rules(dict.fromkeys(["T", *cfg.validation, cfg.predictor.name]), cfg),
        criterion,
        build.scoring(cfg, val_set.info),
        journal,
        world,
        epochs=cfg.epochs,
        precision=cfg.trainer.precision,
        panels=cfg.trainer.panels,
    )
    trainer = Trainer(
        update,
        build.schedule(cfg),
        loader,
        validation,
        checkpoints,
        journal,
        {"config": config, **identity},
        epochs=cfg.epochs,
        validate_every=cfg.trainer.validate_every,
        save_every=cfg.trainer.save_every,
        save_minutes=cfg.trainer.save_minutes,
    )
    if checkpoint:
        resume(trainer, network, checkpoint, world)
    if trainer.progress.epoch >= cfg.epochs:
        journal.close()
        say(world, f"{cfg.run_dir}: finished before, nothing to do (resume=false trains again)")
        return
    for data in (train_set, val_set) if cfg.verify and world.is_main else ():
        data.verify(on_error=cfg.on_error)
    if world.is_main:
        describe(cfg, trainer, network, len(train_set), prints)
    trainer.fit()
    options = {group: cfg[group].get("name", choices[group]) for group in GROUPS}
    numbers = {"lr": cfg.optimizer.lr, **{key: cfg[key] for key in ("epochs", "batch_size", "seed")}}
    journal.hparams({**options, **numbers}, trainer.progress.best or 0.0)
    journal.close()
    list_skipped({**loader.skipped, **val_loader.skipped})
    say(world, f"done. Score it: python test.py -r {shlex.quote(str(checkpoints.best))} -p all")


def claim_run(cfg: DictConfig, world: World) -> Checkpoints:
    """Make this the only process that trains in the run's folder; reject a folder of another run."""
    from configs import stored
    from configs.checkpoint import read_state
    from trainers.checkpoint import Checkpoints
    from trainers.distributed import barrier

    checkpoints = Checkpoints(Path(cfg.run_dir), read_state, keep=cfg.trainer.keep)
    if world.is_main:
        checkpoints.claim()
        if not cfg.resume:
            checkpoints.clear()
    barrier(world)
    stored.check_same_run(checkpoints.folder, cfg)
    return checkpoints


def newest_of_same_data(checkpoints: Checkpoints, identity: dict[str, Any]) -> dict[str, Any] | None:
    """Read the checkpoint to resume from, if any; reject one of other images or classes."""
    from configs import stored
    from configs.files import read_json

    checkpoint = checkpoints.newest()
    if checkpoint:
        notes = checkpoints.folder / "provenance.json"  # has the fingerprints that older checkpoints lack
        noted = read_json(notes) if notes.exists() else {}
        before = {"data": noted.get("data") if isinstance(noted, dict) else None, **checkpoint}
        stored.check_same_data(checkpoints.folder, before, identity)
    return checkpoint


def resume(trainer: Trainer, network: nn.Module, checkpoint: dict[str, Any], world: World) -> None:
    """Go back to the state of a checkpoint, and write the files that a killed run had no time for."""
    from models import load_state

    load_state(network, checkpoint["model"], "the run's checkpoint")
    trainer.restore(checkpoint)
    if world.is_main:
        trainer.complete(checkpoint, missing_only=True)


def describe(
    cfg: DictConfig, trainer: Trainer, network: nn.Module, num_images: int, prints: dict[str, str]
) -> None:
    """Print what is about to be trained, and write config.yaml and provenance.json."""
    from configs.files import write_json, write_text
    from trainers.reproducibility import provenance

    world, now, folder = trainer.world, trainer.progress, Path(cfg.run_dir)
    if now.updates:
        print(f"{folder}: resuming after epoch {now.epoch}, step {now.step}")
    else:
        size = sum(p.numel() for p in network.parameters()) / 1e6
        steps = len(trainer.loader)
        print(f"{folder}: {num_images} images, {cfg.epochs} epochs of {steps} steps, {size:.1f} M parameters")
    shared = 1 if world.device.type == "cuda" else world.size  # SyncBatchNorm needs a GPU
    norm = cfg.batch_size // shared // cfg.trainer.accumulate
    print(
        f"batch {cfg.batch_size} on {world.size} x {world.device}, BatchNorm over {norm} images", flush=True
    )
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    notes = provenance(ROOT, seed=cfg.seed, data=prints, world_size=world.size)
    write_json(folder / "provenance.json", notes)


def say(world: World, text: str) -> None:
    """Print a line at rank 0."""
    if world.is_main:
        print(text, flush=True)


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Train one run, or in a multirun one after the other."""
    choices: dict[str, Any] = dict(HydraConfig.get().runtime.choices)

    def run() -> None:
        from trainers.distributed import join_world

        with join_world(cfg.device) as world:
            fit(cfg, choices, world)

    if HydraConfig.get().mode == RunMode.RUN:
        run_cli(run)  # here, because Hydra would add a line of its own
    else:
        run()


if __name__ == "__main__":
    # The jobs of a launcher are new processes in other folders, and import this project too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    run_cli(main)
