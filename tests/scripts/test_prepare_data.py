"""Data preparation: faults that must be found, splits and statistics, commands that can be typed."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs.compose import compose
from configs.errors import UserError
from datasets import DatasetError
from datasets.decode import make_split
from datasets.folder import Folder
from scripts.common import map_in_threads
from scripts.prepare.checking import count
from scripts.prepare_data import main, write_split

ROOT = Path(__file__).resolve().parents[2]


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
        Image.fromarray(generator.integers(0, 2, (20 + k, 30), dtype=np.uint8)).save(root / "masks" / f"i{k}.png")
    (root / "classes.yaml").write_text("classes: [background, lesion]\n")
    (root / "train.txt").write_text("".join(f"i{k}\n" for k in range(8)))
    (root / "val.txt").write_text("i8\ni9\n")
    return root


def check(root: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, dict]:
    code = main(["check", "folder", "--root", str(root), "--json", "--quiet", "--workers", "2", *options])
    return code, json.loads(capsys.readouterr().out)


def test_check_passes_a_sound_folder(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = check(mine, capsys)
    assert code == 0 and report["ok"] and report["faults"] == [] and report["splits"] == {"train": 8, "val": 2}


def test_check_does_not_hide_a_test_split_that_cannot_be_opened(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "test.txt").write_bytes(b"\0")
    with pytest.raises(DatasetError, match=r"test\.txt is not a text file"):
        check(mine, capsys)


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


def test_check_lists_many_faults_at_once_and_what_no_split_uses(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
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
    spoiled = {str(spoil(mine)) for spoil in (spoil_truncated, spoil_missing_mask, spoil_size, spoil_orphan)}
    code, report = check(mine, capsys)
    whole = [fault["message"] for fault in report["faults"] if fault["kind"] == "set"]
    assert {fault["path"] for fault in report["faults"]} == {*spoiled, str(mine)}
    assert len(whole) == 2 and all("add `value: 255`" in text for text in whole)


def test_one_mask_with_another_label_shows_that_255_is_void(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (mine / "masks").iterdir():
        Image.fromarray(np.array(Image.open(path)) * np.uint8(255)).save(path)
    for name in ("i7", "i9"):
        mask = np.array(Image.open(mine / "masks" / f"{name}.png"))
        mask[0, 0] = 1
        Image.fromarray(mask).save(mine / "masks" / f"{name}.png")
    assert check(mine, capsys)[0] == 0


def test_a_label_255_outside_the_table_has_a_remedy(mine: Path) -> None:
    (mine / "classes.yaml").write_text("classes: [background, lesion]\nignore_index: 254\n")
    Image.new("L", (30, 20), 255).save(mine / "masks" / "i0.png")
    with pytest.raises(DatasetError, match=r"holds labels 255.*add `value: 255`"):
        Folder(mine, "train").read(0)


def test_what_is_printed_to_be_typed_can_be_typed(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = mine.with_name("Bilder für alle (neu)")
    mine.rename(there)
    assert main(["check", "folder", "--root", str(there), "--quiet"]) == 0
    line = capsys.readouterr().out.rpartition("train on it: ")[2]
    words = [word for word in shlex.split(line) if "=" in word]
    assert compose("train", words).dataset.root == str(there)
    (there / "train.txt").unlink()
    with pytest.raises(DatasetError, match=r"prepare_data\.py split ") as raised:
        main(["check", "folder", "--root", str(there)])
    command = shlex.split(str(raised.value).split("`")[1])
    assert main([*command[2:], "--force", "--quiet"]) == 0


def test_values_in_a_message_are_all_that_the_table_has(mine: Path) -> None:
    (mine / "classes.yaml").write_text("classes: [background, {name: disc, value: 255}]")
    Image.new("L", (30, 25), 1).save(mine / "masks" / "i0.png")
    with pytest.raises(DatasetError, match=r"holds labels 1.*the table has 0, 255"):
        Folder(mine, "train").read(0)


def test_options_that_a_data_set_does_not_use_are_rejected() -> None:
    for words in (["fetch", "cityscapes", "--url", "http://x"], ["check", "kvasir_seg", "--classes", "c.yaml"]):
        with pytest.raises(UserError, match=f"{words[2]}.*{words[1]}"):
            main(words)


def test_data_of_your_own_cannot_be_fetched() -> None:
    with pytest.raises(UserError, match=r"fetch folder is invalid: .*your own.* Fix: "):
        main(["fetch", "folder"])


def test_list_knows_every_data_set(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert set(known) == {"voc2012", "kvasir_seg", "cityscapes", "folder"}
    assert [name for name, entry in known.items() if entry["fetch"]] == ["voc2012", "kvasir_seg"]
    assert main(["list"]) == 0
    assert "Flickr" in capsys.readouterr().out


def test_what_reads_no_pixel_does_not_wait_for_torch(mine: Path, tmp_path: Path) -> None:
    """One process runs the commands. In it, an import of torch is an exit with a text."""
    for name in ("torch", "torchvision"):
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')\n")
    commands = ["--help", "split mine --force", "fetch cityscapes", "check --help"]
    (tmp_path / "all.py").write_text(f"""
import runpy, sys
for words in {commands}:
    sys.argv = [{str(ROOT / "scripts" / "prepare_data.py")!r}, *words.split()]
    print("<", end="")
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as done:
        assert not done.code, (words, done)
""")
    done = subprocess.run([sys.executable, "all.py"], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    printed = re.split("^<", done.stdout, flags=re.MULTILINE)[1:]
    assert len(printed) == len(commands) and all(printed)


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
    assert one == four


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
@pytest.mark.timeout(30)
def test_a_pipe_in_place_of_a_split_file_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "train.txt")
    with pytest.raises(UserError, match=r"train\.txt"):
        write_split(tmp_path, {"train": ["a"]})
    write_split(tmp_path, {"train": ["a"]}, force=True)
    assert (tmp_path / "train.txt").read_text() == "a\n"


def test_split_is_a_partition_that_keeps_groups_together() -> None:
    stems = [f"p{k % 12}_{k}" for k in range(60)]
    split = make_split(stems, {"val": 0.2, "test": 0.2}, group=r"^(p\d+)_")
    assert sorted(stem for names in split.values() for stem in names) == sorted(stems)
    patients = [{stem.split("_")[0] for stem in names} for names in split.values()]
    assert sum(map(len, patients)) == len(set.union(*patients)) == 12
    assert {name: len(names) for name, names in split.items()} == {"train": 30, "val": 15, "test": 15}
    assert make_split(stems[::-1], {"val": 0.2, "test": 0.2}, group=r"^(p\d+)_") == split
    assert make_split(stems, {"val": 0.2, "test": 0.2}, seed=1) != make_split(stems, {"val": 0.2, "test": 0.2})


@pytest.mark.parametrize(
    ("stems", "shares", "group", "message"),
    [
        (["a", "b"], {"val": 1.2}, None, "between 0 and 1"),
        (["a"], {"val": 0.5}, None, "add images"),
        (["a", "b"], {"val": 0.5}, "[0-9", "regular expression"),
        (["a", "b"], {"val": 0.5}, "z", "finds nothing in 'a'"),
        (["p1_a", "b"], {"val": 0.5}, r"^(p\d+_)?", "finds nothing in 'b'"),
    ],
)
def test_impossible_splits_are_rejected(
    stems: list[str], shares: dict[str, float], group: str | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_split(stems, shares, group=group)


def test_split_takes_sub_folders_for_groups(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("images", "masks"):
        for path in sorted((mine / text).iterdir()):
            home = mine / text / f"p{int(path.stem[-1]) % 3}"
            home.mkdir(exist_ok=True)
            path.rename(home / path.name)
    for path in mine.glob("*.txt"):
        path.unlink()
    assert main(["split", str(mine), "--val", "0.3", "--group", "^[^/]+"]) == 0
    assert "note" not in capsys.readouterr().err
    held = {line.partition("/")[0] for line in (mine / "val.txt").read_text().split()}
    kept = {line.partition("/")[0] for line in (mine / "train.txt").read_text().split()}
    assert held | kept == {"p0", "p1", "p2"} and not held & kept
    assert main(["check", "folder", "--root", str(mine)]) == 0


def test_split_counts_the_images_without_a_mask(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (mine / "masks" / "i0.png").unlink()
    for path in (mine / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_seg.png"))
    assert main(["split", str(mine), "--force"]) == 0
    assert "note: images without a mask: 1, such as" in capsys.readouterr().err


def test_split_says_where_images_are_not(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"images does not exist.*mkdir images masks"):
        main(["split", str(tmp_path)])
    (tmp_path / "images").mkdir()
    with pytest.raises(ValueError, match="images has no image"):
        main(["split", str(tmp_path)])
    (tmp_path / "images" / "train").mkdir()
    with pytest.raises(ValueError, match=r"already split by folders \(train\)"):
        main(["split", str(tmp_path)])


def test_split_files_are_not_replaced_unasked(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (mine / "val.txt").read_text()
    with pytest.raises(ValueError, match="--force"):
        main(["split", str(mine), "--val", "0.3"])
    assert (mine / "val.txt").read_text() == before
    split = ["split", str(mine), "--val", "0.3", "--test", "0.2", "--force", "--json"]
    assert main(split) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["splits"] == {"train": 5, "val": 3, "test": 2} and said.err == ""
    (mine / "masks" / "i4.png").rename(mine / "masks" / "i4.hidden")
    assert main(split) == 0
    assert f"images without a mask: 1, such as {mine / 'images' / 'i4.png'};" in capsys.readouterr().err
    (mine / "masks" / "i4.hidden").rename(mine / "masks" / "i4.png")
    write_split(mine, make_split([f"i{k}" for k in range(10)], {"val": 0.3, "test": 0.2}))  # the same: no error
    assert check(mine, capsys)[1]["splits"] == {"train": 5, "val": 3, "test": 2}


@pytest.mark.parametrize("name", ["two\nlines", " space", "next\x85line"])
def test_names_that_no_split_file_can_hold_are_rejected(name: str, mine: Path) -> None:
    before = (mine / "train.txt").read_text()
    (mine / "images" / "i0.png").rename(mine / "images" / f"{name}.png")
    with pytest.raises(ValueError, match=r"images: the name .* cannot be a line of a file"):
        main(["split", str(mine), "--force"])
    assert (mine / "train.txt").read_text() == before


def test_work_ahead_is_in_order_bounded_and_hands_on_exceptions() -> None:
    started: list[int] = []

    def work(k: int) -> int:
        started.append(k)
        if k == 7:
            raise RuntimeError("seven")
        return k * k

    results = map_in_threads(work, range(100), workers=3)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert max(started) <= 3 + 4
    with pytest.raises(RuntimeError, match="seven"):
        list(results)
    assert max(started) < 20


@pytest.mark.golden
def test_real_images_are_sound(real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "voc2012", "--root", str(real_data), "--split", "val", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["splits"] == {"val": 321}
