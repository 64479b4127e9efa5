"""Whatever is wrong with data is named with its path and a remedy, before training or at the read."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import Image

from datasets import DatasetError
from datasets.base import DatasetInfo, spread
from datasets.cityscapes import Cityscapes
from datasets.decode import common_suffix, decode_image, decode_mask
from datasets.folder import Folder
from datasets.kvasir_seg import KvasirSEG
from datasets.synthetic import Synthetic
from datasets.voc2012 import VOC2012
from tests.trees import bomb, labels, make_cityscapes, make_folder, make_kvasir, make_voc, picture

BLACK, WHITE = (0, 0, 0), (255, 255, 255)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(make_folder(tmp_path), "train")


def complaint(data, index: int = 0) -> str:
    """The message for one pair; verification says the same as reading."""
    with pytest.raises(DatasetError) as raised:
        data.read(index)
    with pytest.raises(DatasetError) as verified:
        data.verify(progress=False, sample=None)
    assert str(raised.value) in str(verified.value)
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("source", [KvasirSEG, VOC2012, Cityscapes, Folder])
def test_a_missing_data_set_shows_the_tree_and_where_to_get_it(source, tmp_path):
    with pytest.raises(DatasetError, match=r"does not exist.*dataset\.root.*\n") as raised:
        source(tmp_path / "nowhere", "train")
    assert source.help_tree in str(raised.value)
    with pytest.raises(DatasetError, match=r"dataset\.root"):
        source(tmp_path, "train")  # there, but empty


@pytest.mark.parametrize(
    ("source", "make"), [(KvasirSEG, make_kvasir), (Cityscapes, make_cityscapes), (Folder, make_folder)]
)
def test_an_unknown_split_is_named(source, make, tmp_path):
    with pytest.raises(DatasetError, match="'dev'"):
        source(make(tmp_path), "dev")


def test_a_missing_mask(folder):
    folder.pairs[0].mask.unlink()
    assert "case0.png is missing" in complaint(folder)


def test_a_missing_image_is_found_in_split_and_folder(tmp_path):
    root = make_folder(tmp_path)
    (root / "images" / "case0.jpg").unlink()
    data = Folder(root, "train")
    assert "case0.jpg is missing" in complaint(data)
    with pytest.raises(DatasetError, match=r"case0.png is a mask without an image"):
        data.verify(progress=False)


def test_an_image_without_a_mask_in_a_listed_folder(tmp_path):
    root = make_cityscapes(tmp_path)
    data = Cityscapes(root, "train")
    data.pairs[1].mask.unlink()
    again = Cityscapes(root, "train")
    assert again.names == data.names
    assert f"{data.pairs[1].mask} is missing" in complaint(again, 1)


def test_sizes_that_differ_are_found_by_headers_alone(folder):
    Image.fromarray(labels(1, (30, 20), 1)).save(folder.pairs[1].mask)
    assert "40x32 but its mask" in complaint(folder, 1)
    assert len(folder.check(1, decode=False)) == 1 and not folder.check(0, decode=False)


def test_a_truncated_jpeg(folder):
    path = folder.pairs[0].image
    path.write_bytes(path.read_bytes()[:-300])
    assert str(path) in complaint(folder) and "truncated" in complaint(folder)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>"])
def test_a_file_that_is_not_an_image(folder, content):
    folder.pairs[0].image.write_bytes(content)
    assert "case0.jpg is not an image" in complaint(folder)


def test_a_truncated_png_mask(folder):
    path = folder.pairs[0].mask
    path.write_bytes(path.read_bytes()[:-30])
    assert "case0.png is damaged" in complaint(folder)


def test_labels_outside_the_table(folder):
    mask = labels(0, (40, 32), 1)
    mask[0, :3] = 2, 7, 254
    Image.fromarray(mask).save(folder.pairs[0].mask)
    assert "holds labels 2, 7, 254" in complaint(folder)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_masks_of_colours_where_indices_are_needed(tmp_path, mode):
    path = tmp_path / "mask.tif"
    picture(0, (40, 32)).convert(mode).point(lambda value: value // 2).save(path)
    with pytest.raises(DatasetError, match=rf"mask.tif has colours or transparency \(mode {mode}\).*grey PNG"):
        decode_mask(path)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_saved_as_colour_is_grey(tmp_path, mode):
    Image.fromarray(labels(0, (40, 32), 255)).convert(mode).save(tmp_path / "mask.png")
    assert np.array_equal(decode_mask(tmp_path / "mask.png"), labels(0, (40, 32), 255))


def test_a_palette_mask_gives_indices_not_colours(tmp_path):
    image = Image.fromarray(labels(0, (40, 32), 1))
    image.putpalette([*WHITE, *BLACK] + [0] * 762)
    image.save(tmp_path / "mask.png")
    assert np.array_equal(decode_mask(tmp_path / "mask.png"), labels(0, (40, 32), 1))


def test_masks_of_one_and_of_sixteen_bits(tmp_path):
    mask = labels(0, (40, 32), 1)
    Image.fromarray(mask.astype(bool)).save(tmp_path / "bit.png")
    assert np.array_equal(decode_mask(tmp_path / "bit.png"), mask)
    Image.fromarray(mask.astype(np.uint16) * 200).save(tmp_path / "deep.png")
    assert np.array_equal(decode_mask(tmp_path / "deep.png"), mask * 200)
    Image.fromarray(mask.astype(np.uint16) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(DatasetError, match=r"deep.png holds labels from 0 to 1000"):
        decode_mask(tmp_path / "deep.png")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image = picture(0, (40, 32)).convert(mode)
    image.save(path)
    decoded = decode_image(path)
    assert decoded.shape == (32, 40, 3) and decoded.dtype == np.uint8
    assert abs(decoded.astype(int) - np.asarray(image.convert("RGB"), dtype=int)).mean() < 4


def test_sixteen_bit_grey_images_are_rejected(tmp_path):
    Image.fromarray(np.full((8, 8), 3000, dtype=np.uint16)).save(tmp_path / "ct.png")
    with pytest.raises(DatasetError, match=r"ct.png has more than 8 bits"):
        decode_image(tmp_path / "ct.png")


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def test_exif_rotation_follows_the_mask_where_its_size_tells(tmp_path):
    path = tmp_path / "photo.jpg"
    picture(0, (40, 32)).save(path, exif=exif(6), quality=95)
    assert decode_image(path, mask_size=(40, 32)).shape == (32, 40, 3)
    upright = decode_image(path, mask_size=(32, 40))
    stored = decode_image(path, mask_size=(40, 32))
    assert np.array_equal(upright, np.rot90(stored, -1))


@pytest.mark.parametrize(("orientation", "size"), [(3, (40, 32)), (2, (40, 32)), (6, (40, 40))])
def test_exif_rotation_of_one_of_a_pair_is_rejected(tmp_path, orientation, size):
    data = Folder(make_folder(tmp_path, size=size), "train")
    picture(0, size).save(data.pairs[0].image, exif=exif(orientation))
    message = complaint(data)
    assert f"EXIF orientation {orientation}" in message and "-auto-orient" in message
    assert data.check(0, decode=False)  # headers suffice


def test_cityscapes_rejects_train_ids(tmp_path):
    data = Cityscapes(make_cityscapes(tmp_path), "train")
    Image.fromarray(labels(0, (64, 32), 13, outside=255)).save(data.pairs[0].mask)
    assert "holds train ids (0..18, 255)" in complaint(data)


def test_cityscapes_notices_train_ids_without_void_over_the_whole_set(tmp_path):
    data = Cityscapes(make_cityscapes(tmp_path), "train")
    for pair in data.pairs:
        Image.fromarray(labels(0, (64, 32), 13, outside=0)).save(pair.mask)
    with pytest.raises(DatasetError, match="train ids"):
        data.verify(progress=False)


def test_cityscapes_with_only_train_id_files(tmp_path):
    data = Cityscapes(make_cityscapes(tmp_path), "train")
    path = data.pairs[0].mask
    path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    assert "labelTrainIds.png is there" in complaint(data)


def test_label_ids_where_train_ids_were_meant(tmp_path):
    names = ", ".join(f"c{k}" for k in range(19))
    data = Folder(make_folder(tmp_path, classes=f"classes: [{names}]\n", inside=26), "train")
    assert "use dataset=cityscapes" in complaint(data)


def test_a_binary_mask_of_0_and_255_is_not_taken_for_void(tmp_path):
    data = Folder(make_folder(tmp_path, inside=255), "train")
    with pytest.raises(DatasetError, match=r"hold only 0 and 255 \(void\).* add `value: 255`"):
        data.verify(progress=False)


def test_blurred_masks_of_two_values(tmp_path):
    table = "classes: [background, {name: lesion, value: 255}]\n"
    root = make_folder(tmp_path, classes=table)
    for path in sorted((root / "masks").glob("*.png")):
        index = int(path.stem[4:])
        mask = Image.fromarray(labels(index, (40, 32), 255)).convert("RGB")
        path.unlink()
        mask.save(path.with_suffix(".jpg"), quality=75)
    assert "add `nearest: true`" in complaint(Folder(root, "train"))
    (root / "classes.yaml").write_text(table + "nearest: true\n")
    for split in ("train", "val"):
        data = Folder(root, split)
        data.verify(progress=False)
        for index, name in enumerate(data.names):
            assert np.array_equal(data.read(index)[1], labels(int(name[4:]), (40, 32), 1))


def test_masks_that_are_named_after_their_images(tmp_path):
    root = make_folder(tmp_path)
    for path in (root / "masks").iterdir():
        path.rename(path.with_name(f"{path.stem}_seg.png"))
    with pytest.raises(DatasetError, match=r"add `mask_suffix: _seg` to classes\.yaml"):
        Folder(root, "train")
    with (root / "classes.yaml").open("a") as file:
        file.write("mask_suffix: _seg\n")
    data = Folder(root, "train")
    data.verify(progress=False)
    data.pairs[0].mask.unlink()
    assert "case0_seg.png is missing" in Folder(root, "train").check(0)[0]


def test_the_suffix_of_names_that_begin_alike():
    assert common_suffix(["img_1", "img_10"], ["img_10_mask", "img_1_mask"]) == "_mask"
    assert common_suffix(["a", "b"], ["a", "b"]) == common_suffix(["a", "b"], ["a_x"]) == ""
    assert common_suffix([], ["a"]) == ""
    assert common_suffix(["a", "b", "c"], ["a_x", "c_x", "d_x"]) == "_x"  # one mask is missing
    assert common_suffix(["a", "b", "c"], ["a", "b_x", "c_x"]) == ""


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("classes: [a, b]\nnearest: true", "nearest needs two values at least 64 apart.*have 0, 1"),
        ("classes: [a, {name: b, value: 128}, {name: c, value: 255}]\nnearest: true", "have 0, 128, 255"),
        ("classes: [a, {name: b, value: 255}]\nnearest: true\nrgb_masks: true", "nearest is for grey masks"),
        ("classes: [a, b", "is not valid YAML"),
        ("klasses: [a]", "unknown key 'klasses'"),
        ("classes: lesion", "must be a list of names"),
        ("classes: [{title: a}]", "a class has a name"),
        ("classes: [a, {name: b, value: 0}]", "value 0 of class 'b' is invalid"),
        ("classes: [a, {name: b, color: [1, 2]}]", r"the color of class 'b' is \[1, 2\]"),
        ("classes: [a, {name: b, color: [300, 0, 0]}]", r"the color of class 'b' is \[300, 0, 0\]"),
        ("classes: [a, {name: b, color: red}]", r"the color of class 'b' is 'red'"),
        ("classes: [a, {name: b, value: 1.5}]", "value 1.5 of class 'b' is invalid"),
        ("classes: [a, {name: b, value: null}]", "value None of class 'b' is invalid"),
        ("classes: [a, {name: b, value: true}]", "value True of class 'b' is invalid"),
        ("classes: [a, b]\nmean: 3", "mean=3 is invalid"),
        ("classes: [a, b]\nmean: [123.7, 116.3, 103.5]", r"mean=\[123.7.* from 0 to 1"),
        ("classes: [a, b]\nmean: [.nan, 0, 0]", r"mean=\[nan.* from 0 to 1"),
        ("classes: [a, b]\nstd: [0, 0, 0]", r"std=\[0, 0, 0\] is invalid.*above 0"),
        ("classes: [a, b]\nscored: []", r"scored=\[\] is invalid"),
        ("classes: [a, b]\nscored: 1", r"scored=1 is invalid"),
        ("classes: [a, b]\nignore_index: x", "ignore_index='x' is invalid"),
        ("classes: [a, b]\nrgb_masks: maybe", "rgb_masks='maybe' is invalid"),
        ("classes: [a, yes]", "True. Fix: put the name in quotes"),
        ("classes: [{name: null}]", "None. Fix: put the name in quotes"),
        ("classes: {0: a, x: b}", "must be a list of names"),
        ("classes: {1: a, 2: b}", "indices of `classes` are 1, 2"),  # 1 would be read as the class b
        ("{0: a, 2: b}", "indices of `classes` are 0, 2"),
        ("classes: [a, b]\nscored: [2]", r"scored=\(2,\) is invalid: expected 0..1"),
        ("classes: [a, b]\nignore_index: 1", r"ignore_index=1 is invalid: expected 2..255"),
        ("classes: [a, b, {name: c, color: [128, 0, 0]}]\nrgb_masks: true", "have one colour"),
    ],
)
def test_a_faulty_table_of_classes(tmp_path, table, message):
    with pytest.raises(DatasetError, match=message) as raised:
        Folder(make_folder(tmp_path, classes=table), "train")
    assert "classes.yaml" in str(raised.value) and "\n" not in str(raised.value)


def test_a_split_file_that_is_not_text(tmp_path):
    root = make_folder(tmp_path)
    (root / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DatasetError, match=r"train\.txt is not a text file"):
        Folder(root, "train")


def test_links_in_a_circle_and_pixels_beyond_belief_are_named(tmp_path):
    data = Folder(make_folder(tmp_path), "train")
    path = data.pairs[0].image
    path.unlink()
    path.symlink_to(path.name)
    again = Folder(data.root, "train")
    assert re.search(r"case0\.jpg cannot be opened \(.*symbolic links", complaint(again))
    path.unlink()
    bomb(path)
    assert "case0.jpg claims to have 40000000000 pixels" in complaint(again)


def test_a_table_with_another_number_of_classes_than_configured(tmp_path):
    with pytest.raises(DatasetError, match=r"num_classes 2, not 3.*set dataset\.num_classes=2"):
        Folder(make_folder(tmp_path), "train", num_classes=3)


def test_many_faults_are_counted_and_the_first_are_shown(tmp_path):
    data = KvasirSEG(make_kvasir(tmp_path, count=25), "train")
    for pair in data.pairs:
        pair.image.write_bytes(b"")
    with pytest.raises(DatasetError, match=r"kvasir_seg train has 22 faults:(\n.*){10}\n  ... and 12 more$"):
        data.verify(progress=False)


def test_the_sample_that_is_decoded_is_spread_evenly():
    assert spread(10, None) == list(range(10)) == spread(10, 10)
    assert spread(100, 4) == [12, 37, 62, 87]
    assert spread(5, 0) == []


def test_what_a_data_set_states_is_checked():
    with pytest.raises(ValueError, match="2 classes but 1 colours"):
        DatasetInfo("x", ("a", "b"), (BLACK,), (1,))
    with pytest.raises(ValueError, match="300 classes"):
        DatasetInfo("x", tuple(map(str, range(300))), (BLACK,) * 300, (1,))


@pytest.mark.parametrize(
    "arguments", [{"split": "dev"}, {"num_classes": 1}, {"num_classes": 9}, {"num_images": 0}, {"size": 4}]
)
def test_synthetic_rejects_what_it_cannot_draw(arguments):
    with pytest.raises(ValueError, match=str(next(iter(arguments.values())))):
        Synthetic(**arguments)


def test_voc_line_without_files(tmp_path):
    root = make_voc(tmp_path)
    path = root / "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
    path.write_text(path.read_text() + "2099_000001\n")
    data = VOC2012(root, "train")
    assert "2099_000001.png is missing" in complaint(data, len(data) - 1)
