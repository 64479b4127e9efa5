"""Work done ahead of its use, in threads: image decoding and disks release Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from configs.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def default_workers() -> int:
    """Return the number of processor cores that this process may use."""
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield ``function(item)`` in the order of the items, computed by ``workers`` threads.

    At most ``workers + 1`` results wait to be used, whatever the number of items, so memory is bounded.
    An exception of ``function`` comes out where its result would have.

    Raises:
        UserError: fewer than one worker.
    """
    if workers < 1:
        raise UserError(f"workers={workers} is invalid: expected a whole number >= 1")
    pool = ThreadPoolExecutor(workers)
    waiting: deque[Future[Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
