"""Downloads that survive a broken line: resumed where they stopped, checked, unpacked aside, then renamed.

A transfer lies in FILE.part until its size and checksum are right. FILE.part.json remembers which version of
the file it is (ETag or Last-Modified), so that two versions are never glued together.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import lzma
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

BLOCK = 1 << 20
SCHEMES = ("https://", "http://", "ftp://", "file://")
FOR_NOW = (408, 429, 500, 502, 503, 504)  # answers worth another try
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)
BAD_ARCHIVE = (
    zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError,
    RuntimeError,  # what zipfile says of encryption and of methods that it does not know
)  # fmt: skip


class FetchError(OSError):
    """A file could not be fetched; the message names it and what to do."""


def download(
    urls: Sequence[str],
    path: Path,
    *,
    size: int | None = None,
    checksum: str | None = None,
    attempts: int = 5,
    pause: float = 1.0,
    timeout: float = 30.0,
    progress: bool = True,
) -> str:
    """Fetch a file into ``path`` and return its ``sha256:...``; a file that is there and right is kept.

    Args:
        urls: the same file at several places, tried in this order.
        size, checksum: bytes and ``algorithm:hexdigest``, where known.
        attempts: how many tries without a single new byte, per place, before giving up.
        pause: seconds before the second try, doubled with each, at most 30.

    Raises:
        FetchError: no place gave the file; what arrived stays for the next call, unless it was wrong.
        ValueError: one of the addresses is none.
    """
    for url in urls:
        if not url.startswith(SCHEMES):
            raise ValueError(f"{url} is no address: give one that begins with {' or '.join(SCHEMES)}")
    if path.exists():
        return verified(path, size, checksum)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    problems = []
    for url in urls:
        try:
            _persist(url, part, size, attempts, pause, timeout, progress)
            digest = verified(part, size, checksum)
            os.replace(part, path)
            _note(part).unlink(missing_ok=True)
            return digest
        except FetchError as error:
            problems.append(str(error))
    raise FetchError("; ".join(problems))


def _persist(
    url: str, part: Path, size: int | None, attempts: int, pause: float, timeout: float, progress: bool
) -> None:
    """Try again until the file is complete, or until it grows no longer."""
    if attempts < 1:
        raise ValueError(f"attempts={attempts}: give 1 or more")
    failed, longest = 0, _length(part)
    while failed < attempts:
        try:
            if _transfer(url, part, size, timeout, progress):
                return
            problem = "the connection ended early"
        except urllib.error.HTTPError as error:
            problem = f"HTTP {error.code} {error.reason}"
            if error.code not in FOR_NOW:
                raise FetchError(f"{url}: {problem}; is there a newer address? pass it with --url") from error
        except BROKEN as error:
            problem = str(getattr(error, "reason", "")) or str(error) or type(error).__name__
        # Longer than ever, not than before: a server that cannot resume may break off here and there for ever.
        failed, longest = (1, _length(part)) if _length(part) > longest else (failed + 1, longest)
        if failed < attempts:
            time.sleep(min(pause * 2 ** (failed - 1), 30))
    have = _length(part) if _version(part, url) else 0
    kept = f"; {have} bytes are kept, the same command goes on from there" if have else ""
    raise FetchError(f"{url}: {problem}, {attempts} times{kept}")


def _transfer(url: str, part: Path, size: int | None, timeout: float, progress: bool) -> bool:
    """One request; append what arrives. Return whether the file is complete."""
    have, version = _length(part), _version(part, url)
    if size is not None and have == size:
        return True
    if have and not version:
        have = 0  # unknown what was begun: start over
    headers = {"User-Agent": "rankseg-repro", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    try:
        answer = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        part.unlink()  # longer than the file there is: another version
        return False
    with answer:
        resumed = answer.status == 206 and (answer.headers.get("Content-Range") or "").startswith(
            f"bytes {have}-"
        )
        if answer.status == 206 and not resumed:
            raise FetchError(f"{url}: the server sent another part than was asked for; remove {part}")
        start = have if resumed else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else size
        _note(part).write_text(json.dumps({"url": url, "version": _tag(answer.headers)}))
        _require_space(part, (total or 0) - start)
        bar = tqdm(
            desc=part.name.removesuffix(".part"), total=total, initial=start, unit="B", unit_scale=True,
            disable=None if progress else True, leave=False,
        )  # fmt: skip
        with bar, part.open("ab" if resumed else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
        return total is None or _length(part) == total


def _tag(headers: http.client.HTTPMessage) -> str:
    """What tells versions of a file apart; a weak ETag does not."""
    tag = headers.get("ETag") or ""
    return headers.get("Last-Modified") or "" if not tag or tag.startswith("W/") else tag


def _note(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _version(part: Path, url: str) -> str:
    try:
        noted = json.loads(_note(part).read_text())
        return str(noted["version"]) if noted["url"] == url else ""
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise FetchError(
            f"{path.parent} has {free >> 20} MiB free and {needed >> 20} MiB are needed: make room"
        )


def verified(path: Path, size: int | None, checksum: str | None) -> str:
    """Return ``sha256:...`` of a file that is what it should be.

    Raises:
        FetchError: size or checksum differ; the file is removed, because resuming would not mend it.
        ValueError: the checksum is not ``algorithm:hexdigest``.
    """
    algorithm, _, expected = (checksum or "sha256:").partition(":")
    if algorithm not in hashlib.algorithms_guaranteed or (checksum and not expected):
        raise ValueError(f"checksum {checksum!r} is not algorithm:hexdigest, such as sha256:0f3a...")
    named, sha256 = hashlib.new(algorithm), hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            named.update(block)
            sha256.update(block)
    length = _length(path)
    if size is not None and length != size:
        path.unlink()
        raise FetchError(f"{path} had {length} bytes instead of {size} and was removed: fetch it again")
    if checksum and named.hexdigest() != expected.lower():
        path.unlink()
        raise FetchError(
            f"{path} had {algorithm} {named.hexdigest()}, not {expected}, and was removed: fetch it again"
        )
    return f"sha256:{sha256.hexdigest()}"


def unpack(archive: Path, root: Path, inside: str = "", progress: bool = True) -> None:
    """Unpack a zip or tar file so that the content of its folder ``inside`` becomes ``root``.

    It is unpacked beside ``root`` and moved when complete, so an interruption leaves no half of a data set.

    Raises:
        FetchError: the file is no archive, is damaged, or lacks ``inside``.
        ValueError: something of the same name lies in ``root`` already.
    """
    aside = root.with_name(f".{root.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with _opener(archive)(archive) as (members, size, extract):
            _require_space(aside, size)
            bar = tqdm(members, "unpacking", unit="file", disable=None if progress else True, leave=False)
            for member in bar:
                extract(member, aside)
        source = aside / inside
        if not source.is_dir():
            raise FetchError(
                f"{archive} holds no folder {inside}: the archive has changed; unpack it by hand"
            )
        root.mkdir(parents=True, exist_ok=True)
        entries = sorted(source.iterdir())
        taken = [entry.name for entry in entries if (root / entry.name).exists()]
        if taken:
            raise ValueError(f"{root} holds {', '.join(taken)} already: remove it, or choose another --root")
        for entry in entries:
            os.replace(entry, root / entry.name)
    except BAD_ARCHIVE as error:
        raise FetchError(f"{archive} is damaged ({error}): remove it and fetch it again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


Opened = tuple[Sequence[Any], int, Callable[[Any, Path], Any]]  # members, their bytes, and how to unpack one


def _opener(archive: Path) -> Callable[[Path], contextlib.AbstractContextManager[Opened]]:
    if zipfile.is_zipfile(archive):
        return _zip
    if tarfile.is_tarfile(archive):
        return _tar
    with archive.open("rb") as file:
        start = file.read(40)
    raise FetchError(f"{archive} is no archive (it starts with {start!r}): remove it and fetch it again")


@contextlib.contextmanager
def _zip(archive: Path) -> Iterator[Opened]:
    with zipfile.ZipFile(archive) as file:
        members = file.infolist()
        # extract() strips .. and absolute paths, makes no links, and checks the CRC.
        yield members, sum(member.file_size for member in members), file.extract


@contextlib.contextmanager
def _tar(archive: Path) -> Iterator[Opened]:
    if not hasattr(tarfile, "data_filter"):  # Python before 3.10.12 and 3.11.4
        raise FetchError(f"this Python cannot unpack {archive} safely: update it, or unpack by hand")
    with tarfile.open(archive) as file:
        members = file.getmembers()  # the filter refuses paths, links and devices that leave the folder
        yield members, sum(member.size for member in members), partial(file.extract, filter="data")
