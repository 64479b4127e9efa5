"""Prediction on images of any size: orientation, palettes, resuming."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision import tv_tensors

import rankseg
from configs import build, stored
from configs.checkpoint import load
from configs.cli import run_cli
from configs.compose import GROUPS, compose
from configs.errors import UserError
from configs.files import temporary_file
from configs.fitting import Fitter
from datasets import DatasetError
from datasets.decode import EXIF_ORIENTATION
from datasets.transforms import EvalTransform, normalise
from rankseg import expected_dice, rankdice
from scripts import decode
from scripts.inference import files
from scripts.inference.files import file_names
from scripts.inference.windows import probabilities
from scripts.predict_images import main
from tests.scripts.test_windows import INFO, picture
from tests.trees import bomb
from trainers.checkpoint import save
from trainers.distributed import World
from trainers.text import read_csv


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_masks_lie_over_their_images_for_every_reader(tmp_path: Path, orientation: int, suffix: str) -> None:
    stored = np.zeros((24, 40, 3), dtype=np.uint8)
    stored[:8, :16] = 255  # no symmetry
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(stored).save(path, exif=exif, **({"quality": 100} if suffix == "jpg" else {}))
    seen = files.read(path)
    assert seen.pixels.shape == ((3, 40, 24) if orientation > 4 else (3, 24, 40))
    labels = (seen.pixels[0] > 127).byte()
    files.save_labels(labels, seen.orientation, INFO, tmp_path / "mask.png")
    probs = labels.float().expand(3, -1, -1)
    files.save_probabilities(probs, seen.orientation, tmp_path / "probs.npy")
    mask = Image.open(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(mask), stored[..., 0] > 127)  # who ignores EXIF
    assert np.array_equal(np.asarray(ImageOps.exif_transpose(mask)), labels.numpy())  # who honours it
    assert np.array_equal(np.load(tmp_path / "probs.npy")[1] > 0.5, stored[..., 0] > 127)


def test_palette_pictures_hold_indices_and_colours(tmp_path: Path) -> None:
    labels = torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8)
    files.save_labels(labels, 1, INFO, tmp_path / "deep" / "x.png")
    image = Image.open(tmp_path / "deep" / "x.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels.numpy())
    assert np.asarray(image.convert("RGB"))[0].tolist() == [*map(list, INFO.palette), list(files.VOID_COLOUR)]


def test_an_overlay_in_bands_is_the_overlay_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = picture(70, 40)
    labels = torch.randint(3, (70, 40), generator=torch.Generator().manual_seed(0)).byte()
    for band in (70, 16):
        monkeypatch.setattr(files, "BAND", band)
        files.save_overlay(pixels, labels, INFO, tmp_path / f"{band}.png")
    drawn = np.asarray(Image.open(tmp_path / "16.png"))
    assert np.array_equal(drawn, np.asarray(Image.open(tmp_path / "70.png")))
    background = (labels == 0).numpy()
    assert np.array_equal(drawn[background], pixels.permute(1, 2, 0).numpy()[background])
    blended = (pixels.permute(1, 2, 0).float() + torch.tensor([255, 0, 0]))[labels == 1] / 2
    assert np.abs(drawn[(labels == 1).numpy()] - blended.numpy()).max() <= 1


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), temporary_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_finding_images(tmp_path: Path) -> None:
    out = tmp_path / "masks"
    for name in ("a.jpg", "sub/b.PNG", "sub/.hidden.png", "notes.txt", "masks/a.png", "masks/overlay/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, notes = files.find([tmp_path], out)
    assert found == {"a": tmp_path / "a.jpg", "sub/b": tmp_path / "sub" / "b.PNG"}
    assert len(notes) == 1 and "1 .txt" in notes[0]
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="both be written as a"):
        files.find([tmp_path], out)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.find([tmp_path / "nowhere"], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image"):
        files.find([tmp_path / "empty"], out)


def test_images_are_never_written_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    for given, out in ((tmp_path, tmp_path), (tmp_path, tmp_path / "x" / "..")):
        with pytest.raises(ValueError, match="choose another"):
            files.find([given], out)
    monkeypatch.chdir(tmp_path)
    assert files.find([Path()], Path("masks")) == ({"a": Path("a.png")}, [])


@pytest.mark.parametrize(
    ("images", "given", "out", "option", "message"),
    [
        ("a b overlay/a", ".", "out", "--overlay", r"a\.jpg and \S*overlay/a\.jpg would both be written to"),
        ("a classes/a/disc", ".", "out", "--per-class", r"would both be written to \S*classes/a/disc\.png"),
        ("a a.png/b", ".", "out", "--flip", r"a\.jpg would become \S*a\.png, which is a folder for \S*b\.jpg"),
        ("a", "a.png", ".", "--flip", r"a\.png would be replaced"),
        ("a out/overlay/c", "out/overlay/c.png", "out", "--overlay", r"overlay/c\.png would be replaced"),
    ],
)
def test_no_two_files_go_to_one_place(
    images: str, given: str, out: str, option: str, message: str, checkpoint: Path, tmp_path: Path
) -> None:
    for name in images.split():
        for suffix in ("jpg", "png") if given != "." else ("jpg",):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32)).save(tmp_path / f"{name}.{suffix}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        main(["-r", str(checkpoint), str(tmp_path / given), "--out", str(tmp_path / out), "--quiet", option])
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}


def test_names_that_only_look_like_output_folders_do_not_collide(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "overlay").mkdir(parents=True)
    for name in ("a", "overlay/b"):
        Image.new("RGB", (32, 32)).save(tmp_path / "in" / f"{name}.jpg")
    (tmp_path / "in" / "folder.jpg").mkdir()
    command = ["-r", str(checkpoint), str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--quiet", "--overlay"]
    assert main(command) == 0
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")}
    assert written == {"a.png", "overlay/a.png", "overlay/b.png", "overlay/overlay/b.png"}


def test_masks_of_others_are_neither_written_over_nor_taken_for_done(
    checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "one.png").write_text("precious")
    command = ["-r", str(checkpoint), "--out", str(out), "--quiet"]
    with pytest.raises(ValueError, match=r"one\.png was not made by this command and settings\. Fix: .* --force"):
        main([*command, str(photos)])
    assert [p.name for p in out.iterdir()] == ["one.png"]
    assert main([*command, str(photos), "--force"]) == 0
    (tmp_path / "new").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "new" / "one.png")
    with pytest.raises(ValueError, match=rf"one\.png was made from {photos}/one\.png\. Fix: choose another --out"):
        main([*command, str(tmp_path / "new")])
    assert main([*command, str(photos)]) == 0
    assert main([*command, str(photos / "three.png"), "-p", "max", "--force"]) == 0
    with pytest.raises(ValueError, match=r"two\.png was not made by this command"):  # but by another rule
        main([*command, str(photos), "-p", "max"])
    (out / "predict.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"predict\.json is not a record of this command"):
        main([*command, str(photos)])


def test_classes_have_files_of_their_own() -> None:
    assert file_names(("a/b", "a_b", "c", "c")) == ["a_b_0", "a_b_1", "c_2", "c_3"]


def test_damaged_and_deep_images_are_named(tmp_path: Path) -> None:
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((4, 4), dtype=np.uint16)).save(deep)
    with pytest.raises(DatasetError, match=r"deep\.png has more than 8 bits"):
        files.read(deep)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network of three classes, stored as train.py stores one."""
    torch.manual_seed(0)
    choices = dict.fromkeys(GROUPS, "") | {
        "dataset": "synthetic", "model": "tiny", "loss": "ce", "optimizer": "adamw", "schedule": "poly",
        "predictor": "rankdice", "protocol": "corrected", "trainer": "default",
    }  # fmt: skip
    cfg = compose("train", ["dataset.num_classes=3", "run_dir=x"])
    path = tmp_path_factory.mktemp("run") / "best_model.pth"
    network = build.model(cfg)
    save({"format": 1, "model": network.state_dict(), "config": stored.pack(cfg, choices), "epoch": 1}, path)
    return path


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    for k, (name, size) in enumerate({"one": (48, 64), "deep/two": (90, 50), "three": (33, 35)}.items()):
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(*size, seed=k).permute(1, 2, 0).numpy()).save(path)
    return folder


def test_a_folder_becomes_masks(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    everything = ("--overlay", "--per-class", "--probabilities", "--quiet", "--workers", "2")
    assert main(["-r", str(checkpoint), str(photos), "--out", str(out), "-p", "rankdice", *everything]) == 0
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    names = ("one", "deep/two", "three")
    expected = [f"{name}.png" for name in names] + [f"overlay/{name}.png" for name in names]
    expected += [f"probabilities/{name}.npy" for name in names]
    expected += [f"classes/{name}/{c}.png" for name in names for c in ("background", "disc", "box")]
    assert written == sorted([*expected, "predict.json"])

    image = files.read(photos / "deep" / "two.png").pixels
    probs = torch.from_numpy(np.load(out / "probabilities" / "deep" / "two.npy").astype(np.float32))
    torch.testing.assert_close(probs.sum(0), torch.ones(90, 50), atol=2e-3, rtol=0)
    labels = np.asarray(Image.open(out / "deep" / "two.png"))
    assert labels.shape == (90, 50) and Image.open(out / "overlay" / "deep" / "two.png").size == (50, 90)
    masks = [np.asarray(Image.open(out / "classes" / "deep" / "two" / f"{c}.png")) > 0 for c in ("disc", "box")]
    assert ((labels > 0) == (masks[0] | masks[1])).all()

    from configs.checkpoint import load  # the same image as test.py would see it

    network, cfg, _ = load(checkpoint)
    data = build.dataset(cfg, "test").info
    mask = tv_tensors.Mask(torch.zeros(90, 50, dtype=torch.uint8))
    pixels, _ = EvalTransform(data.mean, data.std)(tv_tensors.Image(image), mask)
    with torch.inference_mode():
        wanted = network.eval()(pixels[None]).logits.softmax(1)
    torch.testing.assert_close(probs, wanted[0], atol=1e-3, rtol=0)
    assert np.array_equal(np.stack(masks), rankdice(wanted)[0, 1:].numpy())


def test_the_same_command_again_does_what_is_missing(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["-r", str(checkpoint), str(photos), "--out", str(out), "--quiet", "--window", "32", "--flip"]
    assert main(command) == 0 and "3 images segmented with rankdice_nonoverlap" in capsys.readouterr().out
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*.png")}
    (out / "one.png").unlink()
    assert main(command) == 0
    assert "1 images segmented with rankdice_nonoverlap, 2 done before" in capsys.readouterr().out
    for path, (changed, content) in before.items():
        assert path.read_bytes() == content and (path.name == "one.png" or path.stat().st_mtime_ns == changed)
    with pytest.raises(ValueError, match="made with another predictor, window"):
        main([*command[:-3], "-p", "T"])
    assert main([*command[:-3], "-p", "T", "--force"]) == 0


def test_a_damaged_image_does_not_stop_the_others(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photos / "broken.png"
    path.write_bytes((photos / "one.png").read_bytes()[:200])
    assert main(["-r", str(checkpoint), str(photos), "--out", str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr()
    assert str(path) in said.err and "3 images segmented" in said.out and "1 failed" in said.out
    assert not list((tmp_path / "out").glob("*broken*"))


def test_overrides_reach_the_rule(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    command = ["-r", str(checkpoint), str(photos / "one.png"), "--quiet", "-p", "T", "--per-class"]
    for at, name in ((0, "disc"), (1, "box")):
        out = tmp_path / str(at)
        main([*command, f"threshold={at}", "--out", str(out)])
        assert bool(np.asarray(Image.open(out / "classes" / "one" / f"{name}.png")).any()) is (at == 0)


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), RuntimeError("bug")]
)
def test_an_image_that_does_not_fit_in_memory_does_not_stop_the_others(
    error: Exception,
    checkpoint: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def limited(pixels: Tensor, *rest: object) -> Tensor:
        if pixels.shape[-2:] == (48, 64):
            raise error
        return probabilities(pixels, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("scripts.predict_images.probabilities", limited)
    command = ["-r", str(checkpoint), str(photos), "--out", str(tmp_path / "out"), "--quiet"]
    if str(error) == "bug":
        with pytest.raises(RuntimeError, match="bug"):
            main(command)
        return
    assert main(command) == 1
    assert re.search(r"out of memory while segmenting \S+one\.png: .*--window", capsys.readouterr().err)
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2


def test_other_things_in_a_folder_do_not_stop_its_images(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    whole = Image.fromarray(picture(33, 35).permute(1, 2, 0).numpy())
    Image.new("RGB", (1, 1)).save(folder / "one.png")
    whole.convert("CMYK").save(folder / "cmyk.jpg")
    whole.convert("P").save(folder / "palette.png", transparency=3)
    whole.convert("LA").save(folder / "new\nline [1] {x} ü=1.png")
    bomb(folder / "bomb.png")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken.png").symlink_to("absent.png")
    (folder / "circle").symlink_to(".")
    os.mkfifo(folder / "pipe.png")
    assert main(["-r", str(checkpoint), str(folder), "--out", str(tmp_path / "out"), "--quiet"]) == 1
    said = capsys.readouterr()
    assert "4 images segmented" in said.out and "5 failed" in said.out
    for fault in (
        "bomb.png claims to have 40000000000 pixels",
        "pipe.png is not a regular file",
        "empty.png is not an image",
        "loop.png cannot be opened",
        "broken.png is missing: it is a link to absent.png. Fix: restore that file, or remove the link",
    ):
        assert fault in said.err
    assert said.err.count("error: ") == 5 and len(list((tmp_path / "out").glob("*.png"))) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-p max -p T", "expected one rule. Fix: call once per rule, each time with another --out"),
        ("trainer.precision=fp8", "trainer.precision=fp8"),
        ("--out LOOP/x", "loop/x"),
        ("device=cuda", "device=cuda has no effect on this command. Fix: pass --device cuda instead"),
        ("num_workers=2", "Fix: pass --workers 2 instead"),
        ("split=val", "split=val has no effect"),
        ("predictor.at=0.3", "predictor.at is an option of one rule. Fix: add predictor=RULE"),
        ("-p rankdice correct_focal=true", "correct_focal=true needs a network trained with loss=focal"),
    ],
)
def test_words_that_exclude_each_other_are_one_line(
    words: str, said: str, checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "loop").symlink_to("loop")
    more = words.replace("LOOP", str(tmp_path / "loop")).split()
    with pytest.raises(SystemExit) as done:
        run_cli(lambda: main(["-r", str(checkpoint), str(photos), "--out", str(tmp_path / "out"), *more]))
    err = capsys.readouterr().err
    assert done.value.code == 2 and said in err.splitlines()[-1] and "Traceback" not in err


def test_overrides_and_images_mix(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    image = photos / "one.png"
    main(["-r", str(checkpoint), str(image), "dataset.resize=32", "--out", str(out), "--quiet", "-p", "max"])
    assert Image.open(out / "one.png").size == (64, 48)
    with pytest.raises(ValueError, match="rankdise is unknown"):
        main(["-r", str(checkpoint), str(image), "--out", str(out), "-p", "rankdise"])
    for given, named in (("temperature=fit", "calibrate=temperature"), ("calibrate=class", "calibrate=class")):
        with pytest.raises(UserError, match=f"{named} was not fitted for this checkpoint.*test.py"):
            main(["-r", str(checkpoint), str(image), "--out", str(out / "y"), given])
    with pytest.raises(ValueError, match="--scales"):
        main(["-r", str(checkpoint), str(image), "--out", str(out / "x"), "--scales", "big"])


def test_the_rule_of_an_override_is_applied(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["-r", str(checkpoint), str(photos), "--quiet", "--out", str(tmp_path / "out")]
    assert main([*command, "predictor=T", "predictor.at=0.3"]) == 0
    assert "3 images segmented with T" in capsys.readouterr().out


def test_fitted_values_are_applied_and_others_are_rejected(checkpoint: Path, photos: Path, tmp_path: Path) -> None:
    own = tmp_path / "last.pth"
    own.write_bytes(checkpoint.read_bytes())
    command = ["-r", str(own), str(photos / "one.png"), "--quiet", "--probabilities", "--out"]
    with pytest.raises(UserError, match="rule T_fit was not fitted"):
        main([*command, str(tmp_path / "no"), "-p", "T_fit"])
    main([*command, str(tmp_path / "raw"), "-p", "T"])
    probs = torch.from_numpy(np.load(tmp_path / "raw" / "probabilities" / "one.npy")).float()
    network, cfg, _ = load(own)
    fitter = Fitter(cfg, network, own, World(0, 1, torch.device("cpu")))
    images = {"split": "val", "fingerprint": "x", "num_images": 1}
    at = float(probs[1:].amax(0).median())
    values = {"at": at, "gated": False, "mean_dice": 0.5}
    fitter.file.put("T_fit", fitter.rule_settings("T_fit"), values, images)
    fitter.file.put("temperature", fitter.settings(), {"temperature": 3.0}, images)
    fitter.save()
    main([*command, str(tmp_path / "fit"), "-p", "T_fit"])
    labels = np.asarray(Image.open(tmp_path / "fit" / "one.png"))
    expected = (probs[1:] >= at).any(0).numpy()
    assert ((labels > 0) == expected).mean() > 0.97 and 0 < expected.mean() < 1  # stored as float16
    main([*command, str(tmp_path / "warm"), "-p", "T", "calibrate=temperature"])
    warm = torch.from_numpy(np.load(tmp_path / "warm" / "probabilities" / "one.npy")).float()
    torch.testing.assert_close(warm, (probs.clamp(min=1e-7).log() / 3).softmax(0), atol=5e-3, rtol=0)
    own.write_bytes(own.read_bytes() + b" ")
    with pytest.raises(UserError, match="fitted for another checkpoint"):
        main([*command, str(tmp_path / "other"), "-p", "T_fit"])


@pytest.mark.parametrize("rule", ["T", "max", "rankdice", "rankdice_nonoverlap"])
def test_decode_makes_the_same_masks_of_the_probabilities(
    rule: str, checkpoint: Path, photos: Path, tmp_path: Path
) -> None:
    """decode.py reads what --probabilities writes, and makes the same masks of it.

    The stored probabilities are rounded to float16. A pixel that is rounded across a cut-off may differ.
    """
    own, out, decoded = tmp_path / "last.pth", tmp_path / "out", tmp_path / "decoded"
    content, network = torch.load(checkpoint, weights_only=True), load(checkpoint)[0].eval()
    with torch.inference_mode():
        logits = network(normalise(picture(48, 64), INFO.mean, INFO.std)[None]).logits
    *_, weight, bias = content["model"]
    content["model"][bias] -= logits.mean((0, 2, 3))  # an untrained network is never sure
    scale = 3 / (logits - logits.mean((2, 3), keepdim=True)).std()
    content["model"][weight] *= scale
    content["model"][bias] *= scale
    save(content, own)
    words = ["-r", str(own), str(photos), "-p", rule, "--probabilities", "--per-class", "--quiet"]
    assert main([*words, "--out", str(out)]) == 0
    words = [str(out / "probabilities"), "-p", rule, "--write", "masks", "--quiet", "--out", str(decoded)]
    assert decode.main(words) == 0
    for name in ("one", "deep/two", "three"):
        masks = np.load(decoded / rule / f"{name}.npy")
        paths = [out / "classes" / name / f"{c}.png" for c in ("background", "disc", "box")]
        theirs = np.stack([np.asarray(Image.open(path)) > 0 for path in paths])
        assert theirs.any((1, 2)).sum() >= 2 and not theirs.all()
        probs = np.load(out / "probabilities" / f"{name}.npy").astype(np.float64)
        differ = (masks != theirs).any(0)
        assert differ.mean() < 0.002
        if rule == "max":
            first, second = np.sort(probs, 0)[:-3:-1]
            assert ((first - second)[differ] < 1e-3).all()
        elif rule != "rankdice_nonoverlap":
            for p, mine, other in zip(probs, masks, theirs, strict=True):
                cut = 0.5 if rule == "T" else p[mine].min(initial=1)
                assert (abs(p - cut)[mine != other] < 3e-3).all()


def test_review_lists_the_least_sure_mask_first(
    checkpoint: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, out = tmp_path / "last.pth", tmp_path / "out"
    own.write_bytes(checkpoint.read_bytes())
    network, cfg, _ = load(own, ["gate=none"])  # the network is untrained: the usual gate leaves hardly a mask
    fitter = Fitter(cfg, network, own, World(0, 1, torch.device("cpu")))
    margins = {"image": 0.1, "classes": {"1": 0.125, "2": None}}
    fitter.file.put("margin 0.1", fitter.rule_settings("rankdice"), margins, {"split": "val"})
    fitter.save()
    names = [photos / "one.png", photos / "three.png"]
    command = ["-r", str(own), "-p", "rankdice", "gate=none", "--review", "--probabilities", "--quiet"]
    command += ["--out", str(out)]
    main([*command, str(names[0])])
    main([*command, *map(str, names)])  # the first one is done: its rows stay
    assert "calibrate=none" in capsys.readouterr().err
    rows = list(read_csv((out / "review.csv").read_text()))
    assert {(row["image"], row["class"]) for row in rows} == {
        (path.stem, name) for path in names for name in ("disc", "box")
    }
    sure = [float(row["confidence"]) for row in rows]
    assert sure == sorted(sure)
    for row in rows:
        probs = torch.from_numpy(np.load(out / "probabilities" / f"{row['image']}.npy")).float()
        p = probs[1 if row["class"] == "disc" else 2][None, None]
        mask = rankseg.rank_dice(p, pruning=False).predict
        assert int(row["area"]) == pytest.approx(int(mask.sum()), rel=0.02)
        assert float(row["confidence"]) == pytest.approx(float(expected_dice(p, mask)), abs=2e-3)
        bound = f"{max(0, float(row['confidence']) - 0.125):.4f}" if row["class"] == "disc" else ""
        assert row["lower_bound"] == bound
    (out / "review.csv").write_text("mine")
    with pytest.raises(UserError, match="review"):
        main([*command, *map(str, names)])
