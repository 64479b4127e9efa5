"""Each data set on a small tree in its real layout: what is found, how it is split, what labels become."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from datasets import DatasetError, DatasetInfo, SegmentationDataset
from datasets.cityscapes import Cityscapes
from datasets.decode import make_split
from datasets.folder import Folder
from datasets.kvasir_seg import VAL_FRACTION, KvasirSEG
from datasets.paired import END_BYTES
from datasets.synthetic import Synthetic
from datasets.voc2012 import CLASSES, VOC2012, voc_colour
from tests.trees import labels, make_cityscapes, make_folder, make_kvasir, make_voc

SOURCES = {
    "kvasir_seg": lambda path: KvasirSEG(make_kvasir(path), "train"),
    "voc2012": lambda path: VOC2012(make_voc(path), "train"),
    "cityscapes": lambda path: Cityscapes(make_cityscapes(path), "train"),
    "folder": lambda path: Folder(make_folder(path), "train"),
    "synthetic": lambda path: Synthetic("train", num_images=3, size=32),
}


@pytest.fixture(params=SOURCES)
def source(request, tmp_path) -> SegmentationDataset:
    return SOURCES[request.param](tmp_path)


def test_every_source_keeps_the_contract(source):
    assert isinstance(source.info, DatasetInfo) and len(source) == len(source.names) > 0
    assert len(set(source.names)) == len(source)
    for index in range(len(source)):
        image, mask = source.read(index)
        assert isinstance(image, tv_tensors.Image) and isinstance(mask, tv_tensors.Mask)
        assert image.dtype == mask.dtype == torch.uint8
        assert image.shape == (3, *mask.shape)
        assert set(mask.unique().tolist()) <= {*range(source.info.num_classes), source.info.ignore_index}
    again = source.read(0)
    assert torch.equal(again[0], source.read(0)[0]) and torch.equal(again[1], source.read(0)[1])
    source.verify(progress=False)
    source.verify(progress=False, sample=None)


def test_the_fingerprint_tells_data_apart(tmp_path):
    root = make_kvasir(tmp_path)
    before = KvasirSEG(root, "train").fingerprint()
    assert before == KvasirSEG(root, "train").fingerprint()
    assert before != KvasirSEG(root, "val").fingerprint()
    path = KvasirSEG(root, "train").pairs[0].mask
    path.write_bytes(path.read_bytes() + b"\0")
    assert before != KvasirSEG(root, "train").fingerprint()


def swap(one: Path, other: Path) -> None:
    """Exchange the contents of two files of one size."""
    contents = one.read_bytes(), other.read_bytes()
    assert len(contents[0]) == len(contents[1]) and contents[0] != contents[1]
    one.write_bytes(contents[1])
    other.write_bytes(contents[0])


def test_the_checksum_tells_contents_apart(tmp_path):
    """Masks under the same names with the same sizes, another meaning of labels, and pixels of an image."""
    root = make_folder(tmp_path)
    for path in [*(root / "masks").iterdir()]:  # without compression, all have one size
        with Image.open(path) as image:
            image.save(path.with_suffix(".bmp"))
        path.unlink()
    noise = np.random.default_rng(0)
    for pair in Folder(root, "train").pairs[:2]:
        big = noise.integers(0, 256, (200, 300, 3), dtype=np.uint8)  # larger than both ends that are read
        Image.fromarray(big).save(pair.image.with_suffix(".png"))
        pair.image.unlink()

    def checksum() -> str:
        return Folder(root, "train").checksum()

    first, second = Folder(root, "train").pairs[:2]
    names_and_sizes, seen = Folder(root, "train").fingerprint(), [checksum()]
    assert checksum() == seen[0] != Folder(root, "val").checksum()
    swap(first.mask, second.mask)
    seen.append(checksum())
    swap(first.image, second.image)
    seen.append(checksum())
    assert Folder(root, "train").fingerprint() == names_and_sizes
    table = "classes: [{name: background, value: 1}, {name: lesion, value: 0}]\n"
    (root / "classes.yaml").write_text(table)  # the same names
    seen.append(checksum())
    (root / "classes.yaml").write_text(table + "mean: [0.5, 0.5, 0.5]\n")
    seen.append(checksum())
    first.mask.unlink()
    seen.append(checksum())
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "tif"])
def test_the_checksum_finds_one_pixel_in_the_middle_of_a_large_image(tmp_path, kind):
    root = make_folder(tmp_path)
    image = Folder(root, "train").pairs[0].image
    pixels = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    path, seen = image.with_suffix(f".{kind}"), []
    image.unlink()
    for value in (0, 1):
        pixels[200, 200] = value
        Image.fromarray(pixels).save(path, **({"quality": 95} if kind == "jpg" else {}))
        seen.append((path.stat().st_size, Folder(root, "train").checksum()))
    assert seen[0][0] > 2 * END_BYTES
    assert seen[0][1] != seen[1][1]
    if kind in ("bmp", "tif"):  # uncompressed: nothing but the middle differs
        assert seen[0][0] == seen[1][0]


def test_every_source_has_a_checksum_that_follows_its_masks(tmp_path):
    sources = {
        "kvasir_seg": lambda: KvasirSEG(make_kvasir(tmp_path / "k", layout="files"), "train"),
        "voc2012": lambda: VOC2012(make_voc(tmp_path / "v"), "train"),
        "cityscapes": lambda: Cityscapes(make_cityscapes(tmp_path / "c"), "train"),
    }
    for name, build in sources.items():
        first = build()
        mask = first.pairs[0].mask
        again = type(first)(first.root, "train")
        assert first.checksum() == again.checksum(), name
        mask.write_bytes(first.pairs[1].mask.read_bytes())
        assert type(first)(first.root, "train").checksum() != first.checksum(), name
    hard, dithered = (KvasirSEG(tmp_path / "k" / "Kvasir-SEG", "train", dithered_masks=d) for d in (False, True))
    assert hard.checksum() != dithered.checksum()


@pytest.mark.parametrize("layout", ["released", "files", "split"])
def test_kvasir_layouts(tmp_path, layout):
    root = make_kvasir(tmp_path, layout=layout)
    train, val = KvasirSEG(root, "train"), KvasirSEG(root, "val")
    assert len(train) + len(val) == 25 and not set(train.names) & set(val.names)
    assert len(val) == (3 if layout == "released" else 5)
    index = int(train.names[1][3:6])
    truth = labels(index, (48, 40), 1)
    # JPEG blurs the mask's edge but never moves it by more than a pixel or two.
    assert (train.read(1)[1].numpy() != truth).mean() < 0.02


def test_kvasir_default_split_is_pinned():
    split = make_split([f"image{k}" for k in range(1000)], {"val": VAL_FRACTION})
    assert (len(split["train"]), len(split["val"])) == (880, 120)
    assert split["val"][:3] == ["image107", "image125", "image129"]
    assert split == make_split([f"image{k}" for k in reversed(range(1000))], {"val": VAL_FRACTION})


def test_kvasir_without_an_image_shows_the_layout(tmp_path):
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    with pytest.raises(DatasetError, match=r"no image of split 'val'.*Fix: dataset.root"):
        KvasirSEG(tmp_path, "val")


@pytest.mark.golden
def test_kvasir_masks_threshold_or_dither_as_recorded(tmp_path, recordings):
    recorded = np.load(recordings / "full/preprocess.npz")
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        # PNG content keeps the recorded pixels; the reader goes by content, not by suffix.
        Image.fromarray(recorded["kvasir_mask_rgb"]).save(tmp_path / folder / "a.jpg", format="PNG")
    (tmp_path / "val.txt").write_text("a\n")
    mask = KvasirSEG(tmp_path, "val", dithered_masks=True).read(0)[1].numpy()
    assert np.array_equal(mask, recorded["kvasir_mask_label"])
    mask = KvasirSEG(tmp_path, "val").read(0)[1].numpy()
    assert np.array_equal(mask, recorded["kvasir_mask_threshold128"])


def test_voc_splits_and_roots(tmp_path):
    root = make_voc(tmp_path, aug=True)
    train, val = VOC2012(root, "train"), VOC2012(root, "val")
    assert train.names == ["2007_000000", "2007_000001", "2007_000003", "2007_000004"]
    assert VOC2012(root / "VOCdevkit", "trainval").names == sorted(train.names + val.names)
    aug = VOC2012(root / "VOCdevkit" / "VOC2012", "train_aug")
    assert aug.names == train.names and aug.pairs[0].mask.parent.name == "SegmentationClassAug"
    assert torch.equal(aug.read(1)[1], train.read(1)[1])
    mask = train.read(2)[1]  # index 3: class 4, with a void row
    assert mask.unique().tolist() == [0, 4, 255]
    with pytest.raises(DatasetError, match=r"split 'test' has no file .*present: train, train_aug, val"):
        VOC2012(root, "test")


def test_voc_facts():
    assert len(CLASSES) == 21 and VOC2012.info.scored == tuple(range(1, 21))
    assert [voc_colour(k) for k in (1, 8, 15, 20)] == [(128, 0, 0), (64, 0, 0), (192, 128, 128), (0, 64, 128)]


def test_cityscapes_label_ids_become_train_ids(tmp_path):
    root = make_cityscapes(tmp_path)
    data = Cityscapes(root, "val")
    assert data.names[0] == "frankfurt_000000_000019" and data.names[-1].startswith("lindau")
    raw = np.full((32, 64), 255, dtype=np.uint8)
    raw[1:, 0][:31] = np.arange(31)
    raw[:3, 1] = 31, 32, 33
    Image.fromarray(raw).save(data.pairs[0].mask)
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5} | {19 + k: 6 + k for k in range(10)}
    train_ids |= {31: 16, 32: 17, 33: 18}
    expected = np.vectorize(lambda label: train_ids.get(int(label), 255))(raw)
    assert np.array_equal(data.read(0)[1].numpy(), expected)


@pytest.mark.parametrize("layout", ["files", "split"])
def test_folder_layouts(tmp_path, layout):
    data = Folder(make_folder(tmp_path, layout=layout), "val")
    assert data.names == ["case2", "case5"]
    assert np.array_equal(data.read(0)[1].numpy(), labels(2, (40, 32), 1))
    assert data.info.classes == ("background", "lesion") and data.info.scored == (1,)


def test_a_folders_split_may_name_files_with_dots_and_with_suffixes(tmp_path):
    root = make_folder(tmp_path)
    for folder, suffix in (("images", ".png"), ("masks", ".png")):
        for name in ("case", "case.1"):
            Image.new("RGB" if folder == "images" else "L", (8, 8)).save(root / folder / f"{name}{suffix}")
    (root / "train.txt").write_text("case.1\ncase2.png\n")
    assert [pair.image.stem for pair in Folder(root, "train").pairs] == ["case.1", "case2"]


def test_folder_with_a_sub_folder_for_each_patient(tmp_path):
    root = make_folder(tmp_path)
    for kind in ("images", "masks"):
        for patient in (1, 2):  # the same names in both
            home = root / kind / f"patient{patient}"
            home.mkdir()
            for number in range(3):
                (path,) = (root / kind).glob(f"case{3 * patient - 3 + number}.*")
                path.rename(home / f"img{number}{path.suffix}")
    (root / "train.txt").write_text("patient1/img0\npatient1/img1.jpg\npatient1/img2\n")
    (root / "val.txt").write_text("patient2/img0\npatient2/img9\n")
    data = Folder(root, "train")
    data.verify(progress=False)
    assert data.names == ["patient1/img0", "patient1/img1", "patient1/img2"]
    assert data.pairs[1].mask == root / "masks" / "patient1" / "img1.png"
    assert "patient2/img9.png is missing" in Folder(root, "val").check(1)[0]


def test_folder_table(tmp_path):
    table = """
        classes:
          - {name: tissue, value: [0, 7], color: [9, 9, 9]}
          - {name: lesion, value: 255, color: [250, 0, 0]}
        scored: [1]
        ignore_index: 254
        mean: [0.5, 0.5, 0.5]
    """.replace("        ", "")
    data = Folder(make_folder(tmp_path, classes=table, inside=255), "train")
    assert data.read(0)[1].unique().tolist() == [0, 1]
    assert data.info.palette == ((9, 9, 9), (250, 0, 0)) and data.info.mean == (0.5, 0.5, 0.5)


def test_folder_takes_rgb_masks_by_colour(tmp_path):
    table = "classes: [{name: a, color: [0, 0, 0]}, {name: b, color: [255, 0, 0]}]\nrgb_masks: true\n"
    root = make_folder(tmp_path, classes=table)
    colours = np.zeros((32, 40, 3), dtype=np.uint8)
    colours[5:9, 5:9, 0] = 255
    for path in (root / "masks").iterdir():
        Image.fromarray(colours).save(path)
    data = Folder(root, "train")
    assert int(data.read(0)[1].sum()) == 16
    colours[0, 0] = 1, 2, 3
    Image.fromarray(colours).save(data.pairs[0].mask)
    with pytest.raises(DatasetError, match=r"case0.png has colours.*#010203"):
        data.read(0)


@pytest.mark.golden
def test_real_trees(real_data):
    kvasir = KvasirSEG(real_data / "Kvasir-SEG", "val")
    voc = VOC2012(real_data, "trainval")
    assert (len(kvasir), len(voc)) == (100, 632)
    for data in (kvasir, voc):
        data.verify(progress=False, sample=4)
