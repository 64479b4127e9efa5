"""Seeded, resumable, sharded loading: batches are a function of the seed, the epoch and the index of an image.

They do not depend on the number of workers or on the step at which an epoch is resumed. The random state of the caller
does not change.

Shapes: N images of a batch, H and W pixels.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import multiprocessing
import multiprocessing.util
import os
import pickle
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError

from .base import DatasetError, SegmentationDataset

NO_EPOCH = -1  # the epoch of evaluation, which uses no random numbers
Transform = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Batch(NamedTuple):
    """Images of one size, with their targets."""

    images: Tensor  # (N, 3, H, W) float32, normalised
    targets: Tensor  # (N, H', W') int64; H', W' differ from H, W only in evaluation
    names: list[str]
    indices: list[int]


Key = tuple[int, int]  # epoch and index of the image that a worker is asked for
Fault = tuple[str, str]  # name of an image that could not be read, and why
Loaded = tuple[list[Batch], list[Fault]]


def derive_seed(*parts: object) -> int:
    """Return a seed made from numbers and words, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:7], "big")


class Reader:
    """Read and transform images by key, each with its own random numbers."""

    def __init__(self, dataset: SegmentationDataset, transform: Transform, seed: int, substitute: bool) -> None:
        self.dataset, self.transform, self.seed, self.substitute = dataset, transform, seed, substitute

    def load(self, keys: list[Key], stack: Callable[[tuple[Tensor, ...]], Tensor] = torch.stack) -> Loaded:
        """Return the images of the keys as batches of one size each, in order, and the faults.

        With `substitute`, the next readable image replaces one that cannot be read. Any error but DatasetError is a
        bug, and is raised.
        """
        faults: list[Fault] = []
        samples = [found for epoch, first in keys if (found := self._read(epoch, first, faults))]
        batches = []
        for _, same_size in itertools.groupby(samples, key=lambda found: (found[0].shape, found[1].shape)):
            images, targets, names, indices = zip(*same_size, strict=True)
            batches.append(Batch(stack(images), stack(targets), list(names), list(indices)))
        return batches, faults

    def _read(self, epoch: int, first: int, faults: list[Fault]) -> tuple[Tensor, Tensor, str, int] | None:
        total = len(self.dataset)
        for step in range(total if self.substitute else 1):
            index = (first + step) % total
            name = self.dataset.names[index]
            try:
                image, mask = self.dataset.read(index)
                # torch.manual_seed would seed the accelerators too, and with them the network's dropout.
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(derive_seed(self.seed, epoch, index))
                    return *self.transform(image, mask), name, index
            except DatasetError as error:
                faults.append((name, str(error)))
        return None


class Loader:
    """Base class of the loaders: it runs the workers, reports their failures, and lists the skipped images."""

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
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self.skipped: dict[str, str] = {}  # name -> why it was skipped
        self._reader = Reader(dataset, transform, seed, self.substitutes and on_error == "skip")
        self._pools: dict[int, ProcessPoolExecutor] = {}  # of each process that has asked for a batch: it may fork

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_pools": {}}  # a copy starts its own workers

    def _batches(self, plan: list[list[Key]]) -> Iterator[Batch]:
        """Yield the planned batches, split where sizes change."""
        for batches, faults in self._in_workers(plan) if self.num_workers else (self._reader.load(k) for k in plan):
            if faults and self.on_error == "raise":
                raise DatasetError(faults[0][1])
            self.skipped.update(faults)
            if faults and len(self.skipped) == len(self.dataset):
                raise DatasetError(f"no image of {self.dataset.info.name} can be read: {faults[0][1]}")
            for batch in batches:
                if self.pin_memory:
                    batch = batch._replace(images=batch.images.pin_memory(), targets=batch.targets.pin_memory())
                yield batch

    def _in_workers(self, plan: list[list[Key]]) -> Iterator[Loaded]:
        """Yield what worker processes load for the plan; raise ChildProcessError if one died or froze."""
        pool = self._pools.get(os.getpid()) or self._start_pool()
        remaining, pending = iter(plan), deque[Future]()
        try:
            while True:
                more = itertools.islice(remaining, 2 * self.num_workers - len(pending))
                pending.extend(pool.submit(_load, batch) for batch in more)
                if not pending:
                    return
                future = pending.popleft()
                yield future.result(self.timeout or None)
        except (BrokenProcessPool, FutureTimeout) as error:
            if isinstance(error, FutureTimeout) and future.done() and future.exception() is error:
                raise  # a TimeoutError of the data set
            _kill_workers(pool)
            self._pools.clear()
            raise ChildProcessError(
                f"a loader process died, or gave no batch for {self.timeout:g} s. "
                "Fix: check whether memory, /dev/shm or open files (ulimit -n) ran out, or set num_workers=0"
            ) from None

    def _start_pool(self) -> ProcessPoolExecutor:
        context = copy.copy(multiprocessing.get_context())
        # Daemons end with this process, even if a signal interrupts their start and the pool does not know them.
        context.Process = functools.partial(context.Process, daemon=True)  # type: ignore
        pool = ProcessPoolExecutor(self.num_workers, context, _start_worker, (self._reader,))
        # At exit, a pool waits for its workers, for ever if one hangs. So they are killed before: by the first line
        # in a process that multiprocessing started, by the second one in any other.
        end = multiprocessing.util.Finalize(self, _kill_workers, (pool,), exitpriority=100)
        threading._register_atexit(end)  # type: ignore[attr-defined]
        self._pools[os.getpid()] = pool
        return pool


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
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
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
    """Every image of a data set once, in order. Rank r has the batches r, r + world_size, ... without padding.

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
# Worker processes

_reader: Reader  # of this worker


def _start_worker(reader: Reader) -> None:
    """Prepare a worker. It exits with its parent. Only the parent handles Ctrl-C and reports lost connections."""
    global _reader
    _reader = reader
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    sys.excepthook = _hide_lost_connection
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _load(keys: list[Key]) -> Loaded:
    try:
        return _reader.load(keys, _stack)
    except SystemExit as error:  # it would end the parent without a message
        raise RuntimeError(f"a loader process called sys.exit({error})") from error
    except BaseException as error:
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error that cannot be pickled would look like a dead worker
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        raise


def _stack(tensors: tuple[Tensor, ...]) -> Tensor:
    """Stack in shared memory, so that a batch is not copied again when it is sent."""
    first, count = tensors[0], len(tensors)
    memory = torch.UntypedStorage._new_shared(count * first.nbytes)
    return torch.stack(tensors, out=torch.empty(0, dtype=first.dtype).set_(memory).view(count, *first.shape))


def _hide_lost_connection(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print the error of a thread, but not if the parent ended its connection, as it does when it fails."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, trace)


def _end_with_parent() -> None:
    parent, started_by = multiprocessing.parent_process(), os.getppid()
    assert parent is not None
    # A forked process may hold the connection that join() waits for open, but a dead parent has another id.
    while parent.is_alive() and os.getppid() == started_by:
        parent.join(1)
    os._exit(1)


def _kill_workers(pool: ProcessPoolExecutor) -> None:
    """End the workers at once, without waiting for one that hangs."""
    workers = list((pool._processes or {}).values())
    pool.shutdown(wait=False)
    for process in workers:
        process.kill()
    for process in workers:
        process.join(5)
