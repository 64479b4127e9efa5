"""Fitting a network, from a state out of which every later step can be repeated bit for bit.

The trainer knows nothing of data sets, prediction rules or plots. What it is given: a loader whose epochs are
reproducible, an update, a learning-rate factor as a function of the step, and a function that scores the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn
from tqdm import tqdm

from trainers.checkpoint import FORMAT, Checkpoints
from trainers.distributed import any_rank, gather, unwrap
from trainers.errors import Interrupted, StopSignals
from trainers.journal import Journal
from trainers.reproducibility import restore_rng, rng_state
from trainers.update import Update

Schedule = Callable[[int, int], float]
Validate = Callable[[nn.Module, int, int], float]


class EpochLoader(Protocol):
    """Batches (with ``images``, ``targets``, ``names``) that depend on the epoch and the step alone."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]: ...


@dataclass
class Progress:
    """How far a training has come."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps made in the epoch that is under way
    updates: int = 0  # steps made in all
    loss_sum: float = 0.0  # over the steps of this epoch
    seconds: float = 0.0  # spent training, over all restarts
    score: float | None = None  # of the last validation
    best: float | None = None


class Trainer:
    """Trains with one update a step, and writes what is needed to go on from anywhere.

    Args:
        update: makes one update from one batch.
        schedule: ``(k, total) -> factor`` of the base learning rates for update k = 1 … total.
        loader: the training batches.
        validate: ``(model, epoch, updates) -> score``, larger is better.
        checkpoints: where states go.
        journal: where losses and rates go.
        config: stored in every checkpoint, as it is.
        epochs: how many in all.
        validate_every, save_every: in epochs; the last one is always validated and saved.
        save_minutes: the longest time between two ``last.pth`` inside an epoch (0: only at its end).
    """

    def __init__(
        self,
        update: Update,
        schedule: Schedule,
        loader: EpochLoader,
        validate: Validate,
        checkpoints: Checkpoints,
        journal: Journal,
        config: dict[str, Any],
        *,
        epochs: int,
        validate_every: int = 1,
        save_every: int = 10,
        save_minutes: float = 10.0,
    ) -> None:
        self.update, self.schedule, self.loader, self.validate = update, schedule, loader, validate
        self.checkpoints, self.journal, self.config = checkpoints, journal, config
        self.epochs, self.validate_every, self.save_every = epochs, validate_every, save_every
        self.save_seconds = save_minutes * 60
        self.where, self.progress = update.where, Progress()
        for group in update.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def fit(self) -> None:
        """Train up to the last epoch, from wherever the state is.

        Raises:
            Interrupted: a signal came; ``last.pth`` holds the state.
            TrainingError: see :class:`trainers.update.Update`.
        """
        now = self.progress
        with StopSignals() as stop:
            while now.epoch < self.epochs:
                self._epoch(stop)
                last = now.epoch == self.epochs
                if last or now.epoch % self.validate_every == 0:
                    now.score = self.validate(unwrap(self.update.model), now.epoch, now.updates)
                    if now.best is None or now.score > now.best:
                        now.best = now.score
                        self._write(self.checkpoints.save_best)
                if last or now.epoch % self.save_every == 0:
                    self._write(self.checkpoints.save_epoch)
                self._write(self.checkpoints.save_last)
                if not last and any_rank(stop.name is not None, self.where):
                    raise Interrupted(f"{stop.name or 'a signal at another rank'} after epoch {now.epoch}")

    def _epoch(self, stop: StopSignals) -> None:
        """Train the rest of the epoch that is under way."""
        now, steps = self.progress, len(self.loader)
        clock = saved = time.monotonic()
        self.update.model.train()
        with tqdm(
            total=steps,
            initial=now.step,
            desc=f"epoch {now.epoch + 1}/{self.epochs}",
            disable=None if self.where.is_main else True,
            leave=False,
        ) as bar:
            for batch in self.loader.epoch(now.epoch, now.step):
                self._set_rates(self.schedule(now.updates + 1, self.epochs * steps))
                now.loss_sum += self.update(batch)
                now.step, now.updates = now.step + 1, now.updates + 1
                now.seconds, clock = now.seconds + time.monotonic() - clock, time.monotonic()
                bar.set_postfix(loss=f"{now.loss_sum / now.step:.4f}", mDice=_shown(now.score), refresh=False)
                bar.update()
                stopping = any_rank(stop.name is not None, self.where)
                overdue = bool(self.save_seconds) and any_rank(clock - saved > self.save_seconds, self.where)
                if now.step < steps and (stopping or overdue):
                    self._write(self.checkpoints.save_last)
                    saved = time.monotonic()
                    if stopping:
                        raise Interrupted(f"{stop.name or 'a signal at another rank'} at step {now.updates}")
        rates = {f"lr{number}": group["lr"] for number, group in enumerate(self.update.optimizer.param_groups)}
        self.journal.log(now.updates, "train", epoch=now.epoch + 1, loss=now.loss_sum / steps, **rates)
        now.epoch, now.step, now.loss_sum = now.epoch + 1, 0, 0.0

    def _set_rates(self, factor: float) -> None:
        for group in self.update.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor

    def state(self) -> dict[str, Any]:
        """The checkpoint of this moment (see ``trainers/checkpoint.py``); every rank has to call it."""
        return {
            "format": FORMAT,
            "model": unwrap(self.update.model).state_dict(),
            "config": self.config,
            "epoch": self.progress.epoch,
            "score": self.progress.score,
            "training": {
                "optimizer": self.update.optimizer.state_dict(),
                "scaler": self.update.scaler.state_dict(),
                "progress": asdict(self.progress),
                "rng": gather(rng_state(), self.where),
            },
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Go back to the moment of :meth:`state`."""
        training = checkpoint["training"]
        unwrap(self.update.model).load_state_dict(checkpoint["model"])
        self.update.optimizer.load_state_dict(training["optimizer"])
        self.update.scaler.load_state_dict(training["scaler"])
        self.progress = Progress(**training["progress"])
        states = training["rng"]
        restore_rng(states[self.where.rank % len(states)])

    def _write(self, save: Callable[[dict[str, Any]], None]) -> None:
        state = self.state()
        if self.where.is_main:
            save(state)


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.3f}"
