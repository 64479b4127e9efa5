"""Downloads that survive a broken line: resumed where they stopped, checked, unpacked aside, then renamed.

A transfer lies in FILE.part until its size and checksum are right. FILE.part.json remembers which version of
the file it is (ETag or Last-Modified), so that two versions are never glued together.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

BLOCK = 1 << 20
FOR_NOW = (408, 429, 500, 502, 503, 504)  # answers worth another try
BROKEN = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError)


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
    """
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
    """Try again until the file is complete, or until it makes no headway."""
    failed = 0
    while failed < attempts:
        before = _length(part)
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
        failed = 1 if _length(part) > before else failed + 1
        if failed < attempts:
            time.sleep(min(pause * 2 ** (failed - 1), 30))
    have = _length(part)
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
        _opener(archive)(archive, aside, progress)
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
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive} is damaged ({error}): remove it and fetch it again") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _opener(archive: Path) -> Callable[[Path, Path, bool], None]:
    if zipfile.is_zipfile(archive):
        return _unzip
    if tarfile.is_tarfile(archive):
        return _untar
    with archive.open("rb") as file:
        start = file.read(40)
    raise FetchError(f"{archive} is no archive (it starts with {start!r}): remove it and fetch it again")


def _unzip(archive: Path, target: Path, progress: bool) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in _bar(file.infolist(), progress):
            file.extract(member, target)  # zipfile strips .. and absolute paths, and checks the CRC


def _untar(archive: Path, target: Path, progress: bool) -> None:
    with tarfile.open(archive) as file:
        for member in _bar(file.getmembers(), progress):
            file.extract(member, target, filter="data")  # refuses paths and links that leave the folder


def _bar(members: Sequence, progress: bool) -> tqdm:
    return tqdm(members, desc="unpacking", unit="file", disable=None if progress else True, leave=False)
