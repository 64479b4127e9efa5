"""Run a command in this process and return its exit code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from configs.cli import run_cli


def exit_code(main: Callable[..., Any], *arguments: Any) -> int:
    """Return the code with which the command would exit; an error's line is on stderr."""
    try:
        run_cli(lambda: main(*arguments))
    except SystemExit as done:
        return int(done.code or 0)
    return 0
