"""Transfers that break, servers and archives that lie: what fetching makes of them, on a server of the test's own."""

from __future__ import annotations

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

from configs.cli import guarded
from scripts.prepare.fetching import FetchError, download, unpack
from scripts.prepare_data import main
from trainers.lock import Lock

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "prepare_data.py"


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``breaks`` lists after how many bytes each of the first answers ends."""

    content = b""
    etag = '"one"'
    breaks: list[int]
    ranges = True
    failures: list[int]
    hold: threading.Event | None = None  # answers wait for it

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.breaks, self.failures, self.asked = [], [], list[str | None]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/archive.zip"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, asked = self.server, self.headers.get("Range")
        server.asked.append(asked)
        if server.hold:
            server.hold.wait(60)
        if server.failures:
            self.send_error(server.failures.pop(0))
            return
        content, start = server.content, 0
        if asked and server.ranges and self.headers.get("If-Range") == server.etag:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content) - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        self.end_headers()
        end = server.breaks.pop(0) if server.breaks else len(content)
        self.wfile.write(content[start : start + end])
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
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
    return download([server.url], path, pause=0.01, timeout=5, progress=False, **options)  # type: ignore[arg-type]


def test_a_broken_transfer_goes_on_where_it_stopped(server: Server, tmp_path: Path) -> None:
    server.breaks = [1_000_000, 500_000]
    path = tmp_path / "a.zip"
    assert get(server, path, checksum=sha256(server.content)) == sha256(server.content)
    assert path.read_bytes() == server.content
    assert server.asked == [None, "bytes=1000000-", "bytes=1500000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_the_next_call_goes_on_where_the_last_gave_up(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    server.breaks = [1_000_000, 0, 0, 0]
    with pytest.raises(FetchError, match="1000000 bytes are kept"):
        get(server, path, attempts=3)
    assert not path.exists() and len(server.asked) == 3
    server.breaks, server.asked = [], []
    get(server, path)
    assert path.read_bytes() == server.content and server.asked == ["bytes=1000000-"]
    get(server, path)  # there and right: no request
    assert len(server.asked) == 1


def test_two_versions_are_never_glued_together(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    server.breaks = [1_000_000, 0]
    with pytest.raises(FetchError):
        get(server, path, attempts=1)
    server.etag, server.content, server.breaks = '"two"', server.content[::-1], []
    get(server, path)
    assert path.read_bytes() == server.content


@pytest.mark.parametrize("etag", ['"one"', "", 'W/"weak"'])
def test_servers_that_cannot_resume_start_over(server: Server, tmp_path: Path, etag: str) -> None:
    server.ranges, server.etag, server.breaks = False, etag, [700_000]
    path = tmp_path / "a.zip"
    get(server, path)
    assert path.read_bytes() == server.content


def test_a_server_that_breaks_off_here_and_there_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges, server.breaks = False, [700_000, 600_000] * 50
    with pytest.raises(FetchError, match="ended early, 4 times"):
        get(server, tmp_path / "a.zip", attempts=4)
    assert len(server.asked) == 4  # 700 kB once, and then nothing that is longer
    with pytest.raises(ValueError, match="attempts=0"):
        get(server, tmp_path / "b.zip", attempts=0)


def test_a_full_disk_is_said_before_and_while_writing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    part = tmp_path / "kvasir-seg.zip.part"
    part.symlink_to("/dev/full")
    fetch = ["fetch", "kvasir_seg", "--root", str(tmp_path / "K"), "--url", server.url, "--quiet"]
    with pytest.raises(SystemExit) as done:
        guarded(lambda: main(fetch))
    assert done.value.code == 3 and "No space left on device" in capsys.readouterr().err
    part.unlink()
    nearly_full = namedtuple("nearly_full", "total used free")(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr("shutil.disk_usage", lambda path: nearly_full)
    with pytest.raises(FetchError, match="0 MiB free and 2 MiB are needed: make room"):
        get(server, tmp_path / "a.zip")
    archive = tmp_path / "b.zip"
    archive.write_bytes(zipped("a.txt", bytes(2 << 20)))
    with pytest.raises(FetchError, match="2 MiB are needed"):
        unpack(archive, tmp_path / "root", progress=False)
    assert not (tmp_path / "root").exists()


def test_a_shorter_file_than_what_was_kept_starts_over(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    server.breaks = [2_000_000, 0]
    with pytest.raises(FetchError):
        get(server, path, attempts=1)
    server.content, server.breaks = server.content[:500_000], []
    get(server, path)
    assert path.read_bytes() == server.content


def test_a_wrong_file_is_removed_and_said_so(server: Server, tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"md5 .* not 00ff, and was removed"):
        get(server, tmp_path / "a.zip", checksum="md5:00ff")
    with pytest.raises(FetchError, match="3000000 bytes instead of 10"):
        get(server, tmp_path / "a.zip", size=10)
    assert not list(tmp_path.glob("*.zip*part"))


def test_answers_that_will_not_change_end_at_once(server: Server, tmp_path: Path) -> None:
    server.failures = [404]
    with pytest.raises(FetchError, match="HTTP 404"):
        get(server, tmp_path / "a.zip")
    assert len(server.asked) == 1
    server.failures = [503, 503]
    get(server, tmp_path / "a.zip")
    assert len(server.asked) == 4


def test_another_place_is_tried(server: Server, tmp_path: Path) -> None:
    dead = "http://127.0.0.1:9/archive.zip"
    options = {"attempts": 1, "pause": 0.01, "timeout": 5, "progress": False}
    download([dead, server.url], tmp_path / "a.zip", **options)
    assert (tmp_path / "a.zip").read_bytes() == server.content
    with pytest.raises(FetchError, match=r"127\.0\.0\.1:9"):
        download([dead], tmp_path / "b.zip", **options)


def test_what_is_no_address_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="garbage is no address: give one that begins with https://"):
        download(["garbage"], tmp_path / "a.zip")


def kvasir_zip() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for k in range(20):
            for folder, mode in (("images", "RGB"), ("masks", "L")):
                picture = io.BytesIO()
                Image.new(mode, (16, 16), k * 255 // 20).save(picture, "JPEG", comment=f"{k}")
                archive.writestr(f"Kvasir-SEG/{folder}/p{k:02d}.jpg", picture.getvalue())
    return memory.getvalue()


def test_fetch_check_and_fetch_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content, server.breaks = kvasir_zip(), [2000]
    root = tmp_path / "data" / "Kvasir-SEG"
    fetch = ["fetch", "kvasir_seg", "--root", str(root), "--url", server.url, "--quiet"]
    assert main(fetch) == 0
    assert sha256(server.content) in capsys.readouterr().err
    assert sorted(p.name for p in root.iterdir()) == ["images", "masks"]
    assert [p.name for p in root.parent.iterdir()] == ["Kvasir-SEG"]
    assert main(["check", "kvasir_seg", "--root", str(root), "--quiet"]) == 0
    assert "train 18, val 2 images" in capsys.readouterr().out
    asked = len(server.asked)
    assert main(fetch) == 0 and len(server.asked) == asked
    assert "there already" in capsys.readouterr().out


def test_a_second_fetch_is_refused_and_a_dead_one_is_not_in_the_way(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    server.content, server.hold = kvasir_zip(), threading.Event()
    root = tmp_path / "data" / "Kvasir-SEG"
    fetch = ["fetch", "kvasir_seg", "--root", str(root), "--url", server.url, "--quiet"]
    other = subprocess.Popen([sys.executable, str(SCRIPT), *fetch], stderr=subprocess.DEVNULL)
    while not server.asked:
        assert other.poll() is None
        time.sleep(0.01)
    monkeypatch.setattr(Lock.__init__, "__defaults__", (0.1,))
    with pytest.raises(SystemExit) as done:
        guarded(lambda: main(fetch))
    said = capsys.readouterr().err.splitlines()[-1]
    assert done.value.code == 4 and len(server.asked) == 1
    assert said.startswith(f"error: another process (pid {other.pid}) is fetching {root.parent}")
    other.kill()
    other.wait()
    server.hold.set()
    assert main(fetch) == 0
    assert [p.name for p in root.parent.iterdir()] == ["Kvasir-SEG"]


def test_fetch_says_what_to_do_for_cityscapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fetch", "cityscapes", "--root", str(tmp_path / "c")]) == 0
    text = capsys.readouterr().out
    assert "register" in text and "gtFine_trainvaltest.zip" in text and str(tmp_path / "c") in text


def test_voc_is_pinned_by_size_and_checksum(server: Server, tmp_path: Path) -> None:
    server.content = b"not the archive"
    with pytest.raises(FetchError, match="15 bytes instead of 1999639040"):
        main(
            [
                "fetch",
                "voc2012",
                "--root",
                str(tmp_path / "voc"),
                "--url",
                server.url,
                "--quiet",
                "--attempts",
                "1",
            ]
        )


def test_a_login_page_is_no_archive(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_text("<html><body>please log in</body></html>")
    with pytest.raises(FetchError, match="<html>"):
        unpack(path, tmp_path / "root")
    path.write_bytes(kvasir_zip()[:-4000])
    with pytest.raises(FetchError):
        unpack(path, tmp_path / "root", progress=False)
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
        with pytest.raises(FetchError, match=rf"a\.zip is damaged \(.*{reason}.*remove it and fetch"):
            unpack(tmp_path / "a.zip", tmp_path / "root", progress=False)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_a_half_of_a_data_set_is_no_place_to_fetch_to(server: Server, tmp_path: Path) -> None:
    (tmp_path / "K" / "images").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds images without masks"):
        main(["fetch", "kvasir_seg", "--root", str(tmp_path / "K"), "--url", server.url])
    assert not server.asked


@pytest.mark.parametrize("name", ["../../outside.txt", "/tmp/../outside.txt", "a/../../../outside.txt"])
def test_a_zip_stays_in_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(name, b"evil"))
    unpack(tmp_path / "a.zip", tmp_path / "x" / "y" / "root", progress=False)
    (outside,) = tmp_path.rglob("outside.txt")
    assert outside.is_relative_to(tmp_path / "x" / "y" / "root")


def test_links_and_devices_in_a_tar_cannot_leave_its_folder(tmp_path: Path) -> None:
    for kind, target in (
        (tarfile.SYMTYPE, "../../.."),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.CHRTYPE, ""),
    ):
        with tarfile.open(tmp_path / "evil.tar", "w") as archive:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = kind, target
            archive.addfile(member)
            through = tarfile.TarInfo("link/outside.txt")
            archive.addfile(through, io.BytesIO())
        with pytest.raises(FetchError, match="damaged"):
            unpack(tmp_path / "evil.tar", tmp_path / "a" / "root", progress=False)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a", "evil.tar"]


def test_archives_cannot_write_outside_and_nothing_is_overwritten(tmp_path: Path) -> None:
    evil = tmp_path / "evil.tar"
    with tarfile.open(evil, "w") as archive:
        member = tarfile.TarInfo("../../outside.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"evil"))
    with pytest.raises(FetchError, match="damaged"):
        unpack(evil, tmp_path / "a" / "root", progress=False)
    assert not list(tmp_path.rglob("outside.txt"))
    good = tmp_path / "good.tar"
    with tarfile.open(good, "w") as archive:
        member = tarfile.TarInfo("VOCdevkit/x.txt")
        archive.addfile(member, io.BytesIO(b""))
    unpack(good, tmp_path / "voc", progress=False)
    (tmp_path / "voc" / "VOCdevkit" / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds VOCdevkit already"):
        unpack(good, tmp_path / "voc", progress=False)
    assert (tmp_path / "voc" / "VOCdevkit" / "mine.txt").read_text() == "precious"
