"""Download an archive, verify it and unpack it.

Cityscapes needs an account. Its own downloader, the package cityscapesscripts, fetches it with the account that
`csDownload -l` has stored. Nothing here reads or asks for a password.
"""

from __future__ import annotations

import hashlib
import importlib
import lzma
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import requests
import urllib3
from tqdm import tqdm

from configs.errors import UserError
from configs.files import temporary_file

BLOCK = 1 << 16
PATIENCE, MIN_RATE = 60.0, 10_000  # after so many seconds, a lower average rate in bytes per second is too slow
MAX_BYTES = 20 << 30  # of an archive whose size is not known
WORTH_A_RETRY = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 5  # per address
PAUSE = 1.0  # seconds before the second attempt; before the next ones 3, 7 and 15 times as long
BROKEN = (requests.RequestException, urllib3.exceptions.HTTPError)  # worth another attempt
CITYSCAPES = {"gtFine": "gtFine_trainvaltest.zip", "leftImg8bit": "leftImg8bit_trainvaltest.zip"}
BAD_ARCHIVE = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError,
    RuntimeError,  # zipfile raises it for encryption and for unknown methods
)  # fmt: skip


class FetchError(OSError):
    """A file could not be fetched. The message names it and the fix."""


def download(
    urls: Sequence[str], path: Path, size: int | None = None, checksum: str | None = None, progress: bool = True
) -> str:
    """Fetch a file into ``path`` and return its checksum. An existing file is only verified.

    Args:
        urls: addresses of the same file, tried in this order.
        size, checksum: number of bytes and ``algorithm:hexdigest``, if known.

    Raises:
        FetchError: no address gave the file, or it is not the expected one.
        UserError: an argument is invalid.
    """
    for url in urls:
        if not url.startswith(("https://", "http://")):
            raise UserError(f"--url {url} is invalid: expected an address that begins with https:// or http://")
    _parse_checksum(checksum)
    if path.exists():
        return verify(path, size, checksum)
    problems = []
    for url in urls:
        for attempt in range(ATTEMPTS):
            time.sleep(PAUSE * (2**attempt - 1))
            try:
                with temporary_file(path) as temporary:
                    _transfer(url, temporary, path.name, size or MAX_BYTES, progress)
                    return verify(temporary, size, checksum, source=url)
            except FetchError as error:  # another attempt would not help
                problems.append(str(error))
                break
            except BROKEN as error:
                problem = f"{url}: {' '.join(str(error).split())}, after {ATTEMPTS} attempts"
        else:
            problems.append(f"{problem}. Fix: try again later, or pass --url")
    raise FetchError("; ".join(problems))


def _transfer(url: str, path: Path, name: str, limit: int, progress: bool) -> None:
    """Write the content of an address to a file.

    Raises:
        FetchError: the server rejects the request, sends too slowly, or sends more than ``limit`` bytes.
        requests.RequestException, urllib3.exceptions.HTTPError: the transfer broke.
    """
    slow = f"{name} arrives at less than {MIN_RATE // 1000} kB/s. Fix: try again later, or pass --url"
    begin, count = time.monotonic(), 0
    options = {"stream": True, "timeout": PATIENCE, "headers": {"Accept-Encoding": "identity"}}
    with requests.get(url, **options) as answer, path.open("wb") as file:  # type: ignore[arg-type]
        if not answer.ok and answer.status_code not in WORTH_A_RETRY:
            raise FetchError(f"{url}: HTTP {answer.status_code} {answer.reason}. Fix: pass a newer --url")
        answer.raise_for_status()
        total = answer.raw.length_remaining or 0
        _require_size(name, total, limit)
        if total > (free := shutil.disk_usage(path.parent).free):
            raise FetchError(
                f"{path.parent} has {free >> 20} MiB free, but {total >> 20} MiB are needed. Fix: make room"
            )
        hidden = None if progress else True
        with tqdm(total=total or None, desc=name, unit="B", unit_scale=True, disable=hidden, leave=False) as bar:
            while True:
                try:
                    block = answer.raw.read1(BLOCK)
                except urllib3.exceptions.ReadTimeoutError:
                    raise FetchError(slow) from None
                if not block:
                    break
                file.write(block)
                bar.update(len(block))
                count += len(block)
                _require_size(name, count, limit)
                seconds = time.monotonic() - begin
                if seconds > PATIENCE and count < MIN_RATE * seconds:
                    raise FetchError(slow)
    if count < total:
        raise requests.ConnectionError(f"{count} of {total} bytes arrived")


def _require_size(name: str, size: int, limit: int) -> None:
    if size > limit:
        raise FetchError(f"{name} has more than {limit} bytes. Fix: pass a newer --url")


def _parse_checksum(checksum: str | None) -> tuple[str, str]:
    """Return the algorithm and the digest of a checksum; without one, sha256 and an empty digest."""
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    known = hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}  # digests of these have no fixed length
    if algorithm not in known or (checksum and not expected):
        raise UserError(f"--checksum {checksum} is invalid: expected algorithm:hexdigest, such as sha256:0f3a...")
    return algorithm, expected.lower()


def verify(path: Path, size: int | None, checksum: str | None, source: str = "") -> str:
    """Return the checksum of a file. Raises FetchError if its size or checksum is not the expected one.

    ``source`` names the file in messages; default: its path.
    """
    name = source or path
    fix = "Fix: pass a newer --url" if source else "Fix: remove it and fetch it again"
    length = path.stat().st_size
    if size is not None and length != size:
        raise FetchError(f"{name} has {length} bytes, not {size}. {fix}")
    algorithm, expected = _parse_checksum(checksum)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, algorithm).hexdigest()
    if checksum and digest != expected:
        raise FetchError(f"{name} has {algorithm} {digest}, not {expected}. {fix}")
    return f"{algorithm}:{digest}"


def unpack(archive: Path, root: Path, inside: str = "") -> None:
    """Unpack a zip or tar file, and move the content of its folder ``inside`` into ``root``.

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
                file.extractall(temporary, filter="data")  # rejects paths, links and devices that leave the folder
        else:
            with archive.open("rb") as file:
                start = file.read(40)
            raise FetchError(
                f"{archive} is not a zip or tar file (it starts with {start!r}). Fix: remove it and fetch it again"
            )
        source = temporary / inside
        if not source.is_dir():
            raise FetchError(f"{archive} has no folder {inside}: the archive has changed. Fix: unpack it by hand")
        root.mkdir(parents=True, exist_ok=True)
        entries = sorted(source.iterdir())
        taken = [entry.name for entry in entries if (root / entry.name).exists()]
        if taken:
            raise UserError(f"{root} has {', '.join(taken)} already. Fix: remove it, or choose another --root")
        for entry in entries:
            os.replace(entry, root / entry.name)
    except BAD_ARCHIVE as error:
        raise FetchError(f"{archive} is damaged ({error}). Fix: remove it and fetch it again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def find_cityscapes_downloader() -> Any:
    """Return cityscapesscripts' downloader if it is installed and an account is stored, else None."""
    try:
        downloader = importlib.import_module("cityscapesscripts.download.downloader")
        folder = importlib.import_module("appdirs").user_data_dir("cityscapesscripts", "cityscapes")
    except ImportError:
        return None
    return downloader if (Path(folder) / "credentials.json").is_file() else None


def fetch_cityscapes(downloader: Any, root: Path, keep: bool = False) -> None:
    """Download and unpack the fine annotations and the images into a folder; a partial download is resumed.

    Raises:
        FetchError: the login or a download failed.
    """
    root.mkdir(parents=True, exist_ok=True)
    missing = {folder: name for folder, name in CITYSCAPES.items() if not (root / folder).is_dir()}
    try:
        session = downloader.login()
        downloader.download_packages(
            session=session, package_names=list(missing.values()), destination_path=str(root), resume=True
        )
    except Exception as error:  # the downloader raises plain Exception for nearly everything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FetchError(
            f"cityscapesscripts cannot download {', '.join(missing.values())} ({reason}). "
            "Fix: run the same command again to resume, or csDownload -l to check the account."
        ) from error
    for folder, name in missing.items():
        unpack(root / name, root / folder, folder)
        if not keep:
            (root / name).unlink()
