"""Fit a network. On a CPU, a resumed training repeats every later step bit for bit.

The trainer does not know data sets, rules or plots. It needs a loader with reproducible epochs, an update, the
learning-rate factor as a function of the step, and a function that scores the network.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, asdict, dataclass
from typing import Any

from torch import nn
from tqdm import tqdm

from configs.errors import Interrupted, UserError, as_training_error
from trainers.checkpoint import FORMAT, Checkpoints, epoch_of
from trainers.distributed import gather_objects, max_over_ranks, share_buffers, unwrap
from trainers.forward import NonFiniteError
from trainers.journal import Journal
from trainers.reproducibility import restore_rng, rng_state
from trainers.schedules import Schedule
from trainers.update import Update

Validate = Callable[[nn.Module, int, int], float]
_STOP = 2  # votes of a rank: 2 save and stop, 1 save only, 0 neither. The largest vote counts


@dataclass
class Progress:
    """The state of a training."""

    epoch: int = 0  # epochs finished
    step: int = 0  # steps made in the current epoch
    updates: int = 0  # steps made in all
    loss_sum: float = 0.0  # over the steps of this epoch
    seconds: float = 0.0  # spent training, over all restarts
    score: float | None = None  # of the last validation
    best: float | None = None
    best_epoch: int = 0  # the epoch of that score


def last_logged_step(checkpoint: dict[str, Any] | None) -> int:
    """Return the last step whose journal rows belong to a checkpoint.

    The row of an epoch is written before its validation. If the epoch is not finished, that row is dropped.
    """
    if checkpoint is None:
        return 0
    progress = checkpoint["training"]["progress"]
    return progress["updates"] - (progress["step"] > 0)


@dataclass(eq=False)
class Trainer:
    """Train with one update per step, and write checkpoints from which any step can be resumed."""

    update: Update
    schedule: Schedule
    loader: Any  # batches (with ``images``, ``targets``, ``names``) that depend on the epoch and the step only
    validate: Validate  # (model, epoch, updates) -> score, larger is better
    checkpoints: Checkpoints
    journal: Journal
    stored: dict[str, Any]  # what every checkpoint holds besides the training's state: config, classes, data
    _: KW_ONLY
    epochs: int
    validate_every: int = 1  # in epochs; the last one is always validated and saved
    save_every: int = 10
    save_minutes: float = 10.0  # the longest time between two last.pth inside an epoch (0: only at its end)

    def __post_init__(self) -> None:
        self.world, self.progress = self.update.world, Progress()
        self._saved: int | None = None  # `updates` of the state in last.pth
        for group in self.update.optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])

    def fit(self) -> None:
        """Train up to the last epoch, from the current state. After a signal, save the state and raise Interrupted."""
        now = self.progress
        with StopSignals() as stop, as_training_error("training"):
            while now.epoch < self.epochs:
                self._steps(stop)
                self._finish_epoch(stop)
                if now.epoch < self.epochs and max_over_ranks(stop.name is not None, self.world):
                    raise Interrupted(f"{stop.name or 'a signal at another rank'} after epoch {now.epoch}")

    def _steps(self, stop: StopSignals) -> None:
        """Make the remaining steps of this epoch; there are none if the run stopped before or in its validation."""
        now, steps = self.progress, len(self.loader)
        clock = saved = time.monotonic()
        self.update.model.train()
        batches = self._batches(stop) if now.step < steps else ()
        title, hidden = f"epoch {now.epoch + 1}/{self.epochs}", None if self.world.is_main else True
        with tqdm(total=steps, initial=now.step, desc=title, disable=hidden, leave=False) as bar:
            for batch in batches:
                factor = self.schedule(now.updates + 1, self.epochs * steps)
                for group in self.update.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * factor
                now.loss_sum += self.update(batch)
                now.step, now.updates = now.step + 1, now.updates + 1
                now.seconds, clock = now.seconds + time.monotonic() - clock, time.monotonic()
                score = "-" if now.score is None else f"{now.score:.3f}"
                bar.set_postfix(loss=f"{now.loss_sum / now.step:.4f}", mDice=score, refresh=False)
                bar.update()
                overdue = 0 < 60 * self.save_minutes < clock - saved
                if vote := max_over_ranks(_STOP if stop.name else int(overdue), self.world):
                    self._save(self.state())
                    saved = time.monotonic()
                    if vote == _STOP:
                        raise Interrupted(f"{stop.name or 'a signal at another rank'} at step {now.updates}")

    def _batches(self, stop: StopSignals) -> Iterator[Any]:
        """Yield the remaining batches of this epoch; raise Interrupted if a signal also killed the loader."""
        now = self.progress
        try:
            yield from self.loader.epoch(now.epoch, now.step)
        except ChildProcessError:
            if stop.name is None or self.world.size > 1:
                raise
            self._save(self.state())
            raise Interrupted(f"{stop.name} at step {now.updates}") from None

    def _finish_epoch(self, stop: StopSignals) -> None:
        """Log the epoch, score the network, and save. Until then the epoch is not finished."""
        now, epoch = self.progress, self.progress.epoch + 1
        last = epoch == self.epochs
        rates = {f"lr{number}": group["lr"] for number, group in enumerate(self.update.optimizer.param_groups)}
        self.journal.log(now.updates, "train", epoch=epoch, loss=now.loss_sum / now.step, **rates)
        score = self._score(epoch, stop) if last or epoch % self.validate_every == 0 else None
        now.epoch, now.step, now.loss_sum = epoch, 0, 0.0
        if score is not None:
            now.score = score
            if now.best is None or score > now.best:
                now.best, now.best_epoch = score, epoch
        state = self.state()
        if self.world.is_main:
            self.checkpoints.save_last(state)
            self.complete(state)

    def complete(self, state: dict[str, Any], missing_only: bool = False) -> None:
        """Write ``best_model.pth`` and ``checkpoint-epochN.pth`` if they are due at the end of this epoch.

        ``last.pth`` is written before them. After a run was killed in between, ``missing_only`` writes only the
        missing files.
        """
        now, files = Progress(**state["training"]["progress"]), self.checkpoints
        if now.step or not now.epoch:
            return
        if now.best_epoch == now.epoch and not (missing_only and epoch_of(files.best) == now.epoch):
            files.save_best(state)
        due = now.epoch == self.epochs or now.epoch % self.save_every == 0
        if due and not (missing_only and files.epoch_file(now.epoch).exists()):
            files.save_epoch(state)

    def _score(self, epoch: int, stop: StopSignals) -> float:
        """Validate without changing the random generators. In a single process, a signal stops it at once.

        If it fails, the state before it is saved, so that a new start repeats the validation and no step is lost.
        """
        network, random = unwrap(self.update.model), rng_state()
        share_buffers(network, self.world)
        state = self.state()  # refers to the tensors; after a failure at one rank, no rank could gather it
        try:
            with stop.interrupt_at_once(self.world.size == 1), as_training_error("validating"):
                return self.validate(network, epoch, self.progress.updates)
        except Interrupted:
            self._save(state)
            raise Interrupted(f"{stop.name} in the validation after epoch {epoch}") from None
        except NonFiniteError:  # the network has diverged: the last checkpoint is the better state
            raise
        except Exception:  # a damaged image, a bug in a rule, out of memory
            self._save(state)
            raise
        finally:
            restore_rng(random)

    def state(self) -> dict[str, Any]:
        """Return the content of a checkpoint (see ``trainers/checkpoint.py``); every rank must call it."""
        return {
            "format": FORMAT,
            "model": unwrap(self.update.model).state_dict(),
            **self.stored,
            "epoch": self.progress.epoch,
            "score": self.progress.score,
            "training": {
                "optimizer": self.update.optimizer.state_dict(),
                "scaler": self.update.scaler.state_dict(),
                "progress": asdict(self.progress),
                "rng": gather_objects(rng_state(), self.world),
            },
        }

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Restore the result of :meth:`state`, without the weights of the network, which the caller loads.

        Raises UserError if the state does not fit this training.
        """
        training = checkpoint["training"]
        try:
            self.update.optimizer.load_state_dict(training["optimizer"])
            self.update.scaler.load_state_dict(training["scaler"])
            self.progress = Progress(**training["progress"])
            self._saved = self.progress.updates
            states = training["rng"]
            restore_rng(states[self.world.rank % len(states)])
        except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"the state in the checkpoint does not fit this training: {error}. "
                "Fix: start over with resume=false, or give this run a name of its own with suffix=-NAME."
            ) from error

    def _save(self, state: dict[str, Any]) -> None:
        """Write ``last.pth``, unless it holds the state after this step: ``previous.pth`` then stays an older one."""
        if self.world.is_main and self._saved != self.progress.updates:
            self.checkpoints.save_last(state)
            self._saved = self.progress.updates


class StopSignals:
    """Record SIGTERM, SIGINT and SIGUSR2 (pre-emption) in ``name``, so that a run can stop after the current step.

    A SIGINT after another signal stops at once. SIGUSR1 is not handled, because NCCL uses it. Outside the main thread
    Python forbids handlers, and no signal is recorded. If the block ends with Interrupted, the previous handler
    receives the signal; that of submitit puts the job back into the queue.
    """

    CAUGHT = tuple(
        getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR2") if hasattr(signal, name)
    )  # Windows has no SIGUSR2

    def __init__(self) -> None:
        self.name: str | None = None
        self._at_once, self._process = False, os.getpid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.CAUGHT:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if kind is Interrupted and self.name is not None:
            number = signal.Signals[self.name]
            if self._before[number] not in (signal.SIG_DFL, signal.SIG_IGN, signal.default_int_handler, None):
                signal.raise_signal(number)

    @contextlib.contextmanager
    def interrupt_at_once(self, enabled: bool) -> Iterator[None]:
        """Raise Interrupted as soon as a signal arrives: for validation, which can be repeated."""
        self._at_once = enabled
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a loader process that has just started
            if number == signal.SIGTERM:  # the parent is ending and waits for it
                os._exit(0)
            return
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._at_once:
            raise Interrupted(self.name)
