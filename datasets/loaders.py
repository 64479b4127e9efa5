"""Seeded, resumable, sharded loading: the batches depend on (seed, epoch, index) and on nothing else.

Not on the number of workers, not on where an epoch was resumed, and the random state of the caller is left
alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader

from .base import DatasetError, SegmentationDataset
from .batches import Batch, Key, Reader, Transform, collate, seed_of
from .workers import DEATHS, first_line, hide_lost_connections, lost

NO_EPOCH = -1  # evaluation draws nothing at random


class Plan:
    """The keys of the coming epoch, batch by batch; `DataLoader` iterates over it anew for each epoch."""

    def __init__(self) -> None:
        self.batches: list[list[Key]] = []

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """What training and evaluation share: workers, their failures, and the list of images left out."""

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        batch_size: int,
        *,
        seed: int,
        num_workers: int,
        rank: int,
        world_size: int,
        pin_memory: bool,
        on_error: str,
        timeout: float,
        substitute: bool,
    ) -> None:
        if batch_size < 1 or num_workers < 0:
            raise ValueError(f"batch_size={batch_size}, num_workers={num_workers}: at least 1 and 0")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} is not one of 0..{world_size - 1}")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: choose raise or skip")
        self.dataset, self.transform, self.batch_size, self.seed = dataset, transform, batch_size, seed
        self.rank, self.world_size, self.on_error, self.timeout = rank, world_size, on_error, timeout
        self.num_workers = num_workers
        self.skipped: dict[str, str] = {}  # name -> why it was left out
        self._started = False  # whether there are loader processes
        self._plan = Plan()
        self._loader: DataLoader = DataLoader(
            Reader(dataset, transform, seed, substitute and on_error == "skip"),
            batch_sampler=self._plan,  # type: ignore[arg-type]
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=pin_memory,
            timeout=timeout if num_workers else 0,
            worker_init_fn=hide_lost_connections if num_workers else None,
            generator=torch.Generator().manual_seed(seed_of(seed)),  # otherwise the global one is drawn from
        )

    def _batches(self, plan: list[list[Key]]) -> Iterator[Batch]:
        """Yield the planned batches, split where sizes change.

        Raises DatasetError for an image that cannot be read (on_error="raise"), ChildProcessError where a
        worker died or stalled.
        """
        self._plan.batches = plan
        try:
            if self._started:  # the processes of the epoch before are asked, and waited for
                with DEATHS.told():
                    iterator = iter(self._loader)
            else:
                DEATHS.check()
                iterator = iter(self._loader)
            self._started = self.num_workers > 0
            if self.num_workers:
                DEATHS.watch()
            while True:
                with DEATHS.told():
                    batches, faults = next(iterator, (None, []))
                if batches is None:
                    return
                self._note(faults)
                yield from batches
        except (RuntimeError, ConnectionError, EOFError) as error:
            if not (self.num_workers and lost(error)):
                raise
            DEATHS.end_all()
            raise ChildProcessError(
                f"a loader process died, or gave nothing for {self.timeout:g} s ({first_line(error)}): "
                "see whether memory or /dev/shm ran out, or set num_workers=0"
            ) from None

    def _note(self, faults: list[tuple[str, str]]) -> None:
        if faults and self.on_error == "raise":
            raise DatasetError(faults[0][1])
        self.skipped.update(faults)
        if faults and len(self.skipped) == len(self.dataset):
            raise DatasetError(f"no image of {self.dataset.info.name} can be read: {faults[0][1]}")


class TrainLoader(Loader):
    """Shuffled, augmented batches of training.

    `batch_size` counts the images of all processes together; each of `world_size` gets its slice of every
    batch. With on_error="skip" the next readable image takes the place of one that cannot be read, and
    `skipped` lists it.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        on_error: str = "raise",
        timeout: float = 300,
    ) -> None:
        super().__init__(
            dataset,
            transform,
            batch_size,
            seed=seed,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
            on_error=on_error,
            timeout=timeout,
            substitute=True,
        )
        total = len(dataset)
        self._sizes = [min(batch_size, total - start) for start in range(0, total, batch_size)]
        if drop_last and self._sizes[-1] < batch_size:
            self._sizes.pop()
        if not self._sizes or self._sizes[-1] < world_size:
            raise ValueError(
                f"{total} images in batches of {batch_size} leave a last batch of {total % batch_size} for "
                f"{world_size} processes: choose another batch_size, or drop_last if another batch remains"
            )

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        return len(self._sizes)

    def order(self, epoch: int) -> list[int]:
        """Return the indices in the order of an epoch, a function of the seed and the epoch."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        return torch.randperm(len(self.dataset), generator=generator).tolist()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield this process's part of an epoch's batches, from `start_step`; nothing before it is read.

        Raises DatasetError where images cannot be read, or are of unlike sizes for want of a crop.
        """
        order, plan, start = self.order(epoch), [], 0
        for size in self._sizes:
            first, last = (start + size * k // self.world_size for k in (self.rank, self.rank + 1))
            plan.append([Key(epoch, index) for index in order[first:last]])
            start += size
        plan = plan[start_step:]
        for keys, batch in zip(plan, self._batches(plan), strict=True):
            if len(batch.names) < len(keys):
                raise DatasetError(
                    f"images of unlike sizes in a batch, such as {batch.names[0]}: set dataset.crop"
                )
            yield batch


class EvalLoader(Loader):
    """Every image once, in order, sharded without padding: rank r has the batches r, r + world_size, ...

    The batches are those of one process, so that every probability is, to the last bit: convolutions round differently
    in batches of another size.

    Images and targets of one batch have one size; where sizes change a batch ends early. With on_error="skip"
    an image that cannot be read is left out, and `skipped` lists it.
    """

    def __init__(
        self,
        dataset: SegmentationDataset,
        transform: Transform,
        batch_size: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        pin_memory: bool = False,
        on_error: str = "raise",
        timeout: float = 300,
    ) -> None:
        super().__init__(
            dataset,
            transform,
            batch_size,
            seed=0,
            num_workers=num_workers,
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
            on_error=on_error,
            timeout=timeout,
            substitute=False,
        )
        starts = range(rank * batch_size, len(dataset), world_size * batch_size)
        self.indices = [k for start in starts for k in range(start, min(start + batch_size, len(dataset)))]

    @property
    def num_images(self) -> int:
        """How many images this process has. The number of batches shows only when their sizes are known."""
        return len(self.indices)

    def __iter__(self) -> Iterator[Batch]:
        keys = [Key(NO_EPOCH, index) for index in self.indices]
        yield from self._batches(
            [keys[k : k + self.batch_size] for k in range(0, len(keys), self.batch_size)]
        )
