"""What can end a training, and the exit code that says so to a scheduler."""

from __future__ import annotations

import contextlib
import os
import re
import signal
from collections.abc import Iterator

from configs.errors import Interrupted, TrainingError, UserError

# What torch says, what it means, and what to do (None: change the amount of memory).
_KNOWN = (
    (r"out of memory|can't allocate memory|not enough memory|MemoryError", "out of memory", None),
    (
        r"(\S+) does not have a deterministic implementation",
        "trainer.deterministic=true refuses an operation that adds in no fixed order",
        "use device=cpu, another model, or trainer.deterministic=false",
    ),
    (
        r"Connection (closed|reset) by peer|Timed out waiting|DistBackendError|NCCL.*(error|timeout)",
        "another process of this training stopped answering",
        "its own message is above; start again with the same command",
    ),
    (
        r"DataLoader worker .* (killed by signal|exited unexpectedly)",
        "a loader process died",
        "check whether memory or /dev/shm ran out, or set num_workers=0",
    ),
)


@contextlib.contextmanager
def explained(doing: str, more_memory: str) -> Iterator[None]:
    """Turn the failures that torch reports as RuntimeError into a TrainingError of one line.

    Args:
        doing: what was going on, to be read after "while".
        more_memory: what to change where memory ran out.
    """
    try:
        yield
    except TrainingError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm sees a single value a channel while {doing}: use a larger dataset.crop, or more images a batch"
        ) from error
    except ChildProcessError as error:  # of a loader, which has said it all
        raise TrainingError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        for pattern, meaning, remedy in _KNOWN:
            if re.search(pattern, f"{type(error).__name__}: {error}"):
                said = _sentence(error)
                raise TrainingError(f"{meaning} while {doing}: {said}; {remedy or more_memory}") from error
        raise


def _sentence(error: BaseException) -> str:
    """The first sentence of what an error says, or its type where it says nothing."""
    first = str(error).strip().partition("\n")[0]
    return re.split(r"[.!] ", first)[0].rstrip(".! ") or type(error).__name__


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR2 (pre-emption), so that a run stops after the step it is in.

    A second SIGINT stops at once. NCCL uses SIGUSR1, which is left alone. Outside the main thread, where
    Python forbids handlers, it notes nothing. Left through Interrupted, it hands the signal on to the handler
    that was there before, such as submitit's, which puts the job back into the queue.
    """

    CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)

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
        """Raise Interrupted as soon as a signal comes, where nothing is lost by that (validation)."""
        self._at_once = yes
        try:
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, _frame: object) -> None:
        if os.getpid() != self._process:  # a loader process that has only just been started
            if number == signal.SIGTERM:  # its parent ends, and waits for it
                os._exit(0)
            return
        if self.name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name
        if self._at_once:
            raise Interrupted(self.name)
