"""Command lines that answer bad input with one line and an exit code, never with a traceback."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from configs.compose import unknown_key, unknown_option
from configs.errors import (
    EXIT_BAD_INPUT,
    EXIT_BUSY,
    EXIT_FAILED,
    EXIT_RESUME,
    BusyError,
    Interrupted,
    TrainingError,
)
from configs.remedies import REMEDIES, WRONG_PATH, remedy
from datasets import DatasetError


def guarded(main: Callable[[], Any]) -> None:
    """Run a command and leave with its exit code: 0, 2 bad input, 3 training failed, 4 busy, 75 interrupted and saved.

    Exceptions that are none of these are bugs and keep their traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra would print and exit by itself otherwise
    try:
        main()
    except (HydraException, OmegaConfBaseException) as error:
        _leave(EXIT_BAD_INPUT, explain(error))
    except TrainingError as error:
        _leave(EXIT_FAILED, str(error))
    except Interrupted as error:
        _leave(
            EXIT_RESUME,
            f"interrupted by {error}; the state is saved: run the same command again to go on",
            "stopped",
        )
    except KeyboardInterrupt:
        _leave(130, "interrupted", "stopped")
    except BusyError as error:
        _leave(EXIT_BUSY, str(error))
    except DatasetError as error:  # one line, and below it the faults or the tree that is expected
        _leave(EXIT_BAD_INPUT, str(error), flat=False)
    except (ValueError, *WRONG_PATH, ModuleNotFoundError) as error:
        _leave(EXIT_BAD_INPUT, remedy(error))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        _leave(EXIT_FAILED, remedy(error))
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # of pathlib, before Python 3.13
            raise
        _leave(EXIT_BAD_INPUT, f"{error}: {REMEDIES[errno.ELOOP]}")


def _leave(code: int, message: str, kind: str = "error", flat: bool = True) -> None:
    if os.environ.get("RANKSEG_TRACEBACK") == "1":
        raise
    sys.stdout.flush()
    print(f"{kind}: {' '.join(message.split()) if flat else message}", file=sys.stderr)
    sys.exit(code)


def list_skipped(skipped: Mapping[str, str]) -> None:
    """Say which images ``on_error=skip`` left out, and why."""
    if skipped:
        print(f"skipped {len(skipped)} unreadable images:", file=sys.stderr)
    for name, reason in skipped.items():
        print(f"  {name}: {reason}", file=sys.stderr)


def explain(error: BaseException) -> str:
    """One line about a configuration error: what was wrong and what is allowed."""
    text = str(error)
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read: write key=value, and lists as 'key=[a,b]'"
    if "Could not override ''" in text:
        return "an override names no key: write key=value"
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find 'hydra/launcher/(?:submitit_)?([^']+)'", text):
        plugin = match[1] if match[1] in ("joblib", "ray") else "submitit"
        return f"launcher needs a plugin that is not installed: pip install hydra-{plugin}-launcher"
    if match := re.search(r"(?:Could not find|Could not load) '([^']+)/([^'/]*)'", text):
        return unknown_option(match[1], match[2])
    cause = error.__cause__
    if isinstance(cause, (ValueError, FileNotFoundError, ModuleNotFoundError, TypeError)):
        return str(cause)  # instantiate() wraps what a constructor raised
    if match := re.search(r"Error in call to target '([^']+)':\s*(.*)", text, re.DOTALL):
        return f"{match[1]}: {match[2]}"
    return text
