"""decode.py on NIfTI volumes and on what nnU-Net exports: places in space, headers, pickles, damaged files."""

from __future__ import annotations

import codecs
import gzip
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import rankseg
from scripts.decoding.nnunet import geometry_of
from tests.scripts.decoding import Touch, drawn, result, run, save_all, softmax_maps


class Call:
    """Unpickling calls a function."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


class TestNifti:
    def test_keeps_affine_and_header(self, tmp_path: Path) -> None:
        nib = pytest.importorskip("nibabel")
        probs = softmax_maps(1, (8, 9, 10))[0]
        affine = np.array([[0, -1.5, 0, 10], [2, 0, 0, -20], [0, 0, 3, 5], [0, 0, 0, 1.0]])
        image = nib.Nifti1Image(np.moveaxis(probs.numpy(), 0, -1), affine)
        image.header.set_xyzt_units("mm", "sec")
        image.header["descrip"] = b"from a scanner"
        image.set_sform(affine, 1)
        image.set_qform(affine, 4)
        (tmp_path / "p").mkdir()
        nib.save(image, tmp_path / "p" / "c.nii.gz")
        assert run(tmp_path / "p", "-p", "max", "-p", "rankdice", "--out", tmp_path / "o") == 0
        for rule in ("max", "rankdice"):
            got = nib.load(tmp_path / "o" / rule / "c.nii.gz")
            assert np.array_equal(got.affine, affine)
            assert got.header.get_xyzt_units()[0] == "mm" and b"from a scanner" in bytes(got.header["descrip"])
            assert (got.header["sform_code"], got.header["qform_code"]) == (1, 4)
            assert got.get_data_dtype() == np.uint8

    def test_labels_with_another_affine_are_named(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        nib = pytest.importorskip("nibabel")
        probs = softmax_maps(1, (8, 9, 10))[0]
        truth, flipped = drawn(probs, 0), np.diag([-1.0, 1, 1, 1])
        flipped[0, 3] = 7
        for folder in ("p", "l"):
            (tmp_path / folder).mkdir()
        for name in "abc":
            nib.save(nib.Nifti1Image(np.moveaxis(probs.numpy(), 0, -1), np.eye(4)), tmp_path / "p" / f"{name}.nii")
        nib.save(nib.Nifti1Image(truth, np.eye(4)), tmp_path / "l" / "a.nii.gz")
        nib.save(nib.Nifti1Image(truth, np.diag([1.0, 1, 2, 1])), tmp_path / "l" / "b.nii.gz")
        nib.save(nib.Nifti1Image(truth[::-1].copy(), flipped), tmp_path / "l" / "c.nii.gz")  # the same place
        code = run(tmp_path / "p", "--labels", tmp_path / "l", "-p", "max", "--out", tmp_path / "o")
        message = capsys.readouterr().err
        assert code == 1 and "b.nii.gz" in message and "affine" in message and "a.nii" not in message
        rows = (tmp_path / "o" / "results" / "max.csv").read_text().splitlines()[1:]
        counts = {name: [r.split(",")[1:] for r in rows if r.startswith(name)] for name in "ac"}
        assert counts["a"] == counts["c"] and counts["a"]


class TestNnunet:
    def _export(self, folder: Path, properties: object, segmentation: bool) -> tuple[torch.Tensor, np.ndarray]:
        """What nnU-Net writes for a case: <case>.npz (C, Z, Y, X), <case>.pkl and <case>.nii.gz (X, Y, Z)."""
        nib = pytest.importorskip("nibabel")
        folder.mkdir(exist_ok=True)
        probs = softmax_maps(1, (6, 9, 12))[0]
        np.savez_compressed(folder / "case_1.npz", probabilities=probs.numpy())
        with (folder / "case_1.pkl").open("wb") as file:
            pickle.dump(properties, file)
        for name in ("dataset.json", "plans.json", "predict_from_raw_data_args.json"):
            (folder / name).write_text("{}")
        affine = np.diag([-0.5, -0.6, 2.0, 1])
        affine[:3, 3] = 3, 4, 5
        if segmentation:
            nib.save(nib.Nifti1Image(probs.argmax(0).numpy().astype(np.uint8).T, affine), folder / "case_1.nii.gz")
        return probs, affine

    @pytest.mark.parametrize("segmentation", [True, False])
    def test_export(self, segmentation: bool, tmp_path: Path) -> None:
        nib = pytest.importorskip("nibabel")
        properties = {
            "sitk_stuff": {
                "spacing": (0.5, 0.6, 2.0),
                "origin": (-3.0, -4.0, 5.0),
                "direction": (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
            },
            "spacing": [np.float64(2.0), np.float64(0.6), np.float64(0.5)],
            "shape_before_cropping": (6, 9, 12),
            "bbox_used_for_cropping": [[0, 6], [0, 9], [0, 12]],
            "array": np.arange(3),
        }
        probs, affine = self._export(tmp_path / "p", properties, segmentation)
        nib.save(nib.Nifti1Image(drawn(probs, 0).T, affine), tmp_path / "l.nii.gz")
        (tmp_path / "l").mkdir()
        shutil.move(tmp_path / "l.nii.gz", tmp_path / "l" / "case_1.nii.gz")
        rules = ["-p", "max", "-p", "rankdice"]
        assert run(tmp_path / "p", "--labels", tmp_path / "l", *rules, "--out", tmp_path / "o") == 0
        got = nib.load(tmp_path / "o" / "max" / "case_1.nii.gz")
        assert np.allclose(got.affine, affine)
        assert np.array_equal(np.asarray(got.dataobj), probs.argmax(0).numpy().T)
        masks = np.asarray(nib.load(tmp_path / "o" / "rankdice" / "case_1.nii.gz").dataobj)
        assert np.array_equal(masks, rankseg.rankdice(probs[None])[0].numpy().T)
        rows = (tmp_path / "o" / "results" / "max.csv").read_text().splitlines()[1:]
        truth, labels = drawn(probs, 0), probs.argmax(0).numpy()
        assert [int(row.split(",")[2]) for row in rows] == [int(((truth == c) & (labels == c)).sum()) for c in range(3)]

    @pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
    def test_pictures(self, suffix: str, tmp_path: Path) -> None:
        """Label maps of a 2-D export have the format of nnU-Net's own segmentation; masks stay in an .npz."""
        Image = pytest.importorskip("PIL.Image")
        tifffile = pytest.importorskip("tifffile")
        (tmp_path / "p").mkdir()
        (tmp_path / "l").mkdir()
        probs = softmax_maps(1, (16, 20))[0][:, None]  # (C, 1, Y, X), as nnU-Net writes it
        np.savez_compressed(tmp_path / "p" / "c.npz", probabilities=probs.numpy())
        with (tmp_path / "p" / "c.pkl").open("wb") as file:
            pickle.dump({"spacing": (999, 1, 1), "shape_before_cropping": (1, 16, 20)}, file)
        own = probs.argmax(0).numpy().astype(np.uint8)
        for path in (tmp_path / "p" / f"c{suffix}", tmp_path / "l" / "c.png"):
            if path.suffix == ".tif":
                tifffile.imwrite(path, own)
            else:
                Image.fromarray(own[0]).save(path)
        words = ["--labels", tmp_path / "l", "-p", "max", "-p", "rankdice", "-p", "rankdice_nonoverlap"]
        assert run(tmp_path / "p", *words, "--out", tmp_path / "o") == 0
        assert [p.name for p in (tmp_path / "o" / "max").iterdir()] == [f"c{suffix}"]
        read = tifffile.imread if suffix == ".tif" else lambda path: np.asarray(Image.open(path))
        assert np.array_equal(read(tmp_path / "o" / "max" / f"c{suffix}").reshape(own.shape), own)
        masks = rankseg.rankdice(probs[None], allow_overlap=False)
        labels = read(tmp_path / "o" / "rankdice_nonoverlap" / f"c{suffix}").reshape(own.shape)
        assert np.array_equal(labels, rankseg.label_map(masks)[0].numpy())
        with np.load(tmp_path / "o" / "rankdice" / "c.npz") as content:
            assert np.array_equal(content["masks"], rankseg.rankdice(probs[None])[0].numpy())
        assert result(tmp_path / "o", "max")["scores"]["mean_dice"] == 1

    @pytest.mark.parametrize("kind", ["command", "truncated", "list"])
    def test_a_pickle_that_is_not_data_runs_nothing(
        self, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        trace = tmp_path / "executed"
        content = {"command": {"sitk_stuff": Touch(trace)}, "truncated": {}, "list": [1]}[kind]
        self._export(tmp_path / "p", content, segmentation=True)
        if kind == "truncated":
            (tmp_path / "p" / "case_1.pkl").write_bytes(b"\x80\x04\x95")
        save_all(tmp_path / "p", softmax_maps(1, (6, 9)))
        assert run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o") == 1
        assert not trace.exists()
        assert "case_1.pkl" in capsys.readouterr().err
        assert (tmp_path / "o" / "max" / "c0.npy").is_file()

    @pytest.mark.parametrize("dtype", ["O", [("a", "O")]])
    def test_no_bytes_of_a_pickle_become_the_address_of_an_object(
        self, dtype: object, tmp_path: Path, capsys: pytest.CaptureFixture
    ) -> None:
        """NumPy makes an array of objects of any bytes. These are the address of a float: reading it breaks nothing."""
        number = 1.5
        affine = Call(np.ndarray, (4, 4), np.dtype(dtype), struct.pack("P", id(number)) * 16)
        self._export(tmp_path / "p", {"nibabel_stuff": {"original_affine": affine}}, segmentation=False)
        assert run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o") == 1
        assert "case_1.pkl" in capsys.readouterr().err

    def test_an_encoding_that_multiplies_bytes_is_rejected(self, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
        self._export(tmp_path / "p", Call(codecs.encode, b"a", "hex"), segmentation=False)
        assert run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o") == 1
        assert "case_1.pkl" in capsys.readouterr().err

    @pytest.mark.parametrize("protocol", [2, 4])
    def test_arrays_of_numbers_are_read(self, protocol: int, tmp_path: Path) -> None:
        affine = np.arange(16).reshape(4, 4) + np.eye(4)
        for array in (affine, np.asfortranarray(affine), affine.astype(">f4"), affine.T):
            content = {"nibabel_stuff": {"original_affine": array}, "other": [np.float64(2), np.array([None, "a"])]}
            (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol))
            found = geometry_of(tmp_path / "a.npz")
            assert found is not None and np.array_equal(found.affine, array)


def test_a_header_that_claims_too_much_fails_alone(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    nib = pytest.importorskip("nibabel")
    save_all(tmp_path / "p", softmax_maps(1, (6, 9)))
    path = tmp_path / "p" / "bomb.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.float32), np.eye(4)), path)
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[40:56] = struct.pack("<8h", 4, 30000, 30000, 30000, 2, 1, 1, 1)
    path.write_bytes(gzip.compress(bytes(content)))
    assert run(tmp_path / "p", "-p", "max", "--out", tmp_path / "o") == 1
    assert "bomb.nii.gz" in capsys.readouterr().err and (tmp_path / "o" / "max" / "c0.npy").is_file()


@pytest.mark.parametrize("damage", ["not gzip", "gzip without suffix", "truncated", "affine", "no file"])
def test_damaged_volumes_are_named(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nib = pytest.importorskip("nibabel")
    volumes = [np.moveaxis(p.numpy(), 0, -1) for p in softmax_maps(2, (8, 9, 10))]
    folder = tmp_path / "p"
    folder.mkdir()
    nib.save(nib.Nifti1Image(volumes[0], np.eye(4)), folder / "good.nii.gz")
    plain, packed = folder / "bad.nii", folder / "bad.nii.gz"
    nib.save(nib.Nifti1Image(volumes[1], np.eye(4)), plain)
    nib.save(nib.Nifti1Image(volumes[1], np.eye(4)), packed)
    if damage == "not gzip":
        plain.rename(packed)
    elif damage == "gzip without suffix":
        packed.rename(plain)
    elif damage == "affine":
        packed.unlink()
        content = bytearray(plain.read_bytes())
        content[280:296] = np.full(4, np.nan, "<f4").tobytes()
        plain.write_bytes(content)
    else:
        plain.unlink()
        content = packed.read_bytes()
        packed.unlink()
        packed.mkdir() if damage == "no file" else packed.write_bytes(content[: len(content) // 2])
    code = run(folder, "-p", "max", "--out", tmp_path / "o")
    if damage == "no file":  # a folder is not a case
        assert code == 0
        return
    message = capsys.readouterr().err
    assert code == 1 and str(folder / "bad.nii") in message and "Fix:" in message
    assert (tmp_path / "o" / "max" / "good.nii.gz").is_file()
