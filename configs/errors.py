"""Errors that a command reports in one line, its exit codes, and known failures of torch in one line.

This module imports nothing of the project and nothing slow.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

EXIT_BAD_INPUT = 2  # configuration, data or checkpoint; the message says what to change
EXIT_FAILED = 3  # the work itself failed: non-finite loss, out of memory, full disk
EXIT_BUSY = 4  # another process works on the same run; try again when it has ended
EXIT_RESUME = 75  # interrupted with a checkpoint written: the same command resumes (EX_TEMPFAIL)
EXIT_INTERRUPTED = 130  # Ctrl-C, 128 + SIGINT
EXIT_BROKEN_PIPE = 141  # the reader of the output has gone (`| head`), 128 + SIGPIPE


def one_line(text: object) -> str:
    """Return text with line breaks, and characters that hide or move other text, as Python's escapes.

    Names of files may hold any of them: a line break splits a message, and a terminal obeys control characters.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


class _Message:
    """An error whose arguments are the lines of its message."""

    args: tuple[object, ...]

    def __str__(self) -> str:
        return "\n".join(map(one_line, self.args))


class UserError(_Message, ValueError):
    """Input that cannot be used. The message says what is wrong (name = value), why, and how to fix it.

    Commands print it in one line and exit with 2. Every other ValueError is a bug and keeps its traceback.
    """


class ConfigError(UserError):
    """A configuration that cannot be used: an unknown key or option, or an invalid value."""


class BusyError(UserError):
    """Another process works on the same run or file. Commands print it in one line and exit with 4."""


class TrainingError(_Message, RuntimeError):
    """The work failed for a reason that is not a bug. Commands print it in one line and exit with 3.

    The last saved checkpoint stays valid.
    """


class Interrupted(BaseException):
    """A signal stopped the run after its state was saved. Commands exit with 75.

    Like KeyboardInterrupt it is not an Exception, so that a sweep stops too instead of starting its next run.
    """


# Pattern of torch's message, its meaning, and the remedy (None: `more_memory`).
_KNOWN = (
    (r"out of memory|can't allocate memory|not enough memory|MemoryError", "out of memory", None),
    (
        r"unable to \w+ shared memory",
        "a loader process got no shared memory",
        "enlarge /dev/shm (docker run --shm-size=8g) or ulimit -n, use a smaller batch_size, or set num_workers=0",
    ),
    (
        r"(\S+) does not have a deterministic implementation",
        "trainer.deterministic=true forbids an operation that adds in no fixed order",
        "use device=cpu, another model, or trainer.deterministic=false",
    ),
    (
        r"Connection (closed|reset) by peer|Timed out waiting|DistBackendError|NCCL.*(error|timeout)",
        "another process of this training stopped answering",
        "read its own message above; start again with the same command",
    ),
)


@contextlib.contextmanager
def as_training_error(
    doing: str, more_memory: str = "use a smaller batch_size or dataset.resize, or trainer.precision=bf16"
) -> Iterator[None]:
    """Convert known failures of torch and of the loader to TrainingError; other errors are raised unchanged.

    The error of BatchNorm for a single value per channel becomes a UserError. Messages say "while" ``doing``, such as
    "training". ``more_memory`` is the remedy if memory ran out.
    """
    try:
        yield
    except TrainingError:
        raise
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise UserError(
            f"BatchNorm sees a single value per channel while {doing}. "
            "Fix: use a larger dataset.crop, or more images per batch."
        ) from error
    except ChildProcessError as error:  # of a loader; its message is complete
        raise TrainingError(str(error)) from error
    except (RuntimeError, MemoryError) as error:
        for pattern, meaning, remedy in _KNOWN:
            if re.search(pattern, f"{type(error).__name__}: {error}"):
                line = str(error).strip().partition("\n")[0]
                reason = re.split(r"[.!] ", line)[0].rstrip(".! ") or type(error).__name__
                raise TrainingError(f"{meaning} while {doing}: {reason}. Fix: {remedy or more_memory}.") from error
        raise
