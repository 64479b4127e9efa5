"""What can end a training, and the exit code that says so to a scheduler."""

from __future__ import annotations

import signal

EXIT_BAD_INPUT = 2  # configuration, data or checkpoint: one line on stderr says what to change
EXIT_FAILED = 3  # training itself failed: non-finite loss, out of memory, full disk
EXIT_RESUME = 75  # interrupted with a checkpoint written: the same command goes on (EX_TEMPFAIL)


class TrainingError(RuntimeError):
    """Training cannot go on; the last good checkpoint is kept."""


class Interrupted(Exception):
    """A signal asked the run to stop; its state is saved."""


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR2 (pre-emption), so that a run stops after the step it is in.

    A second SIGINT stops at once. NCCL uses SIGUSR1, which is left alone. Works as a context manager;
    outside the main thread, where Python forbids handlers, it notes nothing.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

    def __init__(self) -> None:
        self.name: str | None = None
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        for number in self.CAUGHT:
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:
                break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _frame: object) -> None:
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
