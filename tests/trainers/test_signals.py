"""Signals: noted between steps, at once during validation, handed on to whoever puts the job back into a queue."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from configs.errors import Interrupted, TrainingError, UserError
from tests.trainers.forked import start
from trainers.checkpoint import Checkpoints, epoch_of
from trainers.distributed import World
from trainers.forward import NonFiniteError
from trainers.journal import Journal, read_rows
from trainers.trainer import StopSignals, Trainer
from trainers.update import Update

ALONE = World(0, 1, torch.device("cpu"))
EPOCHS, STEPS = 3, 4


class Net(nn.Module):
    """BatchNorm and dropout: buffers and a random generator that a resumed run has to find again."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1)
        )

    def forward(self, images: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.layers(images), aux=None)


class Loader:
    """Batches by epoch and step; a signal or a failure comes with one of them."""

    def __init__(self, at: int = -1, event: Any = signal.SIGTERM) -> None:
        self.at, self.event = at, event

    def __len__(self) -> int:
        return STEPS

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
        for step in range(start_step, STEPS):
            if epoch * STEPS + step == self.at:
                if isinstance(self.event, Exception):
                    raise self.event
                os.kill(os.getpid(), self.event)
            generator = torch.Generator().manual_seed(epoch * STEPS + step)
            images = torch.randn(4, 3, 6, 6, generator=generator)
            yield SimpleNamespace(images=images, targets=(images[:, 0, 1:-1, 1:-1] > 0).long(), names=["a"])


def trainer(
    folder: Path, loader: Loader, signal_in_validation: int = -1, error: Exception | None = None, **options: Any
) -> Trainer:
    """Build everything again, as a new process does, and restore a checkpoint if there is one."""
    torch.manual_seed(0)
    net = Net()
    checkpoints = Checkpoints(folder, lambda path: torch.load(path, weights_only=True))
    found = checkpoints.newest()
    progress = found["training"]["progress"] if found else {"updates": 0, "step": 0}
    journal = Journal(folder, progress["updates"] - (progress["step"] > 0), tensorboard=False)

    def validate(model: nn.Module, epoch: int, updates: int) -> float:
        torch.rand(7)  # validation may draw random numbers: training continues as if it had not
        if epoch == signal_in_validation:
            journal.log(updates, "val_T", epoch=epoch, score=-1.0)
            if error:
                raise error
            os.kill(os.getpid(), signal.SIGUSR2)
        score = float(sum(p.detach().sum() for p in model.parameters()))
        journal.log(updates, "val_T", epoch=epoch, score=score)
        return score

    update = Update(net, nn.CrossEntropyLoss(), torch.optim.Adam(net.parameters(), 0.01), ALONE)
    made = Trainer(update, lambda k, n: 1 - k / n, loader, validate, checkpoints, journal, {}, epochs=EPOCHS, **options)
    if found:
        net.load_state_dict(found["model"])
        made.restore(found)
        made.complete(found, missing_only=True)
    return made


def result(made: Trainer, folder: Path) -> tuple[Any, ...]:
    state = made.update.model.state_dict()
    progress = {k: v for k, v in vars(made.progress).items() if k != "seconds"}
    return {k: v.tolist() for k, v in state.items()}, progress, read_rows(folder / "metrics.jsonl")


@pytest.fixture
def whole(tmp_path: Path) -> tuple[Any, ...]:
    made = trainer(tmp_path / "whole", Loader())
    made.fit()
    return result(made, tmp_path / "whole")


def test_stopped_at_every_single_step_the_end_is_the_same(whole: tuple[Any, ...], tmp_path: Path) -> None:
    for at in range(EPOCHS * STEPS):
        folder = tmp_path / f"at{at}"
        with pytest.raises(Interrupted, match=f"SIGTERM at step {at + 1}"):
            trainer(folder, Loader(at)).fit()
        resumed = trainer(folder, Loader())
        assert resumed.progress.updates == at + 1
        resumed.fit()
        assert result(resumed, folder) == whole, f"stopped at step {at}"


def die_at(folder: Path, call: int, after: bool) -> None:
    """Train, and end without a trace at a rename of a file, before or after it."""
    multiprocessing.set_start_method("fork", force=True)  # else the semaphore of tqdm outlives os._exit
    replace, calls = os.replace, 0

    def dying(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == call and not after:
            os._exit(9)
        replace(source, target)
        if calls == call:
            os._exit(9)

    os.replace = dying
    trainer(folder, Loader(), save_every=1).fit()
    os._exit(0)


def test_killed_between_any_two_files_the_end_is_the_same(tmp_path: Path) -> None:
    """After every rename there is a last.pth; a run that counts as finished has all its files."""

    def files(folder: Path) -> dict[str, int]:
        return {path.name: epoch_of(path) for path in folder.glob("*.pth")}

    made = trainer(tmp_path / "whole", Loader(), save_every=1)
    made.fit()
    whole, expected = result(made, tmp_path / "whole"), files(tmp_path / "whole")
    for call in range(1, 100):
        for after in (False, True):
            folder = tmp_path / f"{call}{after}"
            process = start(die_at, folder, call, after)
            process.join()
            resumed = trainer(folder, Loader(), save_every=1)
            resumed.fit()
            found = files(folder)
            assert result(resumed, folder) == whole, (call, after)
            assert {**found, "previous.pth": 2} == expected, (call, after)
        if process.exitcode == 0:
            break
    assert call > 10 and expected["last.pth"] == EPOCHS


@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_a_signal_ends_a_validation_at_once(epoch: int, whole: tuple[Any, ...], tmp_path: Path) -> None:
    with pytest.raises(Interrupted, match=f"SIGUSR2 in the validation after epoch {epoch}"):
        trainer(tmp_path, Loader(), signal_in_validation=epoch).fit()
    assert read_rows(tmp_path / "metrics.jsonl")[-1]["score"] == -1
    resumed = trainer(tmp_path, Loader())
    resumed.fit()
    assert result(resumed, tmp_path) == whole


@pytest.mark.parametrize("epoch", range(1, EPOCHS + 1))
def test_a_validation_that_fails_loses_no_step(epoch: int, whole: tuple[Any, ...], tmp_path: Path) -> None:
    """A second failure of the same validation writes no file again, so that previous.pth stays an older state."""
    for error in (UserError("case7.jpg is damaged"), KeyError("a bug in a rule")):
        with pytest.raises(type(error)) as caught:
            trainer(tmp_path, Loader(), signal_in_validation=epoch, error=error).fit()
        assert caught.value is error
        steps = [torch.load(path)["training"]["progress"]["step"] for path in sorted(tmp_path.glob("[lp]*.pth"))]
        assert steps == [STEPS, 0][: min(epoch, 2)]  # last.pth, previous.pth
    resumed = trainer(tmp_path, Loader())
    assert resumed.progress.updates == epoch * STEPS
    resumed.fit()
    assert result(resumed, tmp_path) == whole


def test_a_network_that_diverged_does_not_replace_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError):
        trainer(tmp_path, Loader(), signal_in_validation=2, error=NonFiniteError("NaN")).fit()
    assert trainer(tmp_path, Loader()).progress.updates == STEPS


def test_the_state_before_a_validation_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written, save = list[int](), Checkpoints.save_last
    monkeypatch.setattr(Checkpoints, "save_last", lambda *given: written.append(1) or save(*given))
    trainer(tmp_path / "whole", Loader()).fit()
    assert len(written) == EPOCHS
    with pytest.raises(KeyError):
        trainer(tmp_path, Loader(), 1, KeyError("bug"), save_minutes=1e-9).fit()
    assert len(written) == EPOCHS + STEPS  # the last step of the epoch was saved before


def test_the_validation_is_not_repeated_where_it_was_done(whole: tuple[Any, ...], tmp_path: Path) -> None:
    made = trainer(tmp_path, Loader(), save_every=1)
    made.fit()
    assert result(made, tmp_path) == whole
    (tmp_path / "last.pth").unlink()
    (tmp_path / "previous.pth").unlink()
    (tmp_path / "checkpoint-epoch3.pth").unlink()
    resumed = trainer(tmp_path, Loader(), save_every=1)
    assert resumed.progress.epoch == 2 and resumed.progress.step == 0
    resumed.fit()
    assert result(resumed, tmp_path) == whole


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ChildProcessError("a loader process died, or gave nothing for 300 s (x): set num_workers=0"),
            "gave nothing for 300 s",
        ),
        (RuntimeError("[../gloo/tcp/pair.cc:525] Connection closed by peer [127.0.0.1]:3"), "another process"),
        (RuntimeError("CUDA error: out of memory"), "smaller batch_size"),
        (
            RuntimeError("unable to allocate shared memory(shm) for file </torch_7>: No space left on device (28)"),
            "--shm",
        ),
    ],
)
def test_failures_of_the_surroundings_are_one_line(error: Exception, words: str, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=words) as caught:
        trainer(tmp_path, Loader(5, error), save_minutes=1e-9).fit()
    assert "\n" not in str(caught.value)
    assert trainer(tmp_path, Loader()).progress.updates == 5


def test_a_batch_of_one_value_says_what_to_enlarge(tmp_path: Path) -> None:
    error = ValueError("Expected more than 1 value per channel when training, got input size [1, 4, 1, 1]")
    with pytest.raises(ValueError, match=r"BatchNorm sees a single value .*dataset\.crop"):
        trainer(tmp_path, Loader(5, error)).fit()
    with pytest.raises(ValueError, match="another"):
        trainer(tmp_path, Loader(5, ValueError("another"))).fit()


def test_a_signal_to_all_processes_of_the_job_is_an_interruption(whole: tuple[Any, ...], tmp_path: Path) -> None:
    """The loader's processes die of it: no next batch, but the state of this moment, and code 75."""

    class Job(Loader):
        def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Any]:
            for step, batch in enumerate(super().epoch(epoch, start_step), start_step):
                if epoch * STEPS + step == 6:
                    os.kill(os.getpid(), signal.SIGTERM)
                    raise ChildProcessError("a loader process died")
                yield batch

    with pytest.raises(Interrupted, match="SIGTERM at step 6"):
        trainer(tmp_path, Job()).fit()
    resumed = trainer(tmp_path, Loader())
    assert resumed.progress.updates == 6
    resumed.fit()
    assert result(resumed, tmp_path) == whole


def test_a_process_that_was_only_just_started_can_be_ended() -> None:
    """It still has the handlers of the training, which would wait for it for ever."""
    ready, says_so = os.pipe()
    with StopSignals():
        child = os.fork()
        if child == 0:
            os.write(says_so, b"!")
            time.sleep(60)
            os._exit(1)
        os.read(ready, 1)
        os.kill(child, signal.SIGUSR2)  # not for it
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 0


def test_the_handler_that_was_there_gets_the_signal_once_the_state_is_saved() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: heard.append(number))
    try:
        with pytest.raises(Interrupted), StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            assert stop.name == "SIGUSR2" and not heard
            raise Interrupted(stop.name)
        assert heard == [signal.SIGUSR2]
        with StopSignals():
            os.kill(os.getpid(), signal.SIGUSR2)  # too late: training came to its end by itself
        assert heard == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_ctrl_c_stops_at_once_and_handlers_are_put_back() -> None:
    before = [signal.getsignal(number) for number in StopSignals.CAUGHT]
    with pytest.raises(KeyboardInterrupt), StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGINT"
        os.kill(os.getpid(), signal.SIGINT)
    assert [signal.getsignal(number) for number in StopSignals.CAUGHT] == before


def test_a_sweep_ends_at_a_signal() -> None:
    assert not issubclass(Interrupted, Exception)  # Hydra records an Exception and starts the next run
