"""Fit a segmentation network: ``python train.py [group=option] [key=value]``; ``--help`` lists groups and keys.

torch is imported inside the functions, so that shell completion answers at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from configs.cli import list_skipped, run_cli
from configs.compose import GROUPS, quote_overrides
from configs.errors import one_line
from configs.files import shell_word
from configs.values import check_values

if TYPE_CHECKING:
    from torch import nn

    from datasets import SegmentationDataset
    from trainers.distributed import World
    from trainers.trainer import Trainer

ROOT = Path(__file__).resolve().parent


@hydra.main(config_path="configs", config_name="train", version_base="1.3")
def main(cfg: DictConfig) -> None:
    """Train the run of this configuration; in a multirun, Hydra calls this once for each run."""
    choices: dict[str, Any] = dict(HydraConfig.get().runtime.choices)

    def run() -> None:
        from trainers.distributed import join_world

        with join_world(cfg.device) as world:
            fit(cfg, choices, world)

    if HydraConfig.get().mode == RunMode.RUN:
        run_cli(run)  # inside Hydra, which would print a line of its own about an error
    else:
        run()


def fit(cfg: DictConfig, choices: dict[str, str], world: World) -> None:
    """Train one run, from the start or from where it was interrupted."""
    from configs import build, stored
    from configs.checkpoint import claim_run, newest_checkpoint
    from models import load_state
    from trainers.evaluator import Validation
    from trainers.journal import Journal
    from trainers.reproducibility import seed_everything
    from trainers.trainer import Trainer, last_logged_step

    check_values(cfg)
    build.make_root_absolute(cfg)
    stored_config = stored.pack(cfg, choices)
    checkpoints = claim_run(cfg, world)

    seed_everything(cfg.seed, cfg.trainer.deterministic)
    train_set, val_set = build.dataset(cfg, "train"), build.dataset(cfg, "val")
    fingerprints = {"train": train_set.fingerprint(), "val": val_set.fingerprint()}
    contents = {"train": train_set.checksum(), "val": val_set.checksum()}
    identity = {"classes": list(train_set.info.classes), "data": fingerprints, "contents": contents}
    checkpoint = newest_checkpoint(checkpoints, identity)

    network = build.model(cfg).to(world.device)  # before the images are verified: weights may be missing
    build.check_outputs(cfg, network, train_set.info)
    criterion = build.loss(cfg)
    update = build.update(cfg, network, criterion, world)
    loader, val_loader = build.train_loader(cfg, train_set, world), build.eval_loader(cfg, val_set, world)
    val_loader.on_error = "raise"  # scores are means over all images: leaving some out would be a silent bias
    rules = build.rules(dict.fromkeys(["T", *cfg.validation, cfg.predictor.name]), cfg)
    scoring, schedule = build.scoring(cfg, val_set.info), build.schedule(cfg)
    step, settings = last_logged_step(checkpoint), cfg.trainer
    folder = checkpoints.folder if world.is_main else None
    journal = Journal(folder, step, settings.tensorboard, train_set.info.classes)
    validation = Validation(
        val_set, val_loader, rules, criterion, scoring, journal, world,
        epochs=cfg.epochs, precision=settings.precision, panels=settings.panels,
    )  # fmt: skip
    trainer = Trainer(
        update, schedule, loader, validation, checkpoints, journal, {"config": stored_config, **identity},
        epochs=cfg.epochs, validate_every=settings.validate_every,
        save_every=settings.save_every, save_minutes=settings.save_minutes,
    )  # fmt: skip

    if checkpoint:
        load_state(network, checkpoint["model"], "the run's checkpoint")
        trainer.restore(checkpoint)
        if world.is_main:
            trainer.complete(checkpoint, missing_only=True)  # what a killed run had no time to write
    finished = trainer.progress.epoch >= cfg.epochs
    if not finished:
        if world.is_main:
            if cfg.verify:
                verify_data(cfg, train_set, val_set, new=checkpoint is None)
            announce(cfg, trainer, network, len(train_set), fingerprints)
        trainer.fit()
        options = {group: cfg[group].get("name", choices[group]) for group in GROUPS}
        numbers = {"lr": cfg.optimizer.lr, **{key: cfg[key] for key in ("epochs", "batch_size", "seed")}}
        journal.log_hparams({**options, **numbers}, trainer.progress.best or 0.0)
        list_skipped(loader.skipped)
    journal.close()
    if world.is_main and finished:
        print(one_line(f"{cfg.run_dir}: finished before, nothing to do (resume=false trains again)"), flush=True)
    elif world.is_main:
        print(f"done. Score it: python test.py -r {shell_word(str(checkpoints.best))} -p all", flush=True)


def verify_data(cfg: DictConfig, train_set: SegmentationDataset, val_set: SegmentationDataset, new: bool) -> None:
    """Raise DatasetError for faults of the images; ``on_error=skip`` allows faults of training images only.

    All validation images of a new run are decoded. A repaired image has another checksum, so a run that finds a
    damaged one later cannot resume with the repaired one.
    """
    from datasets import DatasetError

    train_set.verify(on_error=cfg.on_error)
    try:
        val_set.verify(sample=None if new else 32)
    except DatasetError as error:
        if cfg.on_error != "skip":
            raise
        reason = "on_error=skip applies to training images only, because validation scores are means over all images."
        raise DatasetError(*error.args, f"{reason} Fix: repair these images, or remove them from the split.") from error


def announce(
    cfg: DictConfig, trainer: Trainer, network: nn.Module, num_images: int, fingerprints: dict[str, str]
) -> None:
    """Print what is about to be trained, and write config.yaml and provenance.json."""
    from configs.files import write_json, write_text
    from trainers.reproducibility import provenance

    world, now, folder = trainer.world, trainer.progress, Path(cfg.run_dir)
    if now.updates:
        print(one_line(f"{folder}: resuming after epoch {now.epoch}, step {now.step}"))
    else:
        size = sum(p.numel() for p in network.parameters()) / 1e6
        steps = len(trainer.loader)
        text = f"{folder}: {num_images} images, {cfg.epochs} epochs of {steps} steps, {size:.1f} M parameters"
        print(one_line(text))
    parts = 1 if world.device.type == "cuda" else world.size  # SyncBatchNorm needs a GPU
    images = cfg.batch_size // parts // cfg.trainer.accumulate
    print(f"batch {cfg.batch_size} on {world.size} x {world.device}, BatchNorm over {images} images", flush=True)
    write_text(folder / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    notes = provenance(ROOT, seed=cfg.seed, data=fingerprints, world_size=world.size)
    write_json(folder / "provenance.json", notes)


if __name__ == "__main__":
    # The jobs of a launcher are new processes in other folders, and import this project too.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    sys.argv[1:] = quote_overrides(sys.argv[1:])
    run_cli(main)
