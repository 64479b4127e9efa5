"""Fitting a network, from a state out of which every later step can be repeated bit for bit.

The trainer knows nothing of data sets, rules or plots. It is given a loader whose epochs are reproducible, an
update, the learning-rate factor as a function of the step, and a function that scores the network.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import nn
from tqdm import tqdm

from configs.errors import Interrupted
from trainers.checkpoint import FORMAT, Checkpoints
from trainers.distributed import gather, highest, share_buffers, unwrap
from trainers.errors import StopSignals, explained
from trainers.journal import Journal
from trainers.reproducibility import restore_rng, rng_state
from trainers.schedules import Schedule
from trainers.update import Update

Validate = Callable[[nn.Module, int, int], float]
_STOP = 2  # a vote that outweighs that for a checkpoint, 1
_LESS = "use a smaller batch_size or dataset.resize, or trainer.precision=bf16"


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
            TrainingError: see :class:`trainers.update.Update`; a failure of the loader or of validation.
        """
        now = self.progress
        with StopSignals() as stop, explained("training", _LESS):
            while now.epoch < self.epochs:
                self._steps(stop)
                self._finish_epoch(stop)
                if now.epoch < self.epochs and highest(stop.name is not None, self.where):
                    raise Interrupted(f"{stop.name or 'a signal at another rank'} after epoch {now.epoch}")

    def _steps(self, stop: StopSignals) -> None:
        """Make the steps of this epoch that are left; none where a run stopped before its validation."""
        now, steps = self.progress, len(self.loader)
        clock = saved = time.monotonic()
        self.update.model.train()
        batches = self._batches(stop) if now.step < steps else ()
        title, hidden = f"epoch {now.epoch + 1}/{self.epochs}", None if self.where.is_main else True
        with tqdm(total=steps, initial=now.step, desc=title, disable=hidden, leave=False) as bar:
            for batch in batches:
                self._set_rates(self.schedule(now.updates + 1, self.epochs * steps))
                now.loss_sum += self.update(batch)
                now.step, now.updates = now.step + 1, now.updates + 1
                now.seconds, clock = now.seconds + time.monotonic() - clock, time.monotonic()
                bar.set_postfix(loss=f"{now.loss_sum / now.step:.4f}", mDice=_shown(now.score), refresh=False)
                bar.update()
                overdue = bool(self.save_seconds) and clock - saved > self.save_seconds
                if vote := highest(_STOP if stop.name else int(overdue), self.where):
                    self._write(self.checkpoints.save_last)
                    saved = time.monotonic()
                    if vote == _STOP:
                        raise Interrupted(f"{stop.name or 'a signal at another rank'} at step {now.updates}")

    def _batches(self, stop: StopSignals) -> Iterator[Any]:
        """The batches left of this epoch, up to a signal to the whole job, of which the loader dies as well."""
        now = self.progress
        try:
            yield from self.loader.epoch(now.epoch, now.step)
        except ChildProcessError:
            if stop.name is None or self.where.size > 1:
                raise
            self._write(self.checkpoints.save_last)
            raise Interrupted(f"{stop.name} at step {now.updates}") from None

    def _finish_epoch(self, stop: StopSignals) -> None:
        """Note the epoch, score the network, and save; until then the epoch counts as unfinished."""
        now, epoch = self.progress, self.progress.epoch + 1
        last = epoch == self.epochs
        rates = {
            f"lr{number}": group["lr"] for number, group in enumerate(self.update.optimizer.param_groups)
        }
        self.journal.log(now.updates, "train", epoch=epoch, loss=now.loss_sum / now.step, **rates)
        score = self._score(epoch, stop) if last or epoch % self.validate_every == 0 else None
        now.epoch, now.step, now.loss_sum = epoch, 0, 0.0
        if score is not None:
            now.score = score
            if now.best is None or score > now.best:
                now.best = score
                self._write(self.checkpoints.save_best)
        if last or epoch % self.save_every == 0:
            self._write(self.checkpoints.save_epoch)
        self._write(self.checkpoints.save_last)

    def _score(self, epoch: int, stop: StopSignals) -> float:
        """Validate, leaving the random generators as they were; alone, a signal ends it at once."""
        network, random = unwrap(self.update.model), rng_state()
        share_buffers(network, self.where)
        try:
            with stop.at_once(self.where.size == 1), explained("validating", _LESS):
                return self.validate(network, epoch, self.progress.updates)
        except Interrupted:
            restore_rng(random)
            self._write(self.checkpoints.save_last)
            raise Interrupted(f"{stop.name} in the validation after epoch {epoch}") from None
        finally:
            restore_rng(random)

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
