"""Convert known failures of torch into one line with a fix."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from configs.errors import TrainingError, UserError

LESS_MEMORY = "use a smaller batch_size or dataset.resize, or trainer.precision=bf16"
# What torch's message contains, what it means, and what to do (None: see `more_memory`).
_KNOWN = (
    (r"out of memory|can't allocate memory|not enough memory|MemoryError", "out of memory", None),
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
def as_training_error(doing: str, more_memory: str = LESS_MEMORY) -> Iterator[None]:
    """Convert known RuntimeErrors of torch and of the loader to a TrainingError; others are raised unchanged.

    Messages say that it failed "while" ``doing``. ``more_memory`` is what to change if memory ran out.
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
