"""Stop a run at a signal, after the current step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

from configs.errors import Interrupted


class StopSignals:
    """Record SIGTERM, SIGINT and SIGUSR2 (pre-emption) in ``name``, so that a run can stop after the current step.

    A second SIGINT stops at once. SIGUSR1 is not handled, because NCCL uses it. Outside the main thread Python forbids
    handlers, and no signal is recorded. If the block ends with Interrupted, the previous handler receives the signal;
    that of submitit puts the job back into the queue.
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
    def at_once(self, yes: bool = True) -> Iterator[None]:
        """Raise Interrupted as soon as a signal arrives: for validation, which can be repeated."""
        self._at_once = yes
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a loader process that has just started
            if number == signal.SIGTERM:  # its parent ends, and waits for it
                os._exit(0)
            return
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._at_once:
            raise Interrupted(self.name)
