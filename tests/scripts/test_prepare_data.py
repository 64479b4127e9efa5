"""Data preparation: faults that must be found, transfers that break, splits and statistics."""

from __future__ import annotations

import hashlib
import io
import json
import re
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import Folder
from datasets.kvasir_seg import default_split
from scripts.parallel import ahead
from scripts.prepare.fetching import FetchError, download, unpack
from scripts.prepare.splitting import make_split, write_split
from scripts.prepare.totals import count
from scripts.prepare_data import main


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A folder data set of 10 pairs without a fault: images 0..7 to train, 8 and 9 to validate."""
    root = tmp_path / "mine"
    generator = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for k in range(10):
        pixels = generator.integers(0, 256, (20 + k, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"i{k}.png")
        Image.fromarray(generator.integers(0, 2, (20 + k, 30), dtype=np.uint8)).save(
            root / "masks" / f"i{k}.png"
        )
    (root / "classes.yaml").write_text("classes: [background, lesion]\n")
    (root / "train.txt").write_text("".join(f"i{k}\n" for k in range(8)))
    (root / "val.txt").write_text("i8\ni9\n")
    return root


def check(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict]:
    code = main(["check", "folder", "--root", str(root), "--json", "--quiet", "--workers", "2", *options])
    return code, json.loads(capsys.readouterr().out)


def test_check_passes_a_sound_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check(mine, capsys)
    assert (
        code == 0 and report["ok"] and report["faults"] == [] and report["splits"] == {"train": 8, "val": 2}
    )


def spoil_truncated(root: Path) -> Path:
    path = root / "images" / "i1.png"
    path.write_bytes(path.read_bytes()[:300])
    return path


def spoil_text(root: Path) -> Path:
    path = root / "images" / "i2.png"
    path.write_text("<html>404</html>")
    return path


def spoil_missing_mask(root: Path) -> Path:
    path = root / "masks" / "i3.png"
    path.unlink()
    return path


def spoil_size(root: Path) -> Path:
    Image.new("L", (4, 4)).save(root / "masks" / "i4.png")
    return root / "images" / "i4.png"


def spoil_label(root: Path) -> Path:
    Image.new("L", (30, 29), 7).save(root / "masks" / "i9.png")
    return root / "masks" / "i9.png"


def spoil_orphan(root: Path) -> Path:
    Image.new("L", (4, 4)).save(root / "masks" / "nobody.png")
    return root / "masks" / "nobody.png"


def spoil_copy(root: Path) -> Path:
    for name in ("images", "masks"):
        (root / name / "copy.png").write_bytes((root / name / "i5.png").read_bytes())
    (root / "train.txt").write_text((root / "train.txt").read_text() + "copy\n")
    return root / "images" / "copy.png"


def spoil_leaked_copy(root: Path) -> Path:
    path = root / "images" / "i9.png"
    path.write_bytes((root / "images" / "i0.png").read_bytes())
    (root / "masks" / "i9.png").write_bytes((root / "masks" / "i0.png").read_bytes())
    return path


def spoil_leaked_name(root: Path) -> Path:
    (root / "val.txt").write_text("i8\ni9\ni0\n")
    return root / "images" / "i0.png"


def spoil_listed_twice(root: Path) -> Path:
    (root / "val.txt").write_text("i8\ni9\ni9\n")
    return root / "images" / "i9.png"


def spoil_stem(root: Path) -> Path:
    Image.new("RGB", (30, 25)).save(root / "images" / "i5.bmp")
    (root / "masks" / "i5.png").unlink()
    Image.new("L", (30, 25)).save(root / "masks" / "i5.png")
    return root / "images" / "i5.bmp"


@pytest.mark.parametrize(
    ("spoil", "kind"),
    [
        (spoil_truncated, "pair"),
        (spoil_text, "pair"),
        (spoil_missing_mask, "pair"),
        (spoil_size, "pair"),
        (spoil_label, "pair"),
        (spoil_orphan, "partner"),
        (spoil_copy, "duplicate"),
        (spoil_leaked_copy, "leak"),
        (spoil_leaked_name, "leak"),
        (spoil_listed_twice, "duplicate"),
        (spoil_stem, "duplicate"),
    ],
)
def test_check_names_every_fault(
    mine: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[Path], Path], kind: str
) -> None:
    path = spoil(mine)
    code, report = check(mine, capsys)
    assert code == 1 and not report["ok"]
    assert [(fault["kind"], fault["path"]) for fault in report["faults"]] == [(kind, str(path))]
    assert path.name in report["faults"][0]["message"]


def test_check_lists_many_faults_at_once_and_what_no_split_uses(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoiled = {str(spoil(mine)) for spoil in (spoil_truncated, spoil_text, spoil_missing_mask, spoil_label)}
    Image.new("RGB", (5, 5)).save(mine / "images" / "extra.png")
    code, report = check(mine, capsys)
    assert code == 1 and {fault["path"] for fault in report["faults"]} == spoiled
    assert "extra.png" in report["notes"][0]
    assert main(["check", "folder", "--root", str(mine), "--quiet"]) == 1
    text = capsys.readouterr().out
    assert all(path in text for path in spoiled) and "4 faults" in text


def test_check_notices_masks_of_0_and_255_only(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (mine / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) * np.uint8(255)).save(path)
    code, report = check(mine, capsys)
    assert code == 1 and "value: 255" in report["faults"][0]["message"]


def test_list_knows_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert set(known) == {"voc2012", "kvasir_seg", "cityscapes", "folder"}
    assert [name for name, entry in known.items() if entry["fetch"]] == ["voc2012", "kvasir_seg"]
    assert main(["list"]) == 0
    assert "Flickr" in capsys.readouterr().out


def test_stats_are_those_of_all_pixels(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", "folder", "--root", str(mine), "--json", "--quiet", "--workers", "3"]) == 0
    result = json.loads(capsys.readouterr().out)["train"]
    pixels, labels = [], []
    for k in range(8):
        pixels.append(np.asarray(Image.open(mine / "images" / f"i{k}.png")).reshape(-1, 3) / 255)
        labels.append(np.asarray(Image.open(mine / "masks" / f"i{k}.png")).ravel())
    everything, every_label = np.concatenate(pixels), np.concatenate(labels)
    np.testing.assert_allclose(result["mean"], everything.mean(0), atol=1e-8)
    np.testing.assert_allclose(result["std"], everything.std(0), atol=1e-8)
    assert [row["pixels"] for row in result["classes"]] == np.bincount(every_label).tolist()
    assert result["classes"][1]["share"] == pytest.approx(every_label.mean())
    assert result["height"] == [20, 27] and result["classes"][0]["images"] == 8


def test_stats_do_not_depend_on_workers(mine: Path) -> None:
    data = Folder(mine, "train")
    one, four = (count(data, workers, progress=False) for workers in (1, 4))
    assert torch.equal(one.pixels, four.pixels) and torch.equal(one.labels, four.labels)


def test_split_without_options_is_the_pinned_one_of_kvasir() -> None:
    stems = [f"cju{k:04d}" for k in range(100)]
    assert make_split(stems, {"val": 0.12}) == default_split(stems)


def test_split_is_a_partition_that_keeps_groups_together() -> None:
    stems = [f"p{k % 12}_{k}" for k in range(60)]
    split = make_split(stems, {"val": 0.2, "test": 0.2}, group=r"^(p\d+)_")
    assert sorted(stem for names in split.values() for stem in names) == sorted(stems)
    patients = [{stem.split("_")[0] for stem in names} for names in split.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12
    assert {name: len(names) for name, names in split.items()} == {"train": 30, "val": 15, "test": 15}
    assert make_split(stems[::-1], {"val": 0.2, "test": 0.2}, group=r"^(p\d+)_") == split
    assert make_split(stems, {"val": 0.2, "test": 0.2}, seed=1) != make_split(
        stems, {"val": 0.2, "test": 0.2}
    )


@pytest.mark.parametrize(
    ("stems", "shares", "group", "message"),
    [
        (["a", "b"], {"val": 1.2}, None, "between 0 and 1"),
        (["a"], {"val": 0.5}, None, "add images"),
        (["a", "b"], {"val": 0.5}, "[0-9", "regular expression"),
        (["a", "b"], {"val": 0.5}, "z", "finds nothing in 'a'"),
    ],
)
def test_impossible_splits_are_refused(
    stems: list[str], shares: dict[str, float], group: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_split(stems, shares, group=group)


def test_split_files_are_not_replaced_unasked(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (mine / "val.txt").read_text()
    with pytest.raises(ValueError, match="--force"):
        main(["split", str(mine), "--val", "0.3"])
    assert (mine / "val.txt").read_text() == before
    assert main(["split", str(mine), "--val", "0.3", "--test", "0.2", "--force", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"train": 5, "val": 3, "test": 2}
    write_split(
        mine, make_split([f"i{k}" for k in range(10)], {"val": 0.3, "test": 0.2})
    )  # the same: no error
    assert check(mine, capsys)[1]["splits"] == {"train": 5, "val": 3, "test": 2}


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``breaks`` lists after how many bytes each of the first answers ends."""

    content = b""
    etag = '"one"'
    breaks: list[int]
    ranges = True
    failures: list[int]

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


def test_work_ahead_is_in_order_bounded_and_hands_on_exceptions() -> None:
    begun: list[int] = []

    def work(k: int) -> int:
        begun.append(k)
        if k == 7:
            raise RuntimeError("seven")
        return k * k

    results = ahead(work, range(100), workers=3)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert max(begun) <= 3 + 4
    with pytest.raises(RuntimeError, match="seven"):
        list(results)
    assert max(begun) < 20


@pytest.mark.golden
def test_real_images_are_sound(shared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = shared / "data"
    assert main(["check", "voc2012", "--root", str(root), "--split", "val", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"val": 321}
