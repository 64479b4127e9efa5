"""Image files of every kind: read as meant, or rejected with their path; never read as something else."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datasets import DatasetError
from datasets.decode import (
    EXIF_ORIENTATION,
    TO_STORED,
    UPRIGHT,
    canonical_name,
    decode_image,
    decode_mask,
    list_images,
    load_image,
    orient,
    read_split,
)

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
MASK = np.zeros((24, 40), dtype=np.uint8)
MASK[3:9, 4:20] = 1
SUFFIXES = ("tif", "png", "webp", "jpg")


def with_orientation(path: Path, pixels: np.ndarray, orientation: int) -> Path:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"tif": {"tiffinfo": {EXIF_ORIENTATION: orientation}}, "webp": {"exif": exif, "lossless": True}}
    Image.fromarray(pixels).save(path, **options.get(path.suffix[1:], {"exif": exif}))
    return path


def png(path: Path, kind: int, bits: int, rows: bytes, width: int, extra: tuple[bytes, bytes] | None = None) -> Path:
    """Write a PNG of any kind (0 grey, 2 RGB, ...) and depth, whose rows are all the same."""
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, 4, bits, kind, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + rows) * 4)), (b"IEND", b"")]
    for name, data in [chunks[0], *([extra] if extra else []), *chunks[1:]]:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    path.write_bytes(content)
    return path


def rejected(path: Path, words: str, read=decode_image) -> None:
    with pytest.raises(DatasetError, match=words) as raised:
        read(path)
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_orientation_turns_image_and_mask_alike(tmp_path: Path, suffix: str, orientation: int) -> None:
    image = with_orientation(tmp_path / f"a.{suffix}", PIXELS, orientation)
    stored = load_image(image)
    assert stored.orientation == orientation and stored.image.size == (40, 24)
    mask_path = with_orientation(tmp_path / "mask.png", MASK, orientation)
    mask = decode_mask(mask_path)
    assert np.array_equal(mask, np.asarray(orient(Image.fromarray(MASK), UPRIGHT, orientation)))
    pixels = decode_image(image, mask.shape[::-1], mask_path)
    assert pixels.shape[:2] == mask.shape
    if suffix != "jpg":
        assert np.array_equal(np.asarray(orient(Image.fromarray(pixels), TO_STORED, orientation)), PIXELS)
    plain = tmp_path / "plain.png"
    Image.fromarray(MASK).save(plain)
    if orientation in (2, 3, 4):
        with pytest.raises(DatasetError, match=f"orientation {orientation}"):
            decode_image(image, (40, 24), plain)
    else:
        assert decode_image(image, (40, 24), plain).shape[:2] == (24, 40)


@pytest.mark.parametrize("kind", [2, 4, 6])
def test_colours_of_16_bits_are_not_cut_to_8(tmp_path: Path, kind: int) -> None:
    path = png(tmp_path / "a.png", kind, 16, bytes(8 * {2: 3, 4: 2, 6: 4}[kind] * 2), 8)
    rejected(path, "more than 8 bits per channel")
    rejected(path, "more than 8 bits per channel", decode_mask)


def test_grey_of_few_bits_holds_indices(tmp_path: Path) -> None:
    assert decode_mask(png(tmp_path / "a.png", 0, 2, b"\x1b", 4))[0].tolist() == [0, 1, 2, 3]
    assert decode_mask(png(tmp_path / "b.png", 0, 4, b"\x01\x2f", 4))[0].tolist() == [0, 1, 2, 15]
    assert decode_mask(png(tmp_path / "c.png", 0, 1, b"\x50", 4))[0].tolist() == [0, 1, 0, 1]


def test_several_pages_are_rejected_and_small_copies_of_one_are_not(tmp_path: Path) -> None:
    first, second = Image.fromarray(PIXELS), Image.fromarray(255 - PIXELS)
    for suffix in ("tif", "png", "webp", "gif"):
        first.save(tmp_path / f"a.{suffix}", save_all=True, append_images=[second])
        rejected(tmp_path / f"a.{suffix}", "2 pages or frames")
    small = first.resize((20, 12))
    small.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "pyramid.tif", save_all=True, append_images=[small])
    assert np.array_equal(decode_image(tmp_path / "pyramid.tif"), PIXELS)
    first.save(tmp_path / "camera.jpg", format="MPO", save_all=True, append_images=[second])
    assert decode_image(tmp_path / "camera.jpg").shape == PIXELS.shape


@pytest.mark.parametrize("value", [1, 7, 255])
def test_gif_masks_hold_the_grey_they_were_saved_from(tmp_path: Path, value: int) -> None:
    Image.fromarray(MASK * np.uint8(value)).save(tmp_path / "a.gif")
    assert np.array_equal(decode_mask(tmp_path / "a.gif"), MASK * value)
    coloured = Image.fromarray(MASK)
    coloured.putpalette([0, 0, 0, 128, 0, 0] + [0] * 762)
    coloured.save(tmp_path / "b.gif")
    assert np.array_equal(decode_mask(tmp_path / "b.gif"), MASK)


def test_float_masks_of_whole_numbers_are_read(tmp_path: Path) -> None:
    for dtype in (np.float32, np.int32, np.uint16):
        Image.fromarray(MASK.astype(dtype)).save(tmp_path / "a.tif")
        assert np.array_equal(decode_mask(tmp_path / "a.tif"), MASK)
    rejected(tmp_path / "a.tif", "more than 8 bits")
    Image.fromarray(MASK.astype(np.float32) / 2).save(tmp_path / "a.tif")
    rejected(tmp_path / "a.tif", r"labels from 0 to 0\.5", decode_mask)


def test_what_is_not_a_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe", "device", "folder"):
        rejected(tmp_path / f"{name}.png", "not a regular file")


def test_other_formats_do_not_reach_their_programs(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    rejected(path, "not an image of a supported format")
    Image.fromarray(PIXELS).save(path, format="PPM")
    rejected(path, "not an image of a supported format")


@pytest.mark.parametrize("name", [b"zTXt", b"iCCP"])
def test_much_metadata_is_named(tmp_path: Path, name: bytes) -> None:
    data = b"Comment\0\0" + zlib.compress(b"a" * (2 << 20))
    rejected(png(tmp_path / "a.png", 2, 8, bytes(12), 4, extra=(name, data)), "is damaged")


def test_broken_exif_is_named(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=b"Exif\0\0BROKEN")
    rejected(tmp_path / "a.png", "is damaged")


def test_a_missing_file_mentions_one_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "a.npy").touch()
    rejected(tmp_path / "a.png", r"a\.png is missing; a\.npy")


def encoded(suffix: str, orientation: int = 1) -> bytes:
    memory = io.BytesIO()
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper())
    options = {} if suffix in ("bmp", "gif") else {"exif": exif}
    Image.fromarray(PIXELS).save(memory, format=kind, **options)
    return memory.getvalue()


def fuzz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int) -> int:
    """Change bytes of files of every format; reading gives pixels or a DatasetError. Return how many were rejected."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1 << 18)  # sizes beyond it are named, not allocated
    generator, failures = np.random.default_rng(0), 0
    files = [encoded(suffix, turn) for suffix in (*SUFFIXES, "bmp", "gif") for turn in (1, 6)]
    path = tmp_path / "a.png"
    for number in range(rounds):
        content = bytearray(files[number % len(files)])
        for _ in range(generator.integers(1, 6)):
            place = generator.integers(len(content) if generator.random() < 0.3 else min(len(content), 200))
            content[place] = generator.integers(256)
        if generator.random() < 0.2:
            del content[generator.integers(len(content)) :]
        path.write_bytes(content)
        for read in (decode_image, decode_mask):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    array = read(path)
                assert array.dtype == np.uint8
            except DatasetError as error:
                assert str(path) in str(error)
                failures += 1
    return failures


def test_mutated_files_are_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(tmp_path, monkeypatch, 240) > 50


@pytest.mark.slow
def test_many_mutated_files_are_read_or_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fuzz(tmp_path, monkeypatch, 6000) > 1000


def test_names_have_one_spelling() -> None:
    latin = b"Gr\xf6\xdfe".decode("utf-8", "surrogateescape")
    assert (
        canonical_name("Gro\u0308\u00dfe")
        == canonical_name("Gr\u00f6\u00dfe")
        == canonical_name(latin)
        == "Gr\u00f6\u00dfe"
    )


@pytest.mark.parametrize(
    "content",
    [
        "Gr\u00f6\u00dfe\na,b\n".encode(),
        "\ufeffGro\u0308\u00dfe\r\na,b\r\n".encode(),
        "\ufeffGr\u00f6\u00dfe\r\na,b".encode("utf-16-le"),
        "Gr\u00f6\u00dfe\n\n a,b \n".encode("latin-1"),
    ],
)
def test_split_files_of_other_systems(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "train.txt").write_bytes(content)
    assert read_split(tmp_path / "train.txt") == ["Gr\u00f6\u00dfe", "a,b"]


def test_folders_are_listed_with_links_and_without_cycles(tmp_path: Path) -> None:
    images, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    for path in (images / "a.jpg", images / ".cache" / "b.jpg", elsewhere / "c.JPG", images / "d.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (images / "linked").symlink_to(elsewhere)
    (images / "circle").symlink_to(".")
    (elsewhere / "back").symlink_to(images)
    (images / "a.png").touch()
    found = list_images(images, below=True)
    assert list(found.images) == ["a", "linked/c"]
    assert found.clashes == [(images / "a.jpg", images / "a.png")]
    assert "2 .npy" not in found.ignored_text and "1 .npy" in found.ignored_text
    assert list(list_images(images).images) == ["a"]
    assert list(list_images(images, below=True, without=elsewhere.resolve()).images) == ["a"]
