"""Read text, YAML and JSON within bounds, write files completely or not at all, and lock files.

Every package may import this module. It imports nothing of the project but the errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import BusyError, UserError

MAX_YAML_BYTES = 4 << 20
MAX_TEXT_BYTES = 256 << 20  # of JSON, CSV and split files
MAX_DEPTH = 24
MAX_ITEMS = 5_000_000


def read_yaml(path: Path) -> Any:
    """Read an untrusted YAML file as dicts, lists and scalars.

    Raises UserError if it is not YAML, too large, too deeply nested, or uses anchors: a few lines with anchors can
    expand to billions of items.
    """
    import yaml

    text, depth = read_text(path, MAX_YAML_BYTES), 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise UserError(f"{path} uses YAML anchors (& or *). Fix: write the values out.")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise UserError(f"{path} is nested deeper than {MAX_DEPTH} levels. Fix: flatten it.")
        return yaml.safe_load(text)
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error


def read_json(path: Path) -> Any:
    """Read an untrusted JSON file, within the bounds of `parse_json`."""
    return parse_json(read_text(path), str(path))


def parse_json(text: str, source: str) -> Any:
    """Parse JSON; ``source`` names it in messages.

    Raises UserError if it is not JSON, too large or too deeply nested. NaN and infinity are not JSON.
    """
    try:
        content = json.loads(text, parse_constant=_finite, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON: {error}. Fix: remove the file or restore it.") from error
    check_plain(content, source)
    return content


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a finite number")
    return value


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES, errors: str = "strict") -> str:
    """Read a regular UTF-8 file within bounds, with or without a byte-order mark; line ends stay as they are.

    ``errors`` is that of ``bytes.decode``: ``surrogateescape`` also reads names of files that are not UTF-8. Raises
    UserError if the file is not a regular one, too large or not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}). Fix: save it as UTF-8.") from error


def read_bytes(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> bytes:
    """Read a regular file within bounds; raise UserError for others. A pipe could make the reader wait for ever."""
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file. Fix: give the path of a file.")
    if path.stat().st_size > max_bytes:
        raise UserError(f"{path} has {path.stat().st_size} bytes, more than {max_bytes}. Fix: shorten it.")
    return path.read_bytes()


def check_plain(value: Any, source: str, max_items: int = MAX_ITEMS) -> None:
    """Raise UserError if nested containers are too deep, or hold more than ``max_items`` values.

    A shared container counts each time it is reached. So a container that contains itself, or whose content doubles at
    every level, is rejected.
    """
    stack, seen = [(value, 0)], 0
    while stack:
        item, depth = stack.pop()
        seen += 1
        if seen > max_items or depth > MAX_DEPTH:
            raise UserError(
                f"{source} holds data nested deeper than {MAX_DEPTH} levels or more than {max_items} values. "
                "Fix: choose another file."
            )
        if isinstance(item, dict):
            stack.extend((child, depth + 1) for child in item.values())
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack.extend((child, depth + 1) for child in item)


def finite_or_none(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None at any depth."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): finite_or_none(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_none(item) for item in value]
    return value


@contextlib.contextmanager
def name_file_in_errors(path: Path) -> Iterator[None]:
    """Add the path to an OSError that lacks it, such as that of a write to a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # an error of the system, not one with a message of its own
            error.filename = error.filename or str(path)
        raise


@contextlib.contextmanager
def temporary_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the folder of ``path``, with its suffix. It replaces ``path`` on success only.

    No reader and no restart sees half of a file. An OSError that lacks a path gets that of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.tmp.{path.name}")
    try:
        with name_file_in_errors(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary one."""
    with temporary_file(path) as temporary:
        # Names of files that are not UTF-8 are written with the bytes that they have.
        temporary.write_text(text, encoding="utf-8", errors="surrogateescape", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write JSON; NaN and infinity become null."""
    write_text(path, json.dumps(finite_or_none(value), indent=1) + "\n")


def shell_word(text: str) -> str:
    """Return text as one word of a shell, on one line: a character that does not print is written as its bytes."""
    if text.isprintable():
        return shlex.quote(text)
    plain = text.replace("\\", "\\\\").replace("'", "\\'")
    shown = (c if c.isprintable() else "".join(f"\\x{byte:02x}" for byte in os.fsencode(c)) for c in plain)
    return f"$'{''.join(shown)}'"


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(folder: Path) -> None:
    """Create a folder; raise OSError if no file can be created in it. Call it before long work."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        error.filename = str(folder)  # not the temporary name
        raise


def lock_file(path: Path, doing: str, patience: float = 10.0) -> Any:
    """Take a lock that only one process holds; it is freed with the object, or when the process ends.

    Args:
        path: the lock's file; the folders above it are created.
        doing: the work of its holder, for the message "another process is ...", such as "training in RUN".
        patience: seconds until BusyError is raised: a holder that was killed takes a moment to end.
    """
    from filelock import FileLock, Timeout

    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, thread_local=False, is_singleton=True)  # this process may take it again
    try:
        lock.acquire(timeout=patience, poll_interval=0.05)
    except Timeout:
        raise BusyError(f"another process{_holder(path)} is {doing}. Fix: wait for it, or stop it.") from None
    except (NotImplementedError, PermissionError):
        if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            raise
        print(f"warning: {path.parent} is on a file system without locks: start one process only", file=sys.stderr)
    with contextlib.suppress(OSError):  # Windows locks the file against its own process
        path.write_text(f"{os.getpid()} {socket.gethostname()}\n", encoding="utf-8")
    return lock


def _holder(path: Path) -> str:
    """Return text that names the process which holds a lock; on a shared disk it may be on another machine."""
    try:
        pid, host = read_text(path, 1000).split()
    except (OSError, ValueError):
        return ""
    return f" (pid {pid})" if host == socket.gethostname() else f" (pid {pid} on {host})"
