"""decode.py: every format gives the masks of the rule itself, and the scores are those of the evaluator."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rankseg
from configs import build
from configs.errors import UserError
from scripts import decode
from scripts.decoding import arrays
from tests.scripts.decoding import RULES, Touch, drawn, result, run, save_all, softmax_maps
from trainers.distributed import World
from trainers.evaluator import evaluate
from trainers.losses import CrossEntropy
from trainers.metrics import Scoring


class TestScores:
    def test_equal_those_of_the_evaluator(self, tmp_path: Path) -> None:
        """The same maps through `evaluate`, the code of test.py: equal files of counts, scores and ECE."""
        maps = softmax_maps(3, (40, 200))
        labels = [drawn(p, i, void=0.1) for i, p in enumerate(maps)]
        rules = build.rules(RULES)
        batches = [
            SimpleNamespace(images=p.log()[None], targets=torch.from_numpy(t)[None], names=[f"c{i}"], indices=[i])
            for i, (p, t) in enumerate(zip(maps, labels, strict=True))
        ]
        expected = evaluate(
            _Identity(), batches, rules, CrossEntropy(), Scoring(3, (0, 1, 2)), World(0, 1, torch.device("cpu"))
        )
        out = tmp_path / "out"
        logits = save_all(tmp_path / "logits", [p.log() for p in maps])
        flags = ["--link", "softmax", "--classes-axis", "first", "--write", "masks", "--out", out]
        truth = save_all(tmp_path / "labels", labels)
        assert run(logits, "--labels", truth, *(w for r in RULES for w in ("-p", r)), *flags) == 0
        for rule in RULES:
            expected[rule].save(tmp_path / "expected", {})
            table = (out / "results" / f"{rule}.csv").read_bytes()
            assert table == (tmp_path / "expected" / f"{rule}.csv").read_bytes()
            for key, value in expected[rule].scores.items():
                if key != "test_loss":
                    assert result(out, rule)["scores"][key] == pytest.approx(value, rel=1e-6), key

    def test_are_those_of_the_label_map_that_is_written(self, tmp_path: Path) -> None:
        maps = softmax_maps(2, (30, 30))
        probs, labels = save_all(tmp_path / "p", maps), [drawn(p, i) for i, p in enumerate(maps)]
        out, truth = tmp_path / "o", save_all(tmp_path / "l", labels)
        assert run(probs, "--labels", truth, "-p", "rankdice", "--write", "labels", "--out", out) == 0
        dice = []
        for i, t in enumerate(labels):
            written = np.load(out / "rankdice" / f"c{i}.npy")
            per_class = [
                2 * ((written == c) & (t == c)).sum() / ((written == c).sum() + (t == c).sum()) for c in range(3)
            ]
            dice.append(np.mean(per_class))
        assert result(out, "rankdice")["scores"]["mean_dice"] == pytest.approx(np.mean(dice), abs=1e-9)

    def test_one_channel_is_the_foreground(self, tmp_path: Path) -> None:
        p = softmax_maps(1, (24, 20), classes=2)[0]
        truth = drawn(p, 0)
        probs, labels = save_all(tmp_path / "p", [p[1]]), save_all(tmp_path / "l", [truth])
        assert run(probs, "--labels", labels, "-p", "rankdice", "--out", tmp_path / "o") == 0
        mask = rankseg.rankdice(p[1][None, None])[0, 0].numpy()
        written = np.load(tmp_path / "o" / "rankdice" / "c0.npy")
        assert written.dtype == np.uint8 and np.array_equal(written, mask.astype(np.uint8))
        expected = 2 * (mask & (truth == 1)).sum() / (mask.sum() + (truth == 1).sum())
        assert result(tmp_path / "o", "rankdice")["scores"]["mean_dice"] == pytest.approx(expected)

    def test_field_of_view(self, tmp_path: Path) -> None:
        """Outside of it nothing is selected and nothing counted; inside, the result is that of zeros outside."""
        p = softmax_maps(1, (24, 20))[0]
        truth, view = drawn(p, 0), np.zeros((24, 20), np.uint8)
        view[4:20, 3:15] = 1
        folders = [save_all(tmp_path / n, [x]) for n, x in (("p", p), ("l", truth), ("v", view))]
        flags = ["-p", "rankdice", "-p", "max", "--out", tmp_path / "o"]
        assert run(folders[0], "--labels", folders[1], "--valid", folders[2], *flags) == 0
        cropped = p * torch.from_numpy(view)
        masks = np.load(tmp_path / "o" / "rankdice" / "c0.npy")
        assert np.array_equal(masks, rankseg.rankdice(cropped[None])[0].numpy())
        labels = np.load(tmp_path / "o" / "max" / "c0.npy")
        assert np.array_equal(labels, np.where(view, p.argmax(0), 255))
        rows = (tmp_path / "o" / "results" / "max.csv").read_text().splitlines()[1:]
        assert sum(int(row.split(",")[4]) for row in rows) == view.sum()

    def test_confidence(self, tmp_path: Path) -> None:
        """The expected Dice of what is written, next to the scores and without labels."""
        p = softmax_maps(1, (24, 20))[0]
        folder, truth = save_all(tmp_path / "p", [p]), save_all(tmp_path / "l", [drawn(p, 0)])
        rules = ["-p", "rankdice", "-p", "max", "--confidence"]
        assert run(folder, "--labels", truth, *rules, "--out", tmp_path / "o") == 0
        assert run(folder, *rules, "--out", tmp_path / "o2") == 0
        table = (tmp_path / "o2" / "confidence.csv").read_text()
        assert table == (tmp_path / "o" / "confidence.csv").read_text()
        rows = [line.split(",") for line in table.splitlines()[1:]]
        for rule, masks in (("rankdice", rankseg.rankdice(p[None])), ("max", rankseg.argmax(p[None]))):
            got = [float(row[3]) for row in rows if row[1] == rule]
            assert got == pytest.approx(rankseg.confidence(p[None], masks)[0].tolist(), abs=1e-6)
            assert result(tmp_path / "o", rule)["image_confidence"] == pytest.approx([np.mean(got)], abs=1e-5)


class _Identity(torch.nn.Module):
    """A network whose images are its logits."""

    def forward(self, images: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=images)


def _write(path: Path, probs: np.ndarray, form: str) -> Path:
    last = np.moveaxis(probs, 0, -1)
    if form == "npy":
        np.save(path / "c.npy", probs)
    elif form == "npy_last":
        np.save(path / "c.npy", last)
    elif form == "npy_fortran":
        np.save(path / "c.npy", np.asfortranarray(probs))
    elif form == "npy_big_endian":
        np.save(path / "c.npy", probs.astype(">f4"))
    elif form == "npz":
        np.savez(path / "c.npz", anything=probs)
    elif form == "npz_compressed_fortran":
        np.savez_compressed(path / "c.npz", probabilities=np.asfortranarray(probs), other=np.zeros(3))
    elif form == "tif":
        pytest.importorskip("tifffile").imwrite(path / "c.tif", probs, photometric="minisblack")
    else:
        nib = pytest.importorskip("nibabel")
        image = nib.Nifti1Image(last if last.ndim == 4 else last[:, :, None], np.diag([2.0, 3, 4, 1]))
        nib.save(image, path / f"c.{form}")
    return path


FORMS = ("npy", "npy_last", "npy_fortran", "npy_big_endian", "npz", "npz_compressed_fortran", "tif", "nii", "nii.gz")


def _read(path: Path) -> np.ndarray:
    if path.suffix == ".npy":
        return np.load(path)
    if path.suffix == ".npz":
        with np.load(path) as content:
            (name,) = content
            return content[name]
    if path.suffix == ".tif":
        return pytest.importorskip("tifffile").imread(path)
    array = np.asarray(pytest.importorskip("nibabel").load(path).dataobj)
    return array


@pytest.mark.parametrize("in_memory", [1 << 30, 0], ids=["memory", "files"])
@pytest.mark.parametrize("shape", [(24, 20), (9, 12, 10)])
@pytest.mark.parametrize("form", FORMS)
def test_every_format(
    form: str, shape: tuple[int, ...], in_memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks and label maps equal those of the rules called on the array, for arrays in memory and in files."""
    monkeypatch.setattr(arrays, "IN_MEMORY", in_memory)
    monkeypatch.setattr("scripts.decoding.cases.SLAB", 100)
    probs = softmax_maps(1, shape)[0]
    (tmp_path / "p").mkdir()
    folder = _write(tmp_path / "p", probs.numpy(), form)
    out = tmp_path / "o"
    assert run(folder, *(w for r in RULES for w in ("-p", r)), "--out", out) == 0
    for rule in RULES:
        (path,) = (out / rule).iterdir()
        array = _read(path)
        masks = build.rules([rule])[rule](probs[None])
        if rule in ("max", "rankdice_nonoverlap"):
            expected = rankseg.label_map(masks)[0].numpy()
            assert array.dtype == np.uint8
        else:
            expected = masks[0].numpy()
            if "nii" in form:
                expected = np.moveaxis(expected, 0, -1)
            assert array.dtype == (np.uint8 if form in ("tif", "nii", "nii.gz") else bool)
        assert np.array_equal(array.reshape(expected.shape), expected), rule
        assert not list(out.rglob("*tmp*"))


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_logits_and_temperature(link: str, tmp_path: Path) -> None:
    logits = torch.randn(3, 16, 18, generator=torch.Generator().manual_seed(4)) * 3
    folder = save_all(tmp_path / "p", [np.moveaxis(logits.numpy(), 0, -1)])
    flags = ["--link", link, "--classes-axis", "last", "--temperature", 2, "--write", "masks"]
    assert run(folder, "-p", "rankdice", *flags, "--out", tmp_path / "o") == 0
    probs = (logits / 2).softmax(0) if link == "softmax" else (logits / 2).sigmoid()
    assert np.array_equal(np.load(tmp_path / "o" / "rankdice" / "c0.npy"), rankseg.rankdice(probs[None])[0].numpy())
    # A temperature on probabilities is one on their logits.
    if link == "softmax":
        again = save_all(tmp_path / "q", [logits.softmax(0)])
        assert run(again, "-p", "rankdice", "--temperature", 2, "--out", tmp_path / "o2") == 0
        one, two = (np.load(tmp_path / o / "rankdice" / "c0.npy") for o in ("o", "o2"))
        assert (one != two).sum() <= 2  # rounding of the probabilities may move a pixel at the cut-off


@pytest.mark.parametrize("link", ["softmax", "sigmoid"])
def test_a_link_on_probabilities_is_noted(link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is no error, because logits may be in [0, 1] too. Logits with other values are not noted."""
    maps = softmax_maps(3, (20, 20))
    words = ["-p", "max", "--link", link, "--classes-axis", "first", "--out"]
    mixed = save_all(tmp_path / "p", [*maps[:2], maps[2].log()])
    assert run(mixed, *words, tmp_path / "o") == 0
    (note,) = [line for line in capsys.readouterr().err.splitlines() if "--link" in line]
    assert f"note: --link {link}" in note and f"{mixed / 'c0.npy'} and 1 more are in" in note and "Fix:" in note
    assert ("sum to 1" in note) == (link == "softmax")
    others = [maps[2].log()] + [0.5 * maps[0]] * (link == "softmax")  # of the latter, the sums are not 1
    assert run(save_all(tmp_path / "q", others), *words, tmp_path / "o2") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("unassigned", ["void", "max", "7", "-1", "70000", "-40000"])
def test_pixels_of_no_class(unassigned: str, tmp_path: Path) -> None:
    probs = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(5)) * 0.6
    folder = save_all(tmp_path / "p", [probs])
    flags = ["--classes-axis", "first", "--write", "labels", "--unassigned", unassigned]
    assert run(folder, "-p", "T", *flags, "--out", tmp_path / "o") == 0
    policy = unassigned if unassigned in ("void", "max") else int(unassigned)
    expected = rankseg.label_map(probs[None] >= 0.5, policy, probs[None])[0].numpy()
    assert np.array_equal(np.load(tmp_path / "o" / "T" / "c0.npy"), expected)


BAD = {
    "logits": (lambda p, t: (p * 8, t), ["-0.", "--link"]),
    "nan": (lambda p, t: (np.where(p > 0.9, np.nan, p), t), ["NaN"]),
    "infinite": (lambda p, t: (np.where(p > 0.9, np.inf, p), t), ["inf"]),
    "integers": (lambda p, t: ((p * 255).astype(np.uint8), t), ["uint8"]),
    "shape": (lambda p, t: (p, t[:-2]), ["(22, 20)", "(24, 20)"]),
    "label": (lambda p, t: (p, np.where(t == 2, 9, t)), ["9", "--void"]),
    "float labels": (lambda p, t: (p, t + 0.5), ["integers"]),
    "classes": (lambda p, t: (p[:2] / p[:2].sum(0), np.minimum(t, 1)), ["2", "3"]),
    "vector": (lambda p, t: (p[0, 0], t), ["(20,)"]),
    "empty": (lambda p, t: (p[:, :0], t), ["(3, 0, 20)"]),
    "boolean": (lambda p, t: (p > 0.5, t), ["bool"]),
    "label of 64 bits": (lambda p, t: (p, np.full(t.shape, 2**63 + 5, np.uint64)), [str(2**63 + 5)]),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_bad_cases_are_named_and_the_others_decoded(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    maps = [p.numpy() for p in softmax_maps(3, (24, 20))]
    labels = [drawn(torch.from_numpy(p), i) for i, p in enumerate(maps)]
    make, words = BAD[kind]
    maps[1], labels[1] = make(maps[1], labels[1])
    if kind == "logits":
        maps[1] = maps[1] - 0.5
    flags = ["--labels", save_all(tmp_path / "l", labels), "-p", "max", "--out", tmp_path / "o"]
    assert run(save_all(tmp_path / "p", maps), *flags, "--classes-axis", "first") == 1
    message = capsys.readouterr().err
    assert "c1.npy" in message and "Fix:" in message, message
    assert all(word in message for word in words), message
    assert result(tmp_path / "o", "max")["images"] == ["c0", "c2"]


@pytest.mark.parametrize("damage", ["truncated", "html", "objects", "missing label", "key"])
def test_damaged_files_are_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    maps = [p.numpy() for p in softmax_maps(2, (24, 20))]
    folder, labels = tmp_path / "p", save_all(tmp_path / "l", [np.zeros((24, 20), np.uint8)] * 2)
    folder.mkdir()
    np.savez(folder / "c0.npz", probabilities=maps[0])
    path = folder / "c1.npz"
    np.savez(path, **({"a": maps[1], "b": maps[1]} if damage == "key" else {"a": maps[1]}))
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    elif damage == "html":
        path.write_text("<html>not found</html>")
    elif damage == "objects":
        np.savez(path, a=np.array([Touch(tmp_path / "executed")], dtype=object))
    elif damage == "missing label":
        (labels / "c1.npy").unlink()
    assert run(folder, "--labels", labels, "-p", "max", "--out", tmp_path / "o") == 1
    message = capsys.readouterr().err
    assert "c1" in message and "Fix:" in message
    assert not (tmp_path / "executed").exists()
    assert result(tmp_path / "o", "max")["images"] == ["c0"]


def test_one_hot_labels_are_not_taken_for_a_volume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = softmax_maps(2, (24, 20))
    labels = save_all(tmp_path / "l", [drawn(maps[0], 0), maps[1].numpy() > 0.5])
    words = ["--labels", labels, "-p", "max", "--out", tmp_path / "o"]
    assert run(save_all(tmp_path / "p", maps), *words) == 1
    message = capsys.readouterr().err
    assert "c1.npy" in message and "(3, 24, 20)" in message
    assert result(tmp_path / "o", "max")["images"] == ["c0"]


def test_integer_logits(tmp_path: Path) -> None:
    logits = (softmax_maps(1, (24, 20))[0].log() * 5).round()
    folder = save_all(tmp_path / "p", [logits.to(torch.int16)])
    flags = ["--link", "softmax", "--classes-axis", "first", "--out", tmp_path / "o"]
    assert run(folder, "-p", "rankdice", *flags) == 0
    masks = np.load(tmp_path / "o" / "rankdice" / "c0.npy")
    assert np.array_equal(masks, rankseg.rankdice(logits.softmax(0)[None])[0].numpy())


def test_a_broken_link_is_named(tmp_path: Path) -> None:
    folder = save_all(tmp_path / "p", softmax_maps(1, (24, 20)))
    (folder / "gone.npy").symlink_to(tmp_path / "absent.npy")
    with pytest.raises(UserError, match=r"gone\.npy"):
        run(folder, "-p", "max", "--out", tmp_path / "o")


def test_links_are_followed_pipes_named_and_other_files_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_all(tmp_path / "elsewhere", softmax_maps(2, (6, 9)))
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "p" / "a.mha").touch()
    assert run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o") == 0
    assert sorted(p.name for p in (tmp_path / "o" / "max" / "linked").iterdir()) == ["c0.npy", "c1.npy"]
    assert "1 .mha" in capsys.readouterr().err
    os.mkfifo(tmp_path / "p" / "pipe.npy")
    with pytest.raises(UserError, match=r"pipe\.npy: not a regular file"):
        run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o")


def test_label_pictures_are_read_like_masks_of_a_data_set(tmp_path: Path) -> None:
    """An EXIF orientation is applied; a file of another format under the name .png never reaches its decoder."""
    Image = pytest.importorskip("PIL.Image")
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4) % 3
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    Image.fromarray(labels).save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(arrays.read_array(tmp_path / "a.png", tmp_path), labels[::-1, ::-1])
    Image.fromarray(labels).convert("RGB").save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    os.mkfifo(tmp_path / "c.png")
    for name in ("b.png", "c.png"):
        with pytest.raises(UserError, match=name):
            arrays.read_array(tmp_path / name, tmp_path)


def test_an_unclear_axis_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = save_all(tmp_path / "p", [np.random.default_rng(0).random((5, 16, 18), np.float32)])
    assert run(folder, "-p", "rankdice", "--out", tmp_path / "o") == 1
    assert "--classes-axis" in capsys.readouterr().err
    assert run(folder, "-p", "rankdice", "--classes-axis", "none", "--out", tmp_path / "o2") == 0
    assert np.load(tmp_path / "o2" / "rankdice" / "c0.npy").shape == (5, 16, 18)


class TestResume:
    def test_continues_and_notices_changes(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        maps = softmax_maps(3, (20, 20))
        probs = save_all(tmp_path / "p", maps)
        labels = save_all(tmp_path / "l", [drawn(p, i) for i, p in enumerate(maps)])
        words = [probs, "--labels", labels, "-p", "max", "-p", "rankdice", "--out", tmp_path / "o"]
        assert run(*words) == 0
        table = (tmp_path / "o" / "results" / "rankdice.csv").read_bytes()
        times = {p: p.stat().st_mtime_ns for p in (tmp_path / "o").rglob("*.npy")}
        (tmp_path / "o" / "max" / "c1.npy").unlink()
        np.save(probs / "c2.npy", maps[0].numpy())
        assert run(*words) == 0
        assert "2 cases decoded" in capsys.readouterr().out.splitlines()[-1]
        changed = {p.stem for p, t in times.items() if p.stat().st_mtime_ns != t}
        assert changed == {"c1", "c2"}
        assert (tmp_path / "o" / "results" / "rankdice.csv").read_bytes() != table
        np.save(probs / "c2.npy", maps[2].numpy())
        assert run(*words, "--workers", 3) == 0
        assert (tmp_path / "o" / "results" / "rankdice.csv").read_bytes() == table

    @pytest.mark.parametrize("edit", ["[1]", "{}", "{", "counts", "sources"])
    def test_an_edited_record_is_decoded_again(
        self, edit: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        maps = softmax_maps(2, (20, 20))
        labels = save_all(tmp_path / "l", [drawn(p, i) for i, p in enumerate(maps)])
        probs, out = save_all(tmp_path / "p", maps), tmp_path / "o"
        words = [probs, "--labels", labels, "-p", "max", "-p", "rankdice", "--out", out]
        assert run(*words) == 0
        record, table = out / ".cases" / "c1.json", (out / "results" / "max.csv").read_bytes()
        before = record.read_bytes()
        content = json.loads(before)
        if edit == "counts":
            content["rules"]["max"]["counts"]["predicted"] = [["many"]]
        else:
            content[edit] = 5
        record.write_text(edit if edit in ("[1]", "{}", "{") else json.dumps(content))
        assert run(*words) == 0
        assert "1 cases decoded with max, rankdice, 1 done before" in capsys.readouterr().out
        assert (out / "results" / "max.csv").read_bytes() == table
        assert json.loads(record.read_bytes())["sources"] == json.loads(before)["sources"]

    def test_a_moved_folder_is_not_decoded_again(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        words = [save_all(tmp_path / "p", softmax_maps(2, (20, 20))), "-p", "max", "--out"]
        assert run(*words, tmp_path / "o") == 0
        (tmp_path / "o").rename(tmp_path / "moved")
        assert run(*words, tmp_path / "moved") == 0
        assert "0 cases decoded with max, 2 done before" in capsys.readouterr().out

    def test_a_case_in_a_folder_is_not_decoded_again(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if OUT is given once relative and once absolute, and the name has dots and a suffix in capitals."""
        probs = save_all(tmp_path / "p", softmax_maps(1, (20, 20)))
        (probs / "deep").mkdir()
        (probs / "c0.npy").rename(probs / "deep" / "a.b.NPY")
        monkeypatch.chdir(tmp_path)
        assert run(probs, "-p", "max", "--out", "o") == 0
        assert run(probs, "-p", "max", "--out", tmp_path / "o") == 0
        assert "0 cases decoded with max, 1 done before" in capsys.readouterr().out

    @pytest.mark.parametrize("text", ["[1]", "{}", '{"settings": []}', "{"])
    def test_an_edited_note_of_the_options_is_one_line(self, text: str, tmp_path: Path) -> None:
        probs, out = save_all(tmp_path / "p", softmax_maps(1, (20, 20))), tmp_path / "o"
        assert run(probs, "-p", "max", "--out", out) == 0
        (out / "decode.json").write_text(text)
        with pytest.raises(UserError, match=str(out)):
            run(probs, "-p", "max", "--out", out)
        assert run(probs, "-p", "max", "--out", out, "--force") == 0

    def test_other_options_need_force(self, tmp_path: Path) -> None:
        probs = save_all(tmp_path / "p", softmax_maps(1, (20, 20)))
        assert run(probs, "-p", "max", "--out", tmp_path / "o") == 0
        with pytest.raises(UserError, match="--force"):
            run(probs, "-p", "rankdice", "--out", tmp_path / "o")
        assert run(probs, "-p", "rankdice", "--out", tmp_path / "o", "--force") == 0

    def test_options_may_change_until_a_case_is_decoded(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """So that the remedy of a message can be followed with the same --out."""
        (tmp_path / "p").mkdir()
        p = softmax_maps(1, (20, 20))[0].numpy()
        np.savez(tmp_path / "p" / "c0.npz", p=np.log(p), q=p)
        words = [tmp_path / "p", "-p", "max", "--out", tmp_path / "o"]
        for more, remedy in (([], "--key"), (["--key", "p"], "--link softmax")):
            assert run(*words, "--classes-axis", "first", *more) == 1
            assert remedy in capsys.readouterr().err
        assert run(*words, "--classes-axis", "first", "--key", "p", "--link", "softmax") == 0
        with pytest.raises(UserError, match="--force"):
            run(*words, "--classes-axis", "first", "--key", "q")

    def test_a_folder_of_another_version_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = [save_all(tmp_path / "p", softmax_maps(1, (20, 20))), "-p", "max", "--out", tmp_path / "o"]
        assert run(*words) == 0
        monkeypatch.setattr(decode, "VERSION", decode.VERSION + 1)
        with pytest.raises(UserError, match="of another version of this command"):
            run(*words)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["--temperature", "0"], "--temperature"),
        (["--workers", "0"], "--workers"),
        (["--unassigned", "maybe"], "--unassigned"),
        (["--unassigned", "1,2"], "--unassigned 1,2"),
        (["--unassigned", "9999999999"], "--unassigned"),
        (["--void", "9999999999"], "--void"),
        (["--scored", "a"], "--scored"),
        (["--scored", "7"], "--scored 7"),
        (["--scored", "1,99"], "--scored 1,99"),
        (["--names", "a,b"], "--names"),
        (["--out", "p"], "--out"),
        (["-p", "rankdise"], "rankdise"),
    ],
)
def test_invalid_options(words: list[str], key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    maps = softmax_maps(1, (20, 20))
    save_all(tmp_path / "p", maps)
    save_all(tmp_path / "l", [drawn(maps[0], 0)])
    with pytest.raises(ValueError, match=key):
        run("p", "--labels", "l", "-p", "max", "--out", "o", *words)
    assert not list(tmp_path.glob("o/*"))  # nothing is written before the options are checked


def test_two_files_of_one_case(tmp_path: Path) -> None:
    probs = save_all(tmp_path / "p", softmax_maps(1, (20, 20)))
    np.savez(probs / "c0.npz", a=np.zeros((2, 3, 3)))
    with pytest.raises(UserError, match="c0"):
        run(probs, "-p", "max", "--out", tmp_path / "o")
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "nowhere", "-p", "max", "--out", tmp_path / "o")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        run(tmp_path / "empty", "-p", "max", "--out", tmp_path / "o")


def test_a_folder_with_a_line_break_is_printed_on_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = softmax_maps(2, (20, 20))
    labels, out = save_all(tmp_path / "l", [drawn(p, i) for i, p in enumerate(maps)]), tmp_path / "new\n\x1b[2Jline"
    probs = save_all(tmp_path / "p", maps)
    assert run(probs, "--labels", labels, "-p", "max", "-p", "rankdice", "--out", out) == 0
    printed = capsys.readouterr().out
    assert printed.count(r"new\n\x1b[2Jline") == 3 and "\x1b" not in printed
