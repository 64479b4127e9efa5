"""Adapters on the installed libraries, with small random weights.

Each first reproduces the library's own argmax pixel for pixel, then uses another rule. `make test-adapters` installs
the libraries that the ordinary tests do without.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch

import rankseg

ADAPTERS = Path(__file__).resolve().parents[2] / "scripts" / "adapters"
NONOVERLAP = partial(rankseg.rankdice, allow_overlap=False)


def adapter(name: str, *needed: str) -> ModuleType:
    """Import an adapter, or skip the test if a library that it needs is missing."""
    for library in needed:
        pytest.importorskip(library)
    return importlib.import_module(f"scripts.adapters.{name}")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("path", sorted(ADAPTERS.glob("use_*.py")), ids=lambda path: path.stem)
def test_adapters_are_short_and_need_the_method_alone(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) < 60
    if path.stem != "use_nnunet":  # which is decode.py with other defaults
        assert "import rankseg\n" in text
        ours = ("configs", "datasets", "models", "scripts", "trainers")
        assert not any(f"from {name}" in text for name in ours)


def differs(masks: torch.Tensor, argmax: torch.Tensor) -> bool:
    return not torch.equal(masks, argmax)


class TestTransformers:
    SIZES = ((40, 56), (33, 70))

    def _check(self, outputs: object, processor: object) -> None:
        use = adapter("use_transformers", "transformers")
        expected = processor.post_process_semantic_segmentation(outputs, target_sizes=list(self.SIZES))
        same = use.segment(outputs, list(self.SIZES), rankseg.argmax)
        for masks, labels in zip(same, expected, strict=True):
            assert torch.equal(rankseg.label_map(masks[None])[0], labels)
        probs = use.probabilities(outputs, list(self.SIZES))
        for masks, p in zip(use.segment(outputs, list(self.SIZES)), probs, strict=True):
            assert torch.equal(masks, rankseg.rankdice(p)[0]) and differs(masks, rankseg.argmax(p)[0])

    def test_segformer(self) -> None:
        transformers = pytest.importorskip("transformers")
        config = transformers.SegformerConfig(
            num_labels=4, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], decoder_hidden_size=16
        )
        model = transformers.SegformerForSemanticSegmentation(config).eval()
        with torch.inference_mode():
            outputs = model(pixel_values=torch.randn(2, 3, 64, 96))
        self._check(outputs, transformers.SegformerImageProcessor())

    def test_mask2former(self) -> None:
        transformers = pytest.importorskip("transformers")
        backbone = transformers.SwinConfig(
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            out_features=["stage1", "stage2", "stage3", "stage4"],
        )
        config = transformers.Mask2FormerConfig(
            backbone_config=backbone,
            num_labels=4,
            hidden_dim=32,
            feature_size=32,
            mask_feature_size=32,
            encoder_layers=1,
            decoder_layers=2,
            num_attention_heads=2,
            num_queries=6,
            dim_feedforward=16,
            encoder_feedforward_dim=16,
        )
        model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
        with torch.inference_mode():
            outputs = model(pixel_values=torch.randn(2, 3, 64, 64))
        self._check(outputs, transformers.Mask2FormerImageProcessor())

    def test_logits_are_resized_before_the_rule(self) -> None:
        use = adapter("use_transformers")
        logits = 3 * torch.randn(2, 4, 8, 12)
        masks = use.segment(SimpleNamespace(logits=logits), [(32, 48)] * 2)
        large = torch.nn.functional.interpolate(logits, (32, 48), mode="bilinear")
        assert torch.equal(torch.stack(masks), rankseg.rankdice(large.softmax(1)))


class TestMonai:
    def _tensor(self, classes: int, shape: tuple[int, ...]):
        from monai.data import MetaTensor

        affine = torch.diag(torch.tensor([2.0, 3, 4, 1], dtype=torch.float64))
        probs = torch.randn(classes, *shape).mul(2).softmax(0)
        return MetaTensor(probs, affine=affine, meta={"filename_or_obj": "case.nii.gz"})

    @pytest.mark.parametrize("shape", [(12, 14), (6, 8, 10)])
    def test_array(self, shape: tuple[int, ...]) -> None:
        use = adapter("use_monai", "monai")
        from monai.transforms import AsDiscrete

        probs = self._tensor(3, shape)
        got = use.RankSeg(rankseg.argmax, to_label=True)(probs)
        expected = AsDiscrete(argmax=True)(probs)
        assert torch.equal(got, expected) and type(got) is type(expected) and got.dtype == expected.dtype
        assert torch.equal(got.affine, probs.affine)
        assert got.meta["filename_or_obj"] == "case.nii.gz"
        masks = use.RankSeg()(probs)
        assert torch.equal(masks.as_tensor().bool(), rankseg.rankdice(probs.as_tensor()[None])[0])
        assert torch.equal(masks.affine, probs.affine)

    def test_dictionary_in_a_pipeline(self) -> None:
        use = adapter("use_monai", "monai")
        from monai.transforms import Activationsd, AsDiscreted, Compose

        logits = self._tensor(4, (10, 12)).log()
        data = {"pred": logits, "name": "a"}
        softmax = Activationsd(keys="pred", softmax=True)
        ours = Compose([softmax, use.RankSegd(keys="pred", rule=rankseg.argmax, to_label=True)])(data)
        theirs = Compose([softmax, AsDiscreted(keys="pred", argmax=True)])(data)
        assert torch.equal(ours["pred"], theirs["pred"]) and ours["name"] == "a"
        assert torch.equal(ours["pred"].affine, logits.affine) and data["pred"] is logits
        with pytest.raises(KeyError):
            use.RankSegd(keys="other")(data)
        assert use.RankSegd(keys="other", allow_missing_keys=True)(data).keys() == data.keys()

    def test_one_channel_and_numpy(self) -> None:
        use = adapter("use_monai", "monai")
        probs = torch.rand(1, 9, 9).numpy()
        got = use.RankSeg(to_label=True)(probs)
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, rankseg.rankdice(torch.from_numpy(probs)[None])[0].float().numpy())

    def test_a_small_network(self) -> None:
        use = adapter("use_monai", "monai")
        from monai.inferers import sliding_window_inference
        from monai.networks.nets import UNet

        net = UNet(spatial_dims=3, in_channels=1, out_channels=3, channels=(4, 8), strides=(2,)).eval()
        with torch.inference_mode():
            logits = sliding_window_inference(torch.randn(1, 1, 20, 20, 20), 16, 2, net)
        labels = use.RankSeg(rankseg.argmax, to_label=True)(logits[0].softmax(0))
        assert torch.equal(labels[0], logits[0].argmax(0).float())


class TestTorchmetrics:
    @pytest.mark.parametrize("name", ["DiceScore", "MeanIoU", "GeneralizedDiceScore"])
    def test_argmax_is_the_index_form(self, name: str) -> None:
        use = adapter("use_torchmetrics", "torchmetrics")
        from torchmetrics import segmentation

        build = getattr(segmentation, name)
        ours, theirs = (use.WithRule(build(3, input_format="one-hot"), rankseg.argmax), build(3, input_format="index"))
        swapped = use.WithRule(build(3, input_format="one-hot"))
        for _ in range(3):
            probs, labels = torch.randn(2, 3, 16, 18).softmax(1), torch.randint(3, (2, 16, 18))
            ours.update(probs, labels)
            theirs.update(probs.argmax(1), labels)
            swapped(probs, labels)
        assert torch.equal(ours.compute(), theirs.compute())
        assert not torch.equal(swapped.compute(), ours.compute())
        ours.reset()
        ours.update(probs, labels)
        theirs.reset()
        theirs.update(probs.argmax(1), labels)
        assert torch.equal(ours.compute(), theirs.compute())

    def test_in_a_collection(self) -> None:
        use = adapter("use_torchmetrics", "torchmetrics")
        from torchmetrics import MetricCollection
        from torchmetrics.segmentation import DiceScore

        metrics = MetricCollection(
            {
                name: use.WithRule(DiceScore(3, average="macro", input_format="one-hot"), rule)
                for name, rule in (("max", rankseg.argmax), ("rankdice", rankseg.rankdice))
            },
            compute_groups=False,
        )
        metrics.update(torch.randn(2, 3, 16, 18).softmax(1), torch.randint(3, (2, 16, 18)))
        found = metrics.compute()
        assert found["max"] != found["rankdice"]


def test_torchvision() -> None:
    use = adapter("use_torchvision")
    from torchvision.models.segmentation import lraspp_mobilenet_v3_large

    model = lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5).eval()
    images = torch.rand(2, 3, 64, 80)
    with torch.inference_mode():
        logits = model(images)["out"]
    assert torch.equal(use.segment(model, images, rankseg.argmax), logits.argmax(1))
    expected = rankseg.label_map(NONOVERLAP(logits.softmax(1)))
    assert torch.equal(use.segment(model, images), expected)


@pytest.mark.parametrize("mode", ["multiclass", "multilabel", "binary"])
def test_smp(mode: str) -> None:
    use = adapter("use_smp")
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, classes=1 if mode == "binary" else 3).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        logits = model(images)
    if mode == "multiclass":
        own = rankseg.label_map(use.segment(model, images, mode, rankseg.argmax))
        assert torch.equal(own, logits.argmax(1))
    else:
        assert torch.equal(use.segment(model, images, mode, rankseg.threshold), logits.sigmoid() >= 0.5)
    masks = use.segment(model, images, mode)
    assert torch.equal(masks, rankseg.rankdice(use.probabilities(logits, mode)))
    truth = torch.zeros_like(masks, dtype=torch.long)
    smp.metrics.get_stats(masks.long(), truth, mode="multilabel")


def test_smp_mode_is_checked() -> None:
    with pytest.raises(ValueError, match="softmax"):
        adapter("use_smp").probabilities(torch.zeros(1, 1, 2, 2), "softmax")


class TestOnnx:
    @pytest.mark.parametrize("link", ["softmax", "sigmoid"])
    def test_arrays(self, link: str) -> None:
        logits = np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype(np.float32)
        values = torch.from_numpy(logits.copy())
        probs = values.softmax(1) if link == "softmax" else values.sigmoid()
        got = adapter("use_onnxruntime").segment(logits, link)
        assert np.array_equal(got, rankseg.rankdice(probs).numpy())

    def test_exported_network(self, tmp_path: Path) -> None:
        use = adapter("use_onnxruntime", "onnxruntime", "onnx")
        import onnxruntime

        network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 1))
        images = torch.rand(2, 3, 40, 48)
        torch.onnx.export(network.eval(), (images,), tmp_path / "m.onnx", input_names=["images"], dynamo=False)
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        (logits,) = session.run(None, {"images": images.numpy()})
        same = rankseg.label_map(torch.from_numpy(use.segment(logits, "softmax", rankseg.argmax)))
        assert np.array_equal(same.numpy(), logits.argmax(1))
        assert not np.array_equal(use.segment(logits), use.segment(logits, "softmax", rankseg.argmax))


class TestNnunet:
    """Predictions that nnU-Net's own code writes, from random logits."""

    PLANS: ClassVar[dict] = {
        "dataset_name": "Dataset001_Test",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "transpose_forward": [2, 0, 1],
        "transpose_backward": [1, 2, 0],
        "configurations": {
            "3d_fullres": {
                "architecture": {},
                "spacing": [2.0, 1.0, 1.0],
                "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                "resampling_fn_probabilities_kwargs": {
                    "is_seg": False,
                    "order": 1,
                    "order_z": 0,
                    "force_separate_z": None,
                },
            }
        },
    }
    LABELS: ClassVar[dict] = {"labels": {"background": 0, "liver": 1, "tumour": 2}, "file_ending": ".nii.gz"}

    def _export(self, folder: Path, count: int = 2) -> None:
        pytest.importorskip("nnunetv2")
        sitk = pytest.importorskip("SimpleITK")
        from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
        from nnunetv2.inference.export_prediction import export_prediction_from_logits
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        folder.mkdir()
        plans = PlansManager(self.PLANS)
        for i in range(count):
            image = sitk.GetImageFromArray(np.zeros((10, 14, 18), np.float32))
            image.SetSpacing((0.7, 0.8, 2.5))
            image.SetOrigin((-10.0, 20.0, 30.0))
            image.SetDirection((0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0, 1.0))
            sitk.WriteImage(image, folder / "image.nii.gz")
            _, properties = SimpleITKIO().read_images([str(folder / "image.nii.gz")])
            (folder / "image.nii.gz").unlink()
            shape = [10, 14, 18]
            full = [shape[k] for k in self.PLANS["transpose_forward"]]
            properties["shape_before_cropping"] = tuple(full)
            properties["bbox_used_for_cropping"] = [[1, full[0]], [0, full[1] - 2], [2, full[2]]]
            properties["shape_after_cropping_and_before_resampling"] = tuple(
                b - a for a, b in properties["bbox_used_for_cropping"]
            )
            export_prediction_from_logits(
                torch.randn(3, 8, 9, 10) * 2,
                properties,
                plans.get_configuration("3d_fullres"),
                plans,
                self.LABELS,
                str(folder / f"case_{i}"),
                save_probabilities=True,
                num_threads_torch=1,
            )
        (folder / "dataset.json").write_text(json.dumps(self.LABELS))
        (folder / "plans.json").write_text(json.dumps(self.PLANS))

    def test_argmax_is_its_own_segmentation(self, tmp_path: Path) -> None:
        use = adapter("use_nnunet", "nibabel")
        self._export(tmp_path / "predictions")
        import nibabel as nib

        words = ["-p", "max", "-p", "rankdice_nonoverlap", "--quiet"]
        predictions, out = tmp_path / "predictions", tmp_path / "decoded"
        truth = tmp_path / "truth"
        truth.mkdir()
        for i in range(2):
            (truth / f"case_{i}.nii.gz").write_bytes((predictions / f"case_{i}.nii.gz").read_bytes())
        assert use.main([str(predictions), str(out), "--labels", str(truth), *words]) == 0
        for i in range(2):
            theirs = nib.load(predictions / f"case_{i}.nii.gz")
            ours = nib.load(out / "max" / f"case_{i}.nii.gz")
            assert np.array_equal(np.asarray(ours.dataobj), np.asarray(theirs.dataobj))
            assert np.array_equal(ours.affine, theirs.affine)
            assert ours.header.get_zooms() == theirs.header.get_zooms()
            with np.load(predictions / f"case_{i}.npz") as content:
                probs = torch.from_numpy(content["probabilities"])
            labels = rankseg.label_map(NONOVERLAP(probs[None]))[0].numpy().T
            swapped = np.asarray(nib.load(out / "rankdice_nonoverlap" / f"case_{i}.nii.gz").dataobj)
            assert np.array_equal(swapped, labels) and not np.array_equal(swapped, np.asarray(theirs.dataobj))
        found = json.loads((out / "results" / "max.json").read_text())
        assert found["classes"] == ["background", "liver", "tumour"] and found["scored"] == [1, 2]
        assert found["scores"]["mean_dice"] == 1  # its own segmentation was given as truth


def test_options_replace_what_dataset_json_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts import decode

    monkeypatch.setattr(decode, "main", decode._parse_arguments)
    labels = {"background": 0, "liver": 1, "tumour": 2, "ignore": 3}
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": labels}))
    words = [str(tmp_path), "out", "-p", "max"]
    use = adapter("use_nnunet")
    args = use.main(words)
    assert (args.names, args.scored, args.void) == ("background,liver,tumour", [1, 2], 3)
    args = use.main([*words, "--names=a,b,c", "--scored=2", "--void=7"])
    assert (args.names, args.scored, args.void) == ("a,b,c", [2], 7)


def test_nnunet_pictures(tmp_path: Path) -> None:
    """A 2-D export of nnU-Net's own code: label maps are pictures such as its segmentation."""
    pytest.importorskip("nnunetv2")
    from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
    from nnunetv2.inference.export_prediction import export_prediction_from_logits
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from PIL import Image

    from scripts import decode

    settings = TestNnunet.PLANS["configurations"]["3d_fullres"] | {"spacing": [1.0, 1.0]}
    order = [0, 1, 2]
    plans = PlansManager(
        TestNnunet.PLANS
        | {"image_reader_writer": "NaturalImage2DIO", "transpose_forward": order, "transpose_backward": order}
        | {"configurations": {"2d": settings}}
    )
    folder, out = tmp_path / "predictions", tmp_path / "decoded"
    folder.mkdir()
    Image.fromarray(np.zeros((14, 18, 3), np.uint8)).save(tmp_path / "image.png")
    _, properties = NaturalImage2DIO().read_images([str(tmp_path / "image.png")])
    properties["shape_before_cropping"] = (1, 14, 18)
    properties["bbox_used_for_cropping"] = [[0, 1], [0, 12], [2, 18]]
    properties["shape_after_cropping_and_before_resampling"] = (1, 12, 16)
    export_prediction_from_logits(
        torch.randn(3, 1, 9, 10) * 2,
        properties,
        plans.get_configuration("2d"),
        plans,
        TestNnunet.LABELS | {"file_ending": ".png"},
        str(folder / "case_0"),
        save_probabilities=True,
        num_threads_torch=1,
    )
    words = [str(folder), "-p", "max", "-p", "rankdice_nonoverlap", "--out", str(out), "--quiet"]
    assert decode.main(words) == 0
    theirs, ours, swapped = (
        np.asarray(Image.open(path / "case_0.png")) for path in (folder, out / "max", out / "rankdice_nonoverlap")
    )
    assert np.array_equal(ours, theirs) and ours.dtype == theirs.dtype
    assert not np.array_equal(swapped, theirs)


@pytest.mark.parametrize(
    ("name", "needed", "printed"),
    [
        ("use_transformers", ["transformers"], "masks [(2, 96, 128), (2, 48, 64)]"),
        ("use_torchvision", [], "labels (2, 96, 128)"),
        ("use_smp", [], "masks (2, 3, 64, 96)"),
        ("use_onnxruntime", ["onnxruntime", "onnx"], "masks (1, 2, 64, 80)"),
    ],
)
def test_each_runs(name: str, needed: list[str], printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    adapter(name, *needed).main()
    assert printed in capsys.readouterr().out


def test_template_is_a_real_volume(tmp_path: Path) -> None:
    """`example.py --template` writes probabilities that add to 1, and labels whose frequencies are these."""
    pytest.importorskip("nilearn")
    from scripts.decoding.example import template_case

    probs, labels, affine = template_case(0)
    assert probs.shape == (197, 233, 189, 3) and labels.shape == probs.shape[:3] and affine.shape == (4, 4)
    assert probs.min() >= 0 and np.abs(probs.sum(-1) - 1).max() < 1e-5
    shares = [float((labels == c).mean()) for c in range(3)]
    assert shares == pytest.approx(probs.mean((0, 1, 2), dtype=np.float64).tolist(), abs=1e-3)
    assert not np.array_equal(labels, template_case(1)[1])
