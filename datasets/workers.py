"""Loader processes: the death of one is told where the next batch is asked for, and nowhere else.

torch raises it from a signal handler, at whatever line the parent is: in the middle of an update, between two renames,
or where Python prints "exception ignored" and goes on.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Deaths:
    """Notes that a loader process died, and raises it while a batch is waited for, or when the next one is."""

    def __init__(self) -> None:
        self._told: RuntimeError | None = None
        self._waiting = False
        self._torch: Callable[[int, FrameType | None], Any] | None = None

    def watch(self) -> None:
        """Put this around torch's handler, which is set when the first loader process starts."""
        if threading.current_thread() is not threading.main_thread():
            return  # nor does torch set one
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._note:
            self._torch = handler
            signal.signal(signal.SIGCHLD, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        assert self._torch is not None
        try:
            self._torch(number, frame)
        except RuntimeError as error:
            self._told = error
            if self._waiting:
                raise

    def check(self) -> None:
        """Raise what was noted, once; looks anew, as torch misses a death while others are still being started.

        Raises RuntimeError, in torch's words.
        """
        if self._torch is not None and signal.getsignal(signal.SIGCHLD) == self._note:
            self._note(signal.SIGCHLD, None)
        told, self._told = self._told, None
        if told is not None:
            raise told

    @contextmanager
    def told(self) -> Iterator[None]:
        """Raise a death that was noted before, or that comes now. Raises RuntimeError, in torch's words."""
        self._waiting = True
        try:
            self.check()
            yield
        except RuntimeError:
            self._told = None
            raise
        finally:
            self._waiting = False

    def end_all(self) -> None:
        """Kill the loader processes that are left: one that missed a SIGTERM would be waited for at the exit."""
        for process in multiprocessing.active_children():
            if process.daemon:
                process.kill()
                process.join(5)
        self._told = None


DEATHS = Deaths()  # one for all loaders, as there is one handler


def hide_lost_connections(_worker: int) -> None:
    """In a worker, print no traceback where the parent hangs up, as it does in the middle of a batch when it fails.

    What goes wrong with an image is raised in the parent; only threads of multiprocessing print here.
    """
    shown = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, (ConnectionError, EOFError)):
            shown(kind, error, trace)

    sys.excepthook = hook


def lost(error: Exception) -> bool:
    """Whether what came instead of a batch says that a loader process is gone or silent.

    A process may be killed while the parent fetches a tensor from it, over a connection. What went wrong inside of one
    comes with "Caught ... in DataLoader worker process" before it, and is none of these.
    """
    text = first_line(error)
    return (
        text.startswith("DataLoader") if isinstance(error, RuntimeError) else not text.startswith("Caught ")
    )


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]
