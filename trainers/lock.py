"""A file that one process holds at a time; the system frees it when that process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import sys
import time
from pathlib import Path
from types import TracebackType

from configs.errors import BusyError

PATIENCE = 5.0  # seconds: a process that was killed is not gone at once
PAUSE = 0.05


class Lock:
    """A lock that is held; it names its process, for those who are refused.

    As a context manager it lets go at the end and removes the file; otherwise it is held as long as this object
    lives, at most until the process ends.

    Args:
        path: the file; the folders above it are made.
        doing: what only one process may do, to be read after "another process is", such as "training in RUN".
        patience: seconds to wait for a process that holds it.

    Raises:
        BusyError: another process holds it.
    """

    def __init__(self, path: Path, doing: str, patience: float = PATIENCE) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() > deadline:
                raise BusyError(f"another process{_holder(path)} is {doing}: wait for it, or stop it")
            time.sleep(PAUSE)
        with contextlib.suppress(OSError):  # a full disk: who holds it cannot be told then
            self._file.truncate(0)
            self._file.write(f"{os.getpid()} {socket.gethostname()}\n".encode())

    def _taken(self) -> bool:
        """Try once."""
        self._file = self.path.open("ab", buffering=0)
        try:
            fcntl.lockf(
                self._file, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # POSIX: worker processes do not inherit it
        except (BlockingIOError, PermissionError):
            self._file.close()
            return False
        except OSError:
            print(
                f"warning: {self.path.parent} is on a file system without locks: start one process only",
                file=sys.stderr,
            )
            return True
        if _is(self.path, self._file.fileno()):
            return True
        self._file.close()  # it was removed by the process that held it until now
        return False

    def __enter__(self) -> Lock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.path.unlink(missing_ok=True)
        self._file.close()


def _is(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _holder(path: Path) -> str:
    """Return who wrote itself into the file, as far as it can be told: on a shared disk it may be elsewhere."""
    try:
        pid, host = path.read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return ""
    return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
