"""Run a command: one line and an exit code for bad input, a traceback for a bug.

Exit codes are in ``configs/errors.py``. ``--traceback`` (or RANKSEG_TRACEBACK=1) shows the traceback of every error.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from configs import errors
from configs.compose import unknown_key, unknown_option
from configs.errors import BusyError, Interrupted, TrainingError, UserError, one_line

# A path of the wrong kind is bad input. Other errors of the system, such as a full disk, are failures.
WRONG_PATH = (FileNotFoundError, NotADirectoryError, FileExistsError, IsADirectoryError)
REMEDIES = {
    errno.ENOSPC: "make room, or choose a folder on another disk",
    errno.EDQUOT: "make room, or choose a folder on another disk",
    errno.EFBIG: "raise the limit (ulimit -f), or choose a folder on another disk",
    errno.EACCES: "choose another folder, or change its permissions",
    errno.EPERM: "choose another folder, or change its permissions",
    errno.EROFS: "choose a folder that can be written",
    errno.ENOENT: "create its folder first, or correct the path",
    errno.ENOTDIR: "a part of this path is a file; choose another",
    errno.EEXIST: "it is a file; choose another folder",
    errno.EISDIR: "it is a folder; give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "fix the links that lead in a circle",
}
# Hydra's completion for zsh uses bash's command `complete`. These lines make zsh define it.
_ZSH = """\
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i }
autoload -Uz bashcompinit && bashcompinit
"""


def run_cli(main: Callable[[], Any]) -> None:
    """Run a command, which may return an exit code, and exit with a code unless it succeeds.

    One line is printed for UserError, TrainingError, Interrupted, an error of Hydra, OmegaConf or YAML, and OSError.
    Any other exception is a bug and keeps its traceback.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # otherwise Hydra prints the error and exits
    if "--traceback" in sys.argv:
        sys.argv.remove("--traceback")
        os.environ["RANKSEG_TRACEBACK"] = "1"
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # characters that a terminal cannot show, as on Windows, are escaped
            stream.reconfigure(errors="backslashreplace")
    if "install=zsh" in sys.argv:
        print(_ZSH)
    try:
        code = main()
        sys.stdout.flush()
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        _exit(errors.EXIT_BAD_INPUT, one_line(" ".join(explain(error).split())))
    except TrainingError as error:
        _exit(errors.EXIT_FAILED, str(error))
    except Interrupted as error:
        message = f"interrupted by {error}; the state is saved: run the same command again"
        _exit(errors.EXIT_RESUME, message, "stopped")
    except KeyboardInterrupt:
        _exit(errors.EXIT_INTERRUPTED, "interrupted", "stopped")
    except UserError as error:
        _exit(errors.EXIT_BUSY if isinstance(error, BusyError) else errors.EXIT_BAD_INPUT, str(error))
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at exit
        sys.exit(errors.EXIT_BROKEN_PIPE)
    except OSError as error:
        code = errors.EXIT_BAD_INPUT if isinstance(error, WRONG_PATH) else errors.EXIT_FAILED
        _exit(code, one_line(add_remedy(error)))
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # of pathlib, before Python 3.13
            raise
        _exit(errors.EXIT_BAD_INPUT, one_line(f"{error}: {REMEDIES[errno.ELOOP]}"))
    else:
        if isinstance(code, int) and code:
            sys.exit(code)


def _exit(code: int, message: str, kind: str = "error") -> None:
    if os.environ.get("RANKSEG_TRACEBACK") == "1":
        raise
    sys.stdout.flush()
    print(f"{kind}: {message}", file=sys.stderr)
    sys.exit(code)


def list_skipped(skipped: Mapping[str, str]) -> None:
    """Report the images that ``on_error=skip`` left out, and why."""
    if skipped:
        print(f"skipped {len(skipped)} unreadable images:", file=sys.stderr)
    for name, reason in skipped.items():
        print(one_line(f"  {name}: {reason}"), file=sys.stderr)


def add_remedy(error: OSError) -> str:
    """Return the system's message about a path and what to do; an error with a text of its own is not changed."""
    if not (error.strerror and error.errno in REMEDIES):
        return str(error)
    path = f"{error.filename}: " if error.filename else ""
    return f"{path}{error.strerror}: {REMEDIES[error.errno]}"


def explain(error: BaseException) -> str:
    """Return the message for an error of Hydra, OmegaConf or YAML: what is wrong and what is allowed."""
    text = str(error)
    if isinstance(error, MarkedYAMLError) and error.problem_mark:
        place = f"{error.problem_mark.name}, line {error.problem_mark.line + 1}"
        return f"{place}: invalid YAML: {error.problem}. Fix: correct the file."
    if isinstance(error, YAMLError):
        return f"invalid YAML: {text}. Fix: correct the file."
    if isinstance(error, OverrideParseException):
        return f"{error.override} cannot be read. Fix: write key=value, and lists as 'key=[a,b]'."
    if "Could not override ''" in text:
        return "an override names no key. Fix: write key=value."
    if match := re.search(r"Could not override '([^']+)'", text):
        return unknown_key(match[1])
    if match := re.search(r"Could not find 'hydra/launcher/(?:submitit_)?([^']+)'", text):
        plugin = match[1] if match[1] in ("joblib", "ray") else "submitit"
        return f"launcher needs a plugin that is not installed. Fix: pip install hydra-{plugin}-launcher"
    if match := re.search(r"(?:Could not find|Could not load) '([^']+)/([^'/]*)'", text):
        return unknown_option(match[1], match[2])
    return text
