"""Masks that would be read as something else, and splits that teach nothing: named, or read as meant."""

from __future__ import annotations

import json
import shlex
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from configs import build
from configs.compose import compose
from configs.errors import ConfigError
from datasets import DatasetError
from datasets.folder import Folder
from datasets.kvasir_seg import KvasirSEG
from scripts.prepare_data import main
from tests.trees import labels, make_folder, make_kvasir

WALL = "classes: [{name: wall, value: 1}, {name: lesion, value: 2}]\n"
TWO = "classes: [background, {name: lesion, value: 255}]\n"
RED = "classes: [{name: a, color: [0, 0, 0]}, {name: b, color: [255, 0, 0]}%s]\nrgb_masks: true\n"


def redraw(root: Path, draw) -> Path:
    """Replace each mask by what `draw` makes of its array."""
    for path in sorted((root / "masks").iterdir()):
        with Image.open(path) as image:
            old = np.array(image)
        path.unlink()
        new = draw(old)
        image = new if isinstance(new, Image.Image) else Image.fromarray(new)
        image.save(path.with_suffix(".png"))
    return root


def seen(root: Path, split: str = "train") -> list[int]:
    """Verify all pairs, and return the labels of the first."""
    data = Folder(root, split)
    data.verify(progress=False, sample=None)
    return np.unique(data.read(0)[1].numpy()).tolist()


def numbered(mask: np.ndarray) -> np.ndarray:
    """Labels 1 and 2 below four rows of 0."""
    shifted = mask + 1
    shifted[:4] = 0
    return shifted.astype(np.uint8)


@pytest.mark.parametrize("more", ["ignore_index: 0\n", "void: 0\n", "void: [0, 255]\n"])
def test_label_0_can_be_void(tmp_path: Path, more: str) -> None:
    root = redraw(make_folder(tmp_path, classes=WALL + more), numbered)
    assert seen(root) == [0, 1, 255] and Folder(root, "train").info.ignore_index == 255


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (WALL, r"labels 0.*void: \[0, 255\]"),
        ("classes: [wall, lesion]\nvoid: [0, 255]\n", "0 is void and the value of class 'wall'"),
        (WALL + "void: [300]\n", r"void=\[300\]"),
        (WALL + "void: all\n", "void='all'"),
        (WALL + "void_color: [1, 2, 3]\n", "void_color is for RGB masks"),
        (TWO + "nearest: true\nvoid: [7]\n", "nearest leaves no void"),
    ],
)
def test_void_that_contradicts_the_table_is_named(tmp_path: Path, table: str, words: str) -> None:
    root = redraw(make_folder(tmp_path, classes=table), numbered)
    with pytest.raises(DatasetError, match=words) as raised:
        seen(root)
    assert "nearest: true" not in str(raised.value)


@pytest.mark.parametrize("more", ["", "nearest: true\n"])
@pytest.mark.parametrize("dtype", [np.uint8, bool])
def test_masks_of_0_and_1_are_not_emptied(tmp_path: Path, more: str, dtype: type) -> None:
    root = redraw(make_folder(tmp_path, classes=TWO + more), lambda mask: mask.astype(dtype))
    with pytest.raises(DatasetError, match=r"case0\.png holds labels.*value"):
        seen(root)


@pytest.mark.parametrize("void", [", {name: void, value: 255, color: [9, 9, 9]}", "void_color: [9, 9, 9]\n"])
def test_the_void_colour_of_rgb_masks_is_void(tmp_path: Path, void: str) -> None:
    table = RED % void if void.startswith(",") else RED % "" + void

    def draw(mask: np.ndarray) -> np.ndarray:
        colours = np.zeros((*mask.shape, 3), dtype=np.uint8)
        colours[mask == 1], colours[:3] = (255, 0, 0), (9, 9, 9)
        return colours

    root = redraw(make_folder(tmp_path, classes=table), draw)
    assert seen(root) == [0, 1, 255] and Folder(root, "train").info.num_classes == 2


@pytest.mark.parametrize("value", [0, 255])
def test_a_split_without_anything_to_learn_is_an_error_also_with_skip(tmp_path: Path, value: int) -> None:
    root = redraw(make_folder(tmp_path), lambda mask: np.full_like(mask, value))
    for on_error in ("raise", "skip"):
        with pytest.raises(DatasetError, match="nothing to learn"):
            Folder(root, "train").verify(progress=False, on_error=on_error)


def test_absent_classes_are_noted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path, classes="classes: [background, lesion, vessel]\n")
    Folder(root, "val").verify(progress=False)
    assert "split val: vessel" in capsys.readouterr().err
    assert main(["check", "folder", "--root", str(root), "--json", "--quiet"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert all(f"split {split}: vessel" in note for split, note in zip(("train", "val"), notes, strict=True))


@pytest.mark.parametrize("void", [254, 253, 2])
def test_another_index_of_void_collides_with_nothing(tmp_path: Path, void: int) -> None:
    def draw(mask: np.ndarray) -> np.ndarray:
        mask[0] = void
        return mask

    root = redraw(make_folder(tmp_path, classes=f"classes: [background, lesion]\nignore_index: {void}\n"), draw)
    assert seen(root) == [0, 1, void]
    Image.fromarray(np.full((32, 40), 77, dtype=np.uint8)).save(root / "masks" / "case0.png")
    with pytest.raises(DatasetError, match="holds labels 77"):
        Folder(root, "train").read(0)


def kvasir_mask(how: str, index: int) -> Image.Image:
    mask = labels(index, (48, 40), 1)
    if how == "palette":
        image = Image.fromarray(mask)
        image.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
        return image
    if how in ("red", "alpha"):
        pixels = np.zeros((40, 48, 3 + (how == "alpha")), dtype=np.uint8)
        pixels[..., 0 if how == "red" else 3] = 255 * mask
        return Image.fromarray(pixels)
    return Image.fromarray(mask * np.uint8({"0/1": 1, "dark": 100, "white": 255}[how]))


@pytest.mark.parametrize("dithered", [False, True])
@pytest.mark.parametrize("how", ["white", "0/1", "palette", "dark", "red", "alpha"])
def test_kvasir_masks_are_read_as_drawn_or_named(tmp_path: Path, how: str, dithered: bool) -> None:
    root = make_kvasir(tmp_path)
    for index, path in enumerate(sorted((root / "masks").iterdir())):
        path.unlink()
        kvasir_mask(how, index).save(path.with_suffix(".png"))
    data = KvasirSEG(root, "train", dithered_masks=dithered)
    if how in ("white", "0/1", "palette"):
        data.verify(progress=False, sample=None)
        assert np.array_equal(data.read(0)[1].numpy(), labels(int(data.names[0][3:6]), (48, 40), 1))
    else:
        with pytest.raises(DatasetError, match=r"\.png (has no pixel|is not an opaque)"):
            data.read(0)


def test_dithering_follows_the_protocol() -> None:
    for name, expected in (("corrected", False), ("paper", True)):
        cfg = compose("train", ["dataset=kvasir_seg", f"protocol={name}"])
        assert cfg.dataset.source.dithered_masks is expected
    own = compose("train", ["dataset=kvasir_seg", "protocol=paper", "dataset.dithered_masks=false"])
    assert own.dataset.source.dithered_masks is False


def test_corners_are_labelled_with_the_index_of_void() -> None:
    assert compose("train", ["dataset=folder", "dataset.ignore_index=253"]).protocol.label_fill == 253
    assert compose("train", ["dataset=folder", "protocol=paper"]).protocol.label_fill == 0


def test_a_wrong_number_of_classes_is_found_before_training(tmp_path: Path) -> None:
    root = make_kvasir(tmp_path)
    for key, value in (("num_classes", 3), ("ignore_index", 254)):
        cfg = compose("train", ["dataset=kvasir_seg", f"dataset.root={root}", f"dataset.{key}={value}"])
        with pytest.raises(ConfigError, match=rf"dataset\.{key}={value}"):
            build.dataset(cfg, "train")


def test_names_match_in_any_composition(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    for kind, form in (("images", "NFC"), ("masks", "NFD")):
        (path,) = (root / kind).glob("case0.*")
        path.rename(path.with_stem(unicodedata.normalize(form, "Gr\u00f6\u00dfe")))
    (root / "train.txt").write_text("Gro\u0308\u00dfe\ncase1\n", encoding="utf-8")
    data = Folder(root, "train")
    data.verify(progress=False, sample=None)
    assert data.names == ["Gr\u00f6\u00dfe", "case1"]


def test_two_files_of_one_name_are_named(tmp_path: Path) -> None:
    root = make_folder(tmp_path)
    Image.fromarray(labels(0, (40, 32), 1)).save(root / "masks" / "case0.tif")
    with pytest.raises(DatasetError, match=r"case0\.png and case0\.tif have the same name"):
        Folder(root, "train").verify(progress=False)


def test_the_printed_command_has_what_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_folder(tmp_path, classes="classes: [background, lesion]\nignore_index: 253\n")
    table = (root / "classes.yaml").rename(tmp_path / "a table.yaml")
    assert main(["check", "folder", "--root", str(root), "--classes", str(table), "--quiet"]) == 0
    line = capsys.readouterr().out.rpartition("train on it: ")[2]
    cfg = compose("train", [word for word in shlex.split(line) if "=" in word])
    assert len(build.dataset(cfg, "train")) == 4


def test_a_published_split_needs_its_images(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="kvasir_seg_800_100_100: 1000 of its images"):
        main(["split", str(make_kvasir(tmp_path)), "--published", "kvasir_seg_800_100_100"])
    root = tmp_path / "copy"
    (root / "images").mkdir(parents=True)
    for split, count in (("train", 800), ("val", 100), ("test", 100)):
        for k in range(count):
            (root / "images" / f"{split}_{k:03d}.jpg").touch()
    assert main(["split", str(root), "--published", "kvasir_seg_800_100_100", "--quiet"]) == 0
    assert [len((root / f"{s}.txt").read_text().split()) for s in ("train", "val", "test")] == [800, 100, 100]


def test_a_name_cannot_split_or_hide_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names may hold line breaks, a terminal's commands and marks that turn the direction of writing."""
    root = make_folder(tmp_path, layout="split")
    name = "a\nnote: sound\x1b[2K\u202e"
    (root / "images" / "train" / f"{name}.png").write_bytes(b"not an image")
    for mask in (f"{name}.png", f"b\n{name}.png"):
        Image.new("L", (4, 4)).save(root / "masks" / "train" / mask)
    (root / "images" / "train" / f"{name}.xyz").touch()
    assert main(["check", "folder", "--root", str(root), "--quiet"]) == 1
    shown = capsys.readouterr()
    lines = (shown.out + shown.err).splitlines()
    assert all(line.isprintable() for line in lines) and not any(line.startswith("note: sound") for line in lines)
    assert any(r"a\nnote: sound\x1b[2K\u202e" in line and "is not an image" in line for line in lines)


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2K", "\u202e", "x" * 201])
def test_a_class_name_that_no_checkpoint_could_hold_is_named(tmp_path: Path, name: str) -> None:
    root = make_folder(tmp_path, classes=json.dumps({"classes": ["background", name]}))
    with pytest.raises(DatasetError, match="class name"):
        Folder(root, "train")
