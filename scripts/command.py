"""How the scripts end that do without Hydra; the others end as ``configs.cli.guarded`` says."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from configs.errors import EXIT_BAD_INPUT, EXIT_BUSY, EXIT_FAILED, BusyError
from configs.remedies import WRONG_PATH, remedy

INTERRUPTED = 130  # 128 + SIGINT
CUT_OFF = 141  # 128 + SIGPIPE


def refused(error: Exception) -> int:
    """Say in one line on stderr what was wrong, and return the exit code; called where the error was caught."""
    if os.environ.get("RANKSEG_TRACEBACK") == "1":
        raise
    print(f"error: {remedy(error)}", file=sys.stderr)
    if isinstance(error, BusyError):
        return EXIT_BUSY
    disk = isinstance(error, OSError) and not isinstance(error, WRONG_PATH)
    return EXIT_FAILED if disk else EXIT_BAD_INPUT


def leave(main: Callable[[], int]) -> NoReturn:
    """Run a command and exit with its code; Ctrl-C and a reader that has gone (`| head`) make no traceback."""
    try:
        code = main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("stopped: interrupted", file=sys.stderr)
        code = INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at the very end
        code = CUT_OFF
    sys.exit(code)
