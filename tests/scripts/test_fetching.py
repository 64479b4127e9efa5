"""Transfers that break, servers and archives that lie: what fetching makes of them, on a server of the test's own."""

from __future__ import annotations

import contextlib
import hashlib
import io
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.cli import run_cli
from configs.errors import UserError
from configs.files import lock_file
from scripts.prepare.fetching import FetchError, download, unpack
from scripts.prepare_data import main

# The lock's file stays: to remove it while another process waits for it would let two processes in.
LEFT = [".kvasir-seg.zip.lock", "Kvasir-SEG"]
SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


class Server(ThreadingHTTPServer):
    """Serves ``content``. ``breaks`` lists after how many bytes each of the first answers ends."""

    content = b""
    length: str | None = None  # Content-Length, if not the right one
    pause = 0.0  # seconds after each kilobyte
    hold: threading.Event | None = None  # answers wait for it

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks, self.failures, self.asked = list[int](), list[int](), 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked += 1
        if server.hold:
            server.hold.wait(60)
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        self.send_response(200)
        self.send_header("Content-Length", server.length or str(len(server.content)))
        self.end_headers()
        content = server.content[: server.breaks.pop(0) if server.breaks else None]
        with contextlib.suppress(OSError):
            for first in range(0, len(content), 1000 if server.pause else len(content)):
                self.wfile.write(content[first : first + 1000] if server.pause else content)
                time.sleep(server.pause)
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("scripts.prepare.fetching.PAUSE", 0)
    server = Server()
    server.content = np.random.default_rng(1).bytes(3_000_000)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(5)


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def get(server: Server, path: Path, **options: object) -> str:
    return download([server.url], path, progress=False, **options)  # type: ignore[arg-type]


def test_a_broken_transfer_is_tried_again(server: Server, tmp_path: Path) -> None:
    server.breaks = [1_000_000, 500_000]
    path = tmp_path / "a.zip"
    assert get(server, path, checksum=sha256(server.content)) == sha256(server.content)
    assert path.read_bytes() == server.content and server.asked == 3
    get(server, path)  # it is there: no request
    assert server.asked == 3
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_what_cannot_be_fetched_leaves_nothing(server: Server, tmp_path: Path) -> None:
    server.breaks = [1000] * 5
    with pytest.raises(FetchError, match=r"archive\.zip: .*after 5 attempts"):
        get(server, tmp_path / "a.zip")
    assert server.asked == 5
    with pytest.raises(FetchError, match="00ff"):
        get(server, tmp_path / "a.zip", checksum="md5:00ff")
    assert server.asked == 6
    with pytest.raises(FetchError, match="more than 10 bytes"):
        get(server, tmp_path / "a.zip", size=10)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", ["many", "-3", ""])
def test_a_header_that_lies_is_one_line(server: Server, tmp_path: Path, length: str) -> None:
    server.content, server.length = b"x" * 100, length
    with contextlib.suppress(FetchError):
        get(server, tmp_path / "a.zip", checksum=sha256(b"y"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pause", [0.05, 5])
def test_a_slow_server_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pause: float
) -> None:
    monkeypatch.setattr("scripts.prepare.fetching.PATIENCE", 0.5)
    monkeypatch.setattr("scripts.prepare.fetching.MIN_RATE", 1_000_000)
    server.pause = pause
    begin = time.monotonic()
    with pytest.raises(FetchError, match="kB/s"):
        get(server, tmp_path / "a.zip")
    assert time.monotonic() - begin < 4 and not list(tmp_path.iterdir())


def test_a_full_disk_is_reported_before_the_transfer(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = namedtuple("nearly_full", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: nearly_full)
    with pytest.raises(FetchError, match="0 MiB free, but 2 MiB are needed"):
        get(server, tmp_path / "a.zip")


@pytest.mark.parametrize("code", [404, 416])
def test_answers_that_will_not_change_end_at_once(server: Server, tmp_path: Path, code: int) -> None:
    server.failures = [code]
    with pytest.raises(FetchError, match=f"HTTP {code}"):
        get(server, tmp_path / "a.zip")
    assert server.asked == 1
    server.failures = [503, 503]
    get(server, tmp_path / "a.zip")
    assert server.asked == 4


def test_another_place_is_tried(server: Server, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9/archive.zip"
    download([dead, server.url], tmp_path / "a.zip", progress=False)
    assert (tmp_path / "a.zip").read_bytes() == server.content
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:9"):
        download([dead], tmp_path / "b.zip", progress=False)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"urls": ["garbage"]}, "--url garbage"),
        ({"urls": ["file:///etc/passwd"]}, "--url file"),
        ({"checksum": "md5"}, "--checksum md5"),
        ({"checksum": "crc7:00"}, "--checksum crc7"),
        ({"checksum": "shake_128:00"}, "--checksum shake_128"),  # its digests have no fixed length
    ],
)
def test_invalid_arguments_are_named(tmp_path: Path, arguments: dict, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}.*is invalid"):
        download(**{"urls": ["http://127.0.0.1:9/a"], "path": tmp_path / "a.zip", **arguments})


def kvasir_zip() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for k in range(20):
            for folder, mode in (("images", "RGB"), ("masks", "L")):
                picture = io.BytesIO()
                drawn = Image.new(mode, (16, 16))
                drawn.paste("white", (0, 0, 8, 16))
                drawn.save(picture, "JPEG", comment=f"{k}")
                archive.writestr(f"Kvasir-SEG/{folder}/p{k:02d}.jpg", picture.getvalue())
    return memory.getvalue()


def test_fetch_check_and_fetch_again(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    server.content, server.breaks = kvasir_zip(), [2000]
    root = tmp_path / "data" / "Kvasir-SEG"
    fetch = ["fetch", "kvasir_seg", "--root", str(root), "--url", server.url, "--quiet"]
    assert main(fetch) == 0
    assert sha256(server.content) in capsys.readouterr().err
    assert sorted(p.name for p in root.iterdir()) == ["images", "masks"]
    assert sorted(p.name for p in root.parent.iterdir()) == LEFT
    assert main(["check", "kvasir_seg", "--root", str(root), "--quiet"]) == 0
    assert "train 18, val 2 images" in capsys.readouterr().out
    asked = server.asked
    assert main(fetch) == 0 and server.asked == asked
    assert "there already" in capsys.readouterr().out


def test_a_second_fetch_is_rejected_and_a_dead_one_is_not_in_the_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content, server.hold = kvasir_zip(), threading.Event()
    root = tmp_path / "data" / "Kvasir-SEG"
    fetch = ["fetch", "kvasir_seg", "--root", str(root), "--url", server.url, "--quiet"]
    other = subprocess.Popen([sys.executable, str(SCRIPT), *fetch], stderr=subprocess.DEVNULL)
    while not server.asked:
        assert other.poll() is None
        time.sleep(0.01)
    monkeypatch.setattr(lock_file, "__defaults__", (0.1,))
    with pytest.raises(SystemExit) as done:
        run_cli(lambda: main(fetch))
    said = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 4 and server.asked == 1
    assert said.startswith(f"error: another process (pid {other.pid}) is fetching {root.parent}")
    other.kill()
    other.wait()
    server.hold.set()
    assert main(fetch) == 0
    assert sorted(p.name for p in root.parent.iterdir()) == LEFT


def test_fetch_says_what_to_do_for_cityscapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fetch", "cityscapes", "--root", str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    assert "register" in text and "gtFine_trainvaltest.zip" in text and str(tmp_path / "c") in text


def test_voc_is_pinned_by_size_and_checksum(server: Server, tmp_path: Path) -> None:
    server.content = b"not the archive"
    with pytest.raises(FetchError, match=r"archive\.zip|15 bytes"):
        main(["fetch", "voc2012", "--root", str(tmp_path / "voc"), "--url", server.url, "--quiet"])


def test_a_login_page_is_not_an_archive(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_text("<html><body>please log in</body></html>")
    with pytest.raises(FetchError, match="<html>"):
        unpack(path, tmp_path / "root")
    path.write_bytes(kvasir_zip()[:-4000])
    with pytest.raises(FetchError):
        unpack(path, tmp_path / "root")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def zipped(name: str, content: bytes) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return memory.getvalue()


def test_damage_and_encryption_are_named(tmp_path: Path) -> None:
    whole = zipped("a.txt", np.random.default_rng(0).integers(0, 9, 9000, dtype=np.uint8).tobytes())
    damaged, encrypted = bytearray(whole), bytearray(whole)
    damaged[200:300] = bytes(100)
    flags = whole.rindex(b"PK\x01\x02") + 8
    for position in (6, flags):
        encrypted[position] |= 1
    for content, reason in ((damaged, ""), (encrypted, "password")):
        (tmp_path / "a.zip").write_bytes(content)
        with pytest.raises(FetchError, match=rf"a\.zip is damaged \(.*{reason}"):
            unpack(tmp_path / "a.zip", tmp_path / "root")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_nothing_is_fetched_into_a_half_of_a_data_set(server: Server, tmp_path: Path) -> None:
    (tmp_path / "K" / "images").mkdir(parents=True)
    with pytest.raises(UserError, match="images but not masks"):
        main(["fetch", "kvasir_seg", "--root", str(tmp_path / "K"), "--url", server.url])
    assert not server.asked


@pytest.mark.parametrize("name", ["../../outside.txt", "/tmp/../outside.txt", "a/../../../outside.txt"])
def test_a_zip_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(name, b"evil"))
    unpack(tmp_path / "a.zip", tmp_path / "x" / "y" / "root")
    (outside,) = tmp_path.rglob("outside.txt")
    assert outside.is_relative_to(tmp_path / "x" / "y" / "root")


def test_links_and_devices_in_a_tar_cannot_leave_its_folder(tmp_path: Path) -> None:
    for kind, target in ((tarfile.SYMTYPE, "../../.."), (tarfile.LNKTYPE, "/etc/passwd"), (tarfile.CHRTYPE, "")):
        with tarfile.open(tmp_path / "evil.tar", "w") as archive:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = kind, target
            archive.addfile(member)
            through = tarfile.TarInfo("link/outside.txt")
            archive.addfile(through, io.BytesIO())
        with pytest.raises(FetchError, match="damaged"):
            unpack(tmp_path / "evil.tar", tmp_path / "a" / "root")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "evil.tar"]


def test_archives_cannot_write_outside_and_nothing_is_overwritten(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as archive:
        member = tarfile.TarInfo("../../outside.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(FetchError, match="damaged"):
        unpack(evil, tmp_path / "a" / "root")
    assert not list(tmp_path.rglob("outside.txt"))
    good = tmp_path / "good.tar"
    with tarfile.open(good, "w") as archive:
        member = tarfile.TarInfo("VOCdevkit/x.txt")
        archive.addfile(member, io.BytesIO(b""))
    unpack(good, tmp_path / "voc")
    (tmp_path / "voc" / "VOCdevkit" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="VOCdevkit already"):
        unpack(good, tmp_path / "voc")
    assert (tmp_path / "voc" / "VOCdevkit" / "mine.txt").read_text() == "precious"
