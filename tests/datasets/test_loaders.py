"""The batches are a function of (seed, epoch, index): not of the workers, the shard, or the step of a resumption."""

from __future__ import annotations

import copy
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from multiprocessing import resource_sharer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision import tv_tensors

from datasets import DatasetError, DatasetInfo, SegmentationDataset, loaders
from datasets.loaders import EvalLoader, TrainLoader
from datasets.transforms import EvalTransform, TrainTransform

INFO = DatasetInfo("numbered", ("a", "b"), ((0, 0, 0), (255, 255, 255)), (1,))


class Numbered(SegmentationDataset):
    """Image k is filled with k; sizes as given; some are broken, and reads are counted."""

    def __init__(self, sizes: list[tuple[int, int]], broken: tuple[int, ...] = ()) -> None:
        self.info, self.split, self.sizes, self.broken = INFO, "train", sizes, broken
        self.names = [f"image{k}" for k in range(len(sizes))]
        self.reads: list[int] = []

    def read(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        self.reads.append(index)
        if index in self.broken:
            raise DatasetError(f"/data/image{index}.jpg is damaged: fetch it again")
        height, width = self.sizes[index]
        noise = np.random.default_rng(index).integers(0, 256, (3, height, width), dtype=np.uint8)
        return tv_tensors.Image(torch.from_numpy(noise)), tv_tensors.Mask(torch.full((height, width), index % 2).byte())


def numbered(count: int = 11, broken: tuple[int, ...] = ()) -> Numbered:
    return Numbered([(12, 14)] * count, broken)


def train_loader(data: SegmentationDataset, batch_size: int = 4, seed: int = 3, **options) -> TrainLoader:
    return TrainLoader(data, TrainTransform(INFO.mean, INFO.std, crop=8), batch_size, seed, **options)


def eval_loader(data: SegmentationDataset, batch_size: int = 4, **options) -> EvalLoader:
    return EvalLoader(data, EvalTransform(INFO.mean, INFO.std), batch_size, **options)


def same(left, right) -> bool:
    """Whether two lists of batches are equal to the bit."""
    return len(left) == len(right) and all(
        torch.equal(a.images, b.images) and torch.equal(a.targets, b.targets) and a[2:] == b[2:]
        for a, b in zip(left, right, strict=True)
    )


def test_batches_do_not_depend_on_the_workers():
    data = numbered()
    expected = [list(train_loader(data).epoch(epoch)) for epoch in range(2)]
    for workers in (1, 2):
        loader = train_loader(data, num_workers=workers)
        assert same(list(loader.epoch(1)), expected[1])  # out of turn, and with workers that stay
        assert same(list(loader.epoch(0)), expected[0])


def test_an_epoch_resumes_in_its_middle_without_reading_what_was_done():
    data = numbered()
    whole = list(train_loader(data).epoch(5))
    data.reads.clear()
    assert same(list(train_loader(data).epoch(5, start_step=2)), whole[2:])
    assert data.reads == whole[2].indices
    assert list(train_loader(data).epoch(5, start_step=3)) == []


def test_an_epoch_that_was_left_early_does_not_disturb_the_next():
    data = numbered()
    expected = list(train_loader(data).epoch(1))
    loader = train_loader(data, num_workers=2)
    next(iter(loader.epoch(0)))
    assert same(list(loader.epoch(1)), expected)


def test_every_image_once_an_epoch_and_decoded_once():
    data = numbered()
    loader = train_loader(data)
    batches = list(loader.epoch(0))
    assert [len(batch.indices) for batch in batches] == [4, 4, 3] and len(loader) == 3
    assert sorted(data.reads) == sorted(k for batch in batches for k in batch.indices) == list(range(11))
    assert [name for batch in batches for name in batch.names] == [
        f"image{k}" for batch in batches for k in batch.indices
    ]


def test_epochs_and_seeds_differ_in_order_and_in_augmentation():
    data = numbered()
    first, second = (list(train_loader(data).epoch(epoch)) for epoch in (0, 1))
    assert [b.indices for b in first] != [b.indices for b in second]
    assert train_loader(data, seed=3).order(0) != train_loader(data, seed=4).order(0)
    one_image = train_loader(numbered(1), batch_size=1)
    assert len({next(one_image.epoch(k)).images.sum().item() for k in range(10)}) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_the_callers_random_state_is_left_alone(workers):
    torch.manual_seed(0)
    random.seed(0)
    before = torch.get_rng_state(), random.getstate()
    list(train_loader(numbered(), num_workers=workers).epoch(0))
    list(eval_loader(numbered(), num_workers=workers))
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_each_batch(world_size, drop_last):
    data = numbered()
    whole = list(train_loader(data, drop_last=drop_last).epoch(0))
    shares = [
        list(train_loader(data, drop_last=drop_last, rank=rank, world_size=world_size).epoch(0))
        for rank in range(world_size)
    ]
    assert len(whole) == len(train_loader(data, drop_last=drop_last)) == 3 - drop_last
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert batch.indices == [k for part in parts for k in part.indices]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_scores_every_image_once_over_all_ranks(world_size):
    data = numbered(9)
    whole = [batch.indices for batch in eval_loader(data)]
    shares = [eval_loader(data, rank=rank, world_size=world_size) for rank in range(world_size)]
    seen = [[batch.indices for batch in share] for share in shares]
    assert seen == [whole[rank::world_size] for rank in range(world_size)]  # the very batches, shared out
    assert [share.num_images for share in shares] == [sum(map(len, part)) for part in seen]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_batches_hold_one_size_and_are_never_padded(workers):
    sizes = [(9, 9), (9, 9), (9, 7), (9, 7), (9, 7), (9, 9), (5, 5)]
    batches = list(eval_loader(Numbered(sizes), batch_size=4, num_workers=workers))
    assert [batch.indices for batch in batches] == [[0, 1], [2, 3], [4], [5], [6]]
    assert [tuple(batch.images.shape[-2:]) for batch in batches] == [(9, 9), (9, 7), (9, 7), (9, 9), (5, 5)]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_stops_with_one_line(workers):
    for batches in (
        train_loader(numbered(broken=(6,)), num_workers=workers).epoch(0),
        eval_loader(numbered(broken=(6,)), num_workers=workers),
    ):
        with pytest.raises(DatasetError, match=r"^/data/image6.jpg is damaged: fetch it again$"):
            list(batches)


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_images_can_be_skipped_and_are_listed(workers):
    data = numbered(broken=(6, 7))
    loader = train_loader(data, on_error="skip", num_workers=workers)
    batches = list(loader.epoch(0))
    assert [len(batch.indices) for batch in batches] == [4, 4, 3]  # the next readable image steps in
    assert not {6, 7} & {k for batch in batches for k in batch.indices}
    assert loader.skipped.keys() == {"image6", "image7"} and "image6.jpg is damaged" in loader.skipped["image6"]
    scored = eval_loader(data, on_error="skip", num_workers=workers)
    assert [k for batch in scored for k in batch.indices] == [0, 1, 2, 3, 4, 5, 8, 9, 10]
    assert list(scored.skipped) == ["image6", "image7"]


def test_a_data_set_without_a_readable_image_is_not_skipped_silently():
    with pytest.raises(DatasetError, match="no image of numbered can be read"):
        list(train_loader(numbered(3, broken=(0, 1, 2)), batch_size=2, on_error="skip").epoch(0))


class Buggy(Numbered):
    kind: type[Exception]

    def read(self, index: int):
        raise self.kind("bug")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [KeyError, RuntimeError, ConnectionError, EOFError, TimeoutError])
def test_bugs_are_not_skipped_nor_taken_for_a_dead_worker(kind, workers):
    data = Buggy([(9, 9)] * 3)
    data.kind = kind
    loader = train_loader(data, batch_size=2, on_error="skip", num_workers=workers)
    with pytest.raises(kind, match="bug"):
        list(loader.epoch(0))


class Exiting(Numbered):
    def read(self, index: int):
        raise SystemExit(5)


class Abort(BaseException):
    def __init__(self, code: int, reason: str) -> None:  # two arguments, so it cannot be unpickled
        super().__init__(f"{reason} {code}")


class Aborting(Numbered):
    def read(self, index: int):
        raise Abort(5, "aborted")


@pytest.mark.parametrize(("kind", "message"), [(Exiting, r"sys.exit\(5\)"), (Aborting, "Abort: aborted 5")])
def test_a_data_set_that_exits_is_an_error_with_a_message(kind, message):
    with pytest.raises(RuntimeError, match=message):
        list(train_loader(kind([(9, 9)] * 3), batch_size=2, num_workers=1).epoch(0))


class Stopping(Numbered):
    def read(self, index: int):
        return super().read(index) if index < 4 else next(iter(()))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_stop_iteration_in_a_data_set_does_not_end_the_evaluation_early(workers):
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(eval_loader(Stopping([(9, 9)] * 8), num_workers=workers))


class Hanging(Numbered):
    """Image 1 is damaged, and image 2 is never read to its end."""

    def read(self, index: int):
        if index == 2:
            time.sleep(600)
        return super().read(index)


def leave_with_a_hanging_worker() -> None:
    """Be a command that ends with an error, while one of its workers hangs."""
    loader = eval_loader(Hanging([(12, 14)] * 8, broken=(1,)), batch_size=1, num_workers=2)
    with pytest.raises(DatasetError, match="damaged"):
        list(loader)


def end_as_an_interpreter() -> None:
    leave_with_a_hanging_worker()
    threading._shutdown()  # what an interpreter does first at its end
    os._exit(0)


def leave_while_a_worker_starts() -> None:
    """Be a command that Ctrl-C ends at the moment when a worker runs, but its pool does not know it."""
    start = multiprocessing.context.ForkProcess.start

    def interrupted(process) -> None:
        start(process)
        raise KeyboardInterrupt

    multiprocessing.context.ForkProcess.start = interrupted
    with pytest.raises(KeyboardInterrupt):
        list(train_loader(numbered(), num_workers=1).epoch(0))


@pytest.mark.parametrize("target", [leave_with_a_hanging_worker, end_as_an_interpreter, leave_while_a_worker_starts])
def test_a_worker_that_hangs_does_not_delay_the_end(target):
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(30)
    ended = not process.is_alive()
    process.kill()
    process.join()
    assert ended and process.exitcode == 0


def lose_a_worker(pipe) -> None:
    """Start a worker, then a process that holds all connections of it open, and wait for the end."""
    loader = train_loader(numbered(), num_workers=1)
    list(loader.epoch(0))
    (worker,) = multiprocessing.active_children()
    other = multiprocessing.Process(target=time.sleep, args=(60,))
    other.start()
    pipe.send((worker.pid, other.pid))
    time.sleep(60)


def test_a_worker_ends_with_its_parent_even_if_another_process_holds_its_connection():
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    parent = context.Process(target=lose_a_worker, args=(sender,))
    parent.start()
    worker, other = receiver.recv()
    parent.kill()
    parent.join()
    deadline = time.monotonic() + 20
    try:
        while state_of(worker) != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(other, signal.SIGKILL)


def state_of(pid: int) -> str:
    """The letter that `ps` prints: T if the process is stopped, Z if it has ended or does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_a_copy_and_a_forked_process_start_workers_of_their_own():
    loader, expected = train_loader(numbered(), num_workers=1), list(train_loader(numbered()).epoch(0))
    list(loader.epoch(1))
    assert same(list(copy.deepcopy(loader).epoch(0)), expected)
    process = multiprocessing.get_context("fork").Process(target=lambda: list(loader.epoch(0)))
    process.start()
    process.join(30)
    ended = process.exitcode
    process.kill()
    assert ended == 0 and same(list(loader.epoch(0)), expected)


def test_two_iterations_of_a_loader_report_a_dead_worker_both():
    others = multiprocessing.active_children()
    loader = train_loader(numbered(40), num_workers=1)
    iterations = loader.epoch(0), loader.epoch(1)
    for batches in iterations:
        next(batches)
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    worker.kill()
    for batches in iterations:
        with pytest.raises(ChildProcessError, match="a loader process died"):
            list(batches)


def test_too_few_open_files_are_named():
    loader, limits = eval_loader(numbered(40), batch_size=1, num_workers=1), resource.getrlimit(resource.RLIMIT_NOFILE)
    next(iter(loader))  # the worker keeps the old limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, limits[1]))
    try:
        with pytest.raises(ChildProcessError, match="ulimit -n"):
            list(loader)  # each batch holds two files
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_a_connection_to_a_worker_that_breaks_is_a_dead_worker(monkeypatch):
    """The moment between a worker's message and its tensor is too short to aim at."""

    def reset(_self):
        raise ConnectionResetError(104, "Connection reset by peer")

    loader = train_loader(numbered(8), batch_size=4, num_workers=1)
    monkeypatch.setattr("multiprocessing.connection.Connection.recv", reset)
    with pytest.raises(ChildProcessError, match=r"a loader process died.*num_workers=0"):
        list(loader.epoch(0))


class Failing(Numbered):
    """A data set whose reads end the process, or do not end."""

    def __init__(self, how: str) -> None:
        super().__init__([(12, 14)] * 4)
        self.how = how

    def read(self, index: int):
        if self.how == "dies":
            os._exit(1)
        time.sleep(3)


@pytest.mark.parametrize("how", ["dies", "stalls"])
def test_a_dead_or_stalled_worker_is_named(how):
    loader = train_loader(Failing(how), num_workers=1, timeout=1)
    with pytest.raises(ChildProcessError, match=r"a loader process died.*1 s.*num_workers=0"):
        list(loader.epoch(0))


def test_a_worker_that_is_frozen_while_it_hands_over_a_batch_is_named(monkeypatch):
    """The parent has read the message of a batch, and asks the worker for the memory of its tensors."""
    others, armed, asked = multiprocessing.active_children(), threading.Event(), threading.Event()
    get_connection = resource_sharer._ResourceSharer.get_connection

    def observed(ident):
        if armed.is_set():
            os.kill(worker.pid, signal.SIGSTOP)
            while state_of(worker.pid) not in "TZ":
                time.sleep(0.01)
            asked.set()
        return get_connection(ident)

    monkeypatch.setattr(resource_sharer._ResourceSharer, "get_connection", staticmethod(observed))
    loader = train_loader(numbered(32), batch_size=4, num_workers=1, timeout=60)
    batches = loader.epoch(0)
    next(batches)
    loader.timeout = 0.3  # from here on; the first batch waits for the start of the worker
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    time.sleep(1)  # the batches that were asked for are here
    armed.set()
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match=r"gave no batch for 0.3 s"):
        list(batches)
    assert asked.is_set() and time.monotonic() - begin < 2.5
    assert not worker.is_alive()


def test_a_death_while_a_batch_is_waited_for_ends_the_epoch():
    others = multiprocessing.active_children()
    batches = train_loader(Failing("stalls"), batch_size=4, num_workers=1, timeout=60).epoch(0)

    def kill() -> None:
        for process in multiprocessing.active_children():
            if process not in others:
                os.kill(process.pid, signal.SIGKILL)

    killer = threading.Timer(1, kill)
    killer.start()
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match="a loader process died"):
        next(batches)
    assert time.monotonic() - begin < 20
    killer.join()


def test_the_death_of_an_idle_worker_ends_the_epoch():
    others = multiprocessing.active_children()
    batches = train_loader(numbered(40), batch_size=4, num_workers=1).epoch(0)
    next(batches)  # of ten; those that the process had ready arrive, the later ones cannot
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    worker.kill()
    time.sleep(1)
    with pytest.raises(ChildProcessError, match="a loader process died"):
        list(batches)
    assert len(list(train_loader(numbered(8), batch_size=4, num_workers=1).epoch(0))) == 2


def test_a_death_is_reported_while_the_next_epoch_begins():
    """Before the first batch of a later epoch every process has to answer; here one dies while it is waited for."""
    others = multiprocessing.active_children()
    loader = train_loader(numbered(8), batch_size=4, num_workers=1, timeout=60)
    list(loader.epoch(0))
    (worker,) = (process for process in multiprocessing.active_children() if process not in others)
    os.kill(worker.pid, signal.SIGSTOP)
    killer = threading.Timer(1, worker.kill)
    killer.start()
    begin = time.monotonic()
    with pytest.raises(ChildProcessError, match="a loader process died"):
        next(loader.epoch(1))
    assert time.monotonic() - begin < 30  # and not when the timeout is over
    killer.join()


def test_images_of_unlike_sizes_cannot_be_trained_on_without_a_crop():
    data = Numbered([(9, 9), (9, 7), (9, 9), (5, 5)])
    loader = TrainLoader(data, TrainTransform(INFO.mean, INFO.std), 4, seed=0)
    with pytest.raises(DatasetError, match=r"sizes.*set dataset\.crop"):
        list(loader.epoch(0))


def test_invalid_arguments_are_rejected():
    for arguments in ({"batch_size": 0}, {"num_workers": -1}, {"rank": 2, "world_size": 2}, {"on_error": "ignore"}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            eval_loader(numbered(), **arguments)
    with pytest.raises(ValueError, match="last batch of 1 for 2 processes"):
        train_loader(numbered(9), world_size=2)
    with pytest.raises(ValueError, match="drop_last"):
        train_loader(numbered(3), drop_last=True)


def test_a_worker_stacks_in_shared_memory():
    images = tuple(torch.rand(2, 3, 4, 5))
    stacked = loaders._stack(images)
    assert stacked.is_shared() and torch.equal(stacked, torch.stack(images))
