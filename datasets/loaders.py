"""Seeded, resumable, sharded loading: batches are a function of the seed, the epoch and the index of an image.

They do not depend on the number of workers or on the step at which an epoch is resumed. The random state of the caller
does not change.

Shapes: N images of a batch, H and W pixels.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import math
import multiprocessing
import multiprocessing.process
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from configs.errors import UserError

from .base import DatasetError, Sample, SegmentationDataset

NO_EPOCH = -1  # evaluation draws nothing at random
POLL = 1.0  # seconds between two looks at the workers while a batch is waited for
PATIENCE = 10.0  # seconds after `timeout` for a batch that a worker has started to hand over
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """Images of one size, with their targets."""

    images: Tensor  # (N, 3, H, W) float32, normalised
    targets: Tensor  # (N, H', W') int64; H', W' differ from H, W only in evaluation
    names: list[str]
    indices: list[int]


Key = tuple[int, int]  # epoch and index of the image that a worker is asked for
Fault = tuple[str, str]  # name of an image that could not be read, and why


def seed_of(*parts: int) -> int:
    """Return a seed made from a few integers, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


class Reader(Dataset):
    """Read and transform one image per key, each with its own random numbers."""

    def __init__(self, dataset: SegmentationDataset, transform: Transform, seed: int, substitute: bool) -> None:
        self.dataset, self.transform, self.seed, self.substitute = dataset, transform, seed, substitute

    def __getitem__(self, key: Key) -> tuple[int, Sample | None, list[Fault]]:
        """Return index, sample and faults of a key. Any error but DatasetError is a bug, and is raised.

        With `substitute`, the next readable image replaces one that cannot be read.
        """
        (epoch, first), total, faults = key, len(self.dataset), list[Fault]()
        for step in range(total if self.substitute else 1):
            index = (first + step) % total
            name = self.dataset.names[index]
            try:
                return index, self.sample(epoch, index, name), faults
            except DatasetError as error:
                faults.append((name, str(error)))
        return first, None, faults

    def sample(self, epoch: int, index: int, name: str) -> Sample:
        image, mask = self.dataset.read(index)
        # torch.manual_seed would seed the accelerators too, and with them the network's dropout.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed_of(self.seed, epoch, index))
            return Sample(*self.transform(image, mask), name)


def collate(loaded: list[tuple[int, Sample | None, list[Fault]]]) -> tuple[list[Batch], list[Fault]]:
    """Return the samples as batches of one size each, in order, and the faults."""
    found = [(sample, index) for index, sample, _ in loaded if sample is not None]
    batches = []
    for _, run in itertools.groupby(found, key=lambda pair: (pair[0].image.shape, pair[0].target.shape)):
        samples, indices = zip(*run, strict=True)
        images, targets, names = zip(*samples, strict=True)
        batches.append(Batch(torch.stack(images), torch.stack(targets), list(names), list(indices)))
    return batches, [fault for _, _, faults in loaded for fault in faults]


class Loader:
    """What training and evaluation share: workers, their failures, and the list of skipped images."""

    substitutes = False  # whether the next readable image replaces a skipped one

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        batch_size: int,
        seed: int = 0,  # of the order and of the augmentation
        *,
        num_workers: int = 0,
        rank: int = 0,  # the number of this process among `world_size`
        world_size: int = 1,
        pin_memory: bool = False,
        on_error: str = "raise",  # or "skip" images that cannot be read, and list them in `skipped`
        timeout: float = 300,  # seconds until a worker counts as frozen; 0 waits for ever
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise UserError(f"batch_size={batch_size}, num_workers={num_workers} are invalid: expected >= 1 and >= 0")
        if not 0 <= rank < world_size:
            raise UserError(f"rank={rank} is invalid: expected 0..{world_size - 1}")
        if on_error not in ("raise", "skip"):
            raise UserError(f"on_error={on_error!r} is invalid: expected raise or skip")
        self.dataset, self.transform, self.batch_size, self.seed = dataset, transform, batch_size, seed
        self.rank, self.world_size, self.on_error, self.timeout = rank, world_size, on_error, timeout
        self.num_workers = num_workers
        self.skipped: dict[str, str] = {}  # name -> why it was skipped
        self._workers: list[multiprocessing.process.BaseProcess] = []  # empty until the first batch
        self._plan: list[list[Key]] = []  # the keys of the next epoch, batch by batch
        self._loader: DataLoader = DataLoader(
            Reader(dataset, transform, seed, self.substitutes and on_error == "skip"),
            batch_sampler=self._plan,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            timeout=timeout if num_workers else 0,
            worker_init_fn=_hide_lost_connections if num_workers else None,
            generator=torch.Generator().manual_seed(seed_of(seed)),  # otherwise the global one is drawn from
        )

    def _batches(self, plan: list[list[Key]]) -> Iterator[Batch]:
        """Yield the planned batches, split where sizes change; raise ChildProcessError if a worker died or froze."""
        self._plan[:] = plan
        if not self.num_workers:
            for batches, faults in self._loader:
                self._note(faults)
                yield from batches
            return
        # A thread waits for the workers: one that is frozen while it hands over a tensor blocks the waiting thread.
        try:
            if self._workers:
                iterator = self._result(_in_thread(iter, self._loader))
            else:  # in the main thread: otherwise torch does not watch its workers
                others = multiprocessing.active_children()
                with _hide_lost_workers():
                    iterator = iter(self._loader)
                self._workers = [p for p in multiprocessing.active_children() if p not in others]
            while True:
                batches, faults = self._result(_in_thread(next, iterator, (None, [])))
                if batches is None:
                    return
                self._note(faults)
                yield from batches
        except (RuntimeError, ConnectionError, EOFError, NoAnswer) as error:
            if not _is_lost_worker(error):
                raise
            _kill_workers()
            raise ChildProcessError(
                f"a loader process died, or gave no batch for {self.timeout:g} s ({_first_line(error)}). "
                "Fix: check whether memory or /dev/shm ran out, or set num_workers=0"
            ) from None

    def _result(self, future: Future) -> Any:
        """Wait for the thread's answer; raise NoAnswer after the timeout, or as soon as a worker is dead.

        torch reports a death by an exception in the main thread. It is lost if it arrives where Python ignores
        exceptions, as in a callback after a fork.
        """
        limit = time.monotonic() + self.timeout + PATIENCE if self.timeout else math.inf
        while True:
            try:
                return future.result(POLL)
            except NoAnswer:
                if future.done():
                    continue
                dead = [worker for worker in self._workers if not worker.is_alive()]
                if dead:
                    raise NoAnswer(f"DataLoader worker (pid {dead[0].pid}) ended") from None
                if time.monotonic() > limit:
                    raise

    def _note(self, faults: list[Fault]) -> None:
        if faults and self.on_error == "raise":
            raise DatasetError(faults[0][1])
        self.skipped.update(faults)
        if faults and len(self.skipped) == len(self.dataset):
            raise DatasetError(f"no image of {self.dataset.info.name} can be read: {faults[0][1]}")


class TrainLoader(Loader):
    """Shuffled, augmented batches for training.

    `batch_size` counts the images of all processes together; each process gets its slice of every batch. `drop_last`
    leaves out a last batch that is smaller. Further options are those of `Loader`.
    """

    substitutes = True

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        batch_size: int,
        seed: int,
        *,
        drop_last: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dataset, transform, batch_size, seed, **options)
        total = len(dataset)
        self._sizes = [min(batch_size, total - start) for start in range(0, total, batch_size)]
        if drop_last and self._sizes[-1] < batch_size:
            self._sizes.pop()
        if not self._sizes or self._sizes[-1] < self.world_size:
            raise UserError(
                f"batch_size={batch_size} is invalid: {total} images leave a last batch of {total % batch_size} for "
                f"{self.world_size} processes. Fix: choose another batch_size, or drop_last if another batch remains"
            )

    def __len__(self) -> int:
        return len(self._sizes)

    def order(self, epoch: int) -> list[int]:
        """Return the indices in the order of an epoch, a function of the seed and the epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's part of an epoch's batches, from `start_step`; nothing before it is read.

        Raises DatasetError if images cannot be read, or if their sizes differ and there is no crop.
        """
        order, plan, start = self.order(epoch), [], 0
        for size in self._sizes:
            first, last = (start + size * k // self.world_size for k in (self.rank, self.rank + 1))
            plan.append([(epoch, index) for index in order[first:last]])
            start += size
        plan = plan[start_step:]
        for keys, batch in zip(plan, self._batches(plan), strict=True):
            if len(batch.names) < len(keys):
                raise DatasetError(
                    f"images of different sizes in a batch, such as {batch.names[0]}. Fix: set dataset.crop"
                )
            yield batch


class EvalLoader(Loader):
    """Every image once, in order. Rank r has the batches r, r + world_size, ... without padding.

    The batches are those of a single process, because convolutions round differently in batches of another size.
    All images and targets of a batch have one size: a batch ends early when the size changes.
    """

    def _shares(self) -> list[range]:
        """Return the images of each batch of this process."""
        size, total = self.batch_size, len(self.dataset)
        starts = range(self.rank * size, total, self.world_size * size)
        return [range(start, min(start + size, total)) for start in starts]

    @property
    def num_images(self) -> int:
        """The number of images of this process. The number of batches depends on their sizes."""
        return sum(map(len, self._shares()))

    def __iter__(self) -> Iterator[Batch]:
        yield from self._batches([[(NO_EPOCH, index) for index in share] for share in self._shares()])


# ---------------------------------------------------------------------------------------------------------------------
# Failures of worker processes


def _hide_lost_connections(_worker: int) -> None:
    """In a worker, print no traceback if the parent ends the connection, as it does when it fails.

    Faults of images are raised in the parent; only threads of multiprocessing print here.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            shown(kind, error, trace)

    sys.excepthook = hook


def _in_thread(function: Callable[..., Any], *args: Any) -> Future:
    """Call a function in a thread for which nobody waits at exit: it may be blocked for as long as `loader_timeout`."""
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="batches", daemon=True).start()
    return future


@contextlib.contextmanager
def _hide_lost_workers() -> Iterator[None]:
    """Print no traceback if torch reports a dead worker where Python ignores exceptions: `_result` notices it."""
    shown = sys.unraisablehook

    def hook(found: sys.UnraisableHookArgs) -> None:
        error = found.exc_value
        if not (isinstance(error, RuntimeError) and _is_lost_worker(error)):
            shown(found)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = shown


def _is_lost_worker(error: Exception) -> bool:
    """Return whether an error reports a dead or silent worker.

    A worker can be killed while the parent fetches a tensor from it over a connection. An error inside a worker is
    different: its message begins with "Caught ... in DataLoader worker process".
    """
    text = _first_line(error)
    return text.startswith("DataLoader") if isinstance(error, RuntimeError) else not text.startswith("Caught ")


def _kill_workers() -> None:
    """Kill the workers that are left: one that missed a SIGTERM would be waited for at exit.

    torch raises RuntimeError in its handler of SIGCHLD when they end, here or while `join` waits.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            with contextlib.suppress(RuntimeError):
                process.kill()
                process.join(5)
            with contextlib.suppress(RuntimeError):
                process.join(5)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
