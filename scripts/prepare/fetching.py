"""Download an archive and unpack it. pooch transfers and verifies; this module adds limits, messages and unpacking."""

from __future__ import annotations

import hashlib
import lzma
import os
import shutil
import tarfile
import threading
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import UserError

BLOCK = 1 << 16
TIMEOUT = 30.0  # seconds without an answer
PATIENCE, MIN_RATE = 60.0, 10_000  # after so many seconds, fewer bytes per second on average are too slow
MAX_BYTES = 20 << 30  # of an archive whose size is not known
WORTH_A_RETRY = (408, 429, 500, 502, 503, 504)
BAD_ARCHIVE = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError,
    RuntimeError,  # zipfile raises it for encryption and for unknown methods
)  # fmt: skip


class FetchError(OSError):
    """A file could not be fetched. The message names it and the fix."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    attempts: int = 5,
    progress: bool = True,
) -> str:
    """Fetch a file into ``path`` and return its ``sha256:...``. A file that is there is only verified.

    Args:
        urls: the same file at several places, tried in this order.
        size, checksum: bytes and ``algorithm:hexdigest``, if known.
        attempts: how often each place is tried.

    Raises:
        FetchError: no place gave the file, or it is not the expected one.
        UserError: an argument is invalid.
    """
    for url in urls:
        if not url.startswith(("https://", "http://")):
            raise UserError(
                f"--url {url} is invalid: expected an address that begins with https:// or http://"
            )
    if attempts < 1:
        raise UserError(f"--attempts {attempts} is invalid: expected a whole number >= 1")
    _algorithm(checksum)
    if path.exists():
        return verify(path, size, checksum)
    problems = []
    for url in urls:
        try:
            _fetch(url, path, size, checksum, attempts, progress)
            return verify(path, size, checksum)
        except FetchError as error:
            problems.append(str(error))
    raise FetchError("; ".join(problems))


def _fetch(
    url: str, path: Path, size: int | None, checksum: str | None, attempts: int, progress: bool
) -> None:
    """Run the transfer in a thread and watch its rate: a server that sends a byte now and then defeats timeouts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = path.with_name(f".{path.name}.fetching")
    shutil.rmtree(folder, ignore_errors=True)
    watch = _Watch(path, size, progress)
    outcome: list[Exception | None] = []

    def transfer() -> None:
        try:
            _transfer(url, folder, path.name, checksum, attempts, watch)
            outcome.append(None)
        except Exception as error:
            outcome.append(error)

    thread = threading.Thread(target=transfer, daemon=True)  # the process does not wait for a stuck one
    thread.start()
    try:
        while not outcome:
            thread.join(0.2)
            watch.require_rate()
        if outcome[0] is not None:
            raise outcome[0]
        os.replace(folder / path.name, path)
    finally:
        watch.stopped = True
        watch.bar.close()
        shutil.rmtree(folder, ignore_errors=True)


def _transfer(url: str, folder: Path, name: str, checksum: str | None, attempts: int, watch: _Watch) -> None:
    import pooch
    import requests

    def once(url: str, output: str, _: Any) -> None:
        watch.restart()
        try:
            pooch.HTTPDownloader(progressbar=watch, chunk_size=BLOCK, timeout=TIMEOUT)(url, output, None)
        except requests.HTTPError as error:
            if error.response.status_code in WORTH_A_RETRY:
                raise
            raise FetchError(
                f"{url}: HTTP {error.response.status_code} {error.response.reason}. Fix: pass a newer --url"
            ) from error

    pooch.get_logger().setLevel("ERROR")
    store = pooch.create(
        folder, url, registry={name: checksum}, urls={name: url}, retry_if_failed=attempts - 1
    )
    try:
        store.fetch(name, downloader=once)
    except FetchError:
        raise
    except (requests.RequestException, ValueError) as error:  # ValueError: another checksum, or a bad header
        text = " ".join(str(error).split())
        raise FetchError(
            f"{url}: {text}, after {attempts} attempts. Fix: try again later, or pass --url"
        ) from error


class _Watch:
    """A progress bar, as pooch calls it, that ends transfers which are too large or too slow."""

    def __init__(self, path: Path, size: int | None, progress: bool) -> None:
        self.name, self.folder, self.limit = path.name, path.parent, size or MAX_BYTES
        self.bar = tqdm(
            desc=path.name, unit="B", unit_scale=True, disable=None if progress else True, leave=False
        )
        self.stopped = False
        self.restart()

    def restart(self) -> None:
        self.begin, self.count = time.monotonic(), 0
        self.bar.reset()

    @property
    def total(self) -> int:
        return self.bar.total or 0

    @total.setter
    def total(self, value: int) -> None:
        self._require_size(value)
        require_space(self.folder, value)
        self.bar.total = value

    def update(self, count: int) -> None:
        self.count += count
        self._require_size(self.count - BLOCK)  # pooch counts a part of a block as a block
        if self.stopped:
            raise FetchError(f"{self.name}: stopped")
        self.bar.update(count)

    def reset(self) -> None:
        self.count = 0

    def close(self) -> None:
        """Keep the bar: the next attempt uses it."""

    def _require_size(self, size: int) -> None:
        if size > self.limit:
            raise FetchError(
                f"{self.name} has more than the expected {self.limit} bytes. Fix: pass a newer --url"
            )

    def require_rate(self) -> None:
        seconds = time.monotonic() - self.begin
        if seconds > PATIENCE and self.count < MIN_RATE * seconds:
            raise FetchError(
                f"{self.name} arrives with less than {MIN_RATE // 1000} kB/s. Fix: try again later, or pass --url"
            )


def require_space(folder: Path, needed: int) -> None:
    """Raise FetchError if the disk of a folder has too little space."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise FetchError(
            f"{folder} has {free >> 20} MiB free, but {needed >> 20} MiB are needed. Fix: make room"
        )


def _algorithm(checksum: str | None) -> tuple[str, str]:
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    if algorithm not in hashlib.algorithms_guaranteed or (checksum and not expected):
        raise UserError(
            f"--checksum {checksum} is invalid: expected algorithm:hexdigest, such as sha256:0f3a..."
        )
    return algorithm, expected.lower()


def verify(path: Path, size: int | None, checksum: str | None) -> str:
    """Return ``sha256:...`` of a file. Raises FetchError if its size or checksum is not the expected one."""
    algorithm, expected = _algorithm(checksum)
    named, sha256, length = hashlib.new(algorithm), hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            named.update(block)
            sha256.update(block)
            length += len(block)
    if size is not None and length != size:
        raise FetchError(f"{path} has {length} bytes, not {size}. Fix: remove it and fetch it again")
    if checksum and named.hexdigest() != expected:
        raise FetchError(
            f"{path} has {algorithm} {named.hexdigest()}, not {expected}. Fix: remove it and fetch it again"
        )
    return f"sha256:{sha256.hexdigest()}"


def unpack(archive: Path, root: Path, inside: str = "") -> None:
    """Unpack a zip or tar file so that the content of its folder ``inside`` becomes ``root``.

    It is unpacked into a temporary folder and moved when complete, so an interruption leaves no half of a data set.

    Raises:
        FetchError: the file is not an archive, is damaged, or lacks ``inside``.
        UserError: ``root`` has an entry of the same name.
    """
    temporary = root.with_name(f".{root.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                file.extractall(temporary)  # strips .. and absolute paths, makes no links, and checks the CRC
        elif tarfile.is_tarfile(archive):
            with tarfile.open(archive) as file:
                file.extractall(
                    temporary, filter="data"
                )  # rejects paths, links and devices that leave the folder
        else:
            with archive.open("rb") as file:
                start = file.read(40)
            raise FetchError(
                f"{archive} is not an archive (it starts with {start!r}). Fix: remove it and fetch it again"
            )
        source = temporary / inside
        if not source.is_dir():
            raise FetchError(f"{archive} has no folder {inside}: it has changed. Fix: unpack it by hand")
        root.mkdir(parents=True, exist_ok=True)
        entries = sorted(source.iterdir())
        taken = [entry.name for entry in entries if (root / entry.name).exists()]
        if taken:
            raise UserError(
                f"{root} has {', '.join(taken)} already. Fix: remove it, or choose another --root"
            )
        for entry in entries:
            os.replace(entry, root / entry.name)
    except BAD_ARCHIVE as error:
        raise FetchError(f"{archive} is damaged ({error}). Fix: remove it and fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
