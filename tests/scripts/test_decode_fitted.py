"""decode.py --fit, --calibrate and --report: the values are those that a search finds, and the page has the scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import rankseg
from configs.errors import UserError
from tests.scripts.decoding import drawn, result, run, save_all, softmax_maps

SHARPER = 2.5  # factor on the logits of the saved probabilities: the right temperature


def sharpened(maps: list[torch.Tensor]) -> list[torch.Tensor]:
    return [(SHARPER * p.log()).softmax(0) for p in maps]


def folders(path: Path, seed: int, count: int = 6, shape: tuple[int, ...] = (24, 20)) -> tuple[Path, Path]:
    """Probabilities that are too sure, and labels drawn from the right ones."""
    maps = softmax_maps(count, shape, seed=seed)
    labels = [drawn(p, seed + i, void=0.1) for i, p in enumerate(maps)]
    return save_all(path / "p", sharpened(maps)), save_all(path / "l", labels)


def arrays(folder: Path) -> list[np.ndarray]:
    return [np.load(path) for path in sorted(folder.glob("*.npy"))]


def mean_dice(probs: list[np.ndarray], labels: list[np.ndarray], at: float, gated: bool = False) -> float:
    """The mean over images of the mean over classes, by hand."""
    rows = []
    for p, t in zip(probs, labels, strict=True):
        masks = (p >= np.float32(at)) & (t != 255)
        if gated:
            masks &= (p.reshape(len(p), -1).max(1) > 0.5)[:, None, None]
        truth = np.stack([t == c for c in range(len(p))])
        size = masks.sum((1, 2)) + truth.sum((1, 2))
        rows.append(np.mean((2 * (masks & truth).sum((1, 2)) / np.maximum(size, 1))[size > 0]))
    return float(np.mean(rows))


def log_loss(probs: list[np.ndarray], labels: list[np.ndarray], temperature: float) -> float:
    losses = []
    for p, t in zip(probs, labels, strict=True):
        q = (torch.from_numpy(p).log().double() / temperature).log_softmax(0).numpy()
        kept = t != 255
        losses.append(-np.take_along_axis(q, np.where(kept, t, 0)[None].astype(int), 0)[0][kept])
    return float(np.concatenate(losses).mean())


def test_temperature_threshold_and_cutoffs_are_the_best_of_a_search(tmp_path: Path) -> None:
    probs, labels = folders(tmp_path, seed=20)
    fit_probs, fit_labels = folders(tmp_path / "fit", seed=50)
    out = tmp_path / "o"
    words = [probs, "--labels", labels, "--fit", fit_probs, fit_labels, "--out", out]
    assert run(*words, "-p", "T", "-p", "T_fit", "-p", "pooled_dice", "--write", "masks") == 0
    ps, ts = arrays(fit_probs), arrays(fit_labels)
    fitted = result(out, "T_fit")["fitted"]
    grid = {(k / 100, gated): mean_dice(ps, ts, k / 100, gated) for k in range(1, 100) for gated in (0, 1)}
    assert fitted["mean_dice"] == pytest.approx(max(grid.values()), abs=1e-9)
    assert grid[fitted["at"], fitted["gated"]] == pytest.approx(fitted["mean_dice"], abs=1e-9)
    # the threshold of the second folder is what the first one is decoded with
    expected = mean_dice(arrays(probs), arrays(labels), fitted["at"], fitted["gated"])
    assert result(out, "T_fit")["scores"]["mean_dice"] == pytest.approx(expected, abs=1e-9)
    stored = json.loads((out / "decode.fitted.json").read_text())["entries"]
    (entry,) = [one for one in stored if one["kind"] == "T_fit"]
    assert entry["values"]["at"] == fitted["at"] and entry["fitted_on"]["num_images"] == 6
    assert entry["fitted_on"]["split"] == str(fit_probs)
    # pooled cut-offs need no labels: the best expected pooled Dice over all thresholds
    pixels = np.concatenate([p.reshape(3, -1) for p in arrays(probs)], 1)
    for c, at in enumerate(result(out, "pooled_dice")["fitted"]["at"]):
        p = np.sort(pixels[c].astype(np.float64))[::-1]
        ratio = 2 * p.cumsum() / (np.arange(1, len(p) + 1) + p.sum())
        assert 2 * p[p >= at].sum() / ((p >= at).sum() + p.sum()) == pytest.approx(ratio.max(), rel=1e-5)

    calibrated = tmp_path / "calibrated"
    assert run(*words[:-1], calibrated, "-p", "rankdice", "--calibrate", "temperature") == 0
    temperature = result(calibrated, "rankdice")["temperature"]
    near = min(np.arange(1, 4, 0.01), key=lambda t: log_loss(ps, ts, t))
    assert temperature == pytest.approx(near, abs=0.02)
    for i, p in enumerate(arrays(probs)):
        cooler = (torch.from_numpy(p).log() / temperature).softmax(0)
        masks = np.load(calibrated / "rankdice" / f"c{i}.npy")
        assert (masks != rankseg.rankdice(cooler[None])[0].numpy()).sum() <= 1  # rounding of the temperature
    assert result(calibrated, "rankdice")["scores"]["ece"] < result(out, "T")["scores"]["ece"]


@pytest.mark.parametrize("shape", [(24, 20), pytest.param((8, 9, 10), marks=pytest.mark.slow)])
def test_one_channel_is_calibrated_as_two(shape: tuple[int, ...], tmp_path: Path) -> None:
    """One sigmoid channel and the softmax of two have the same temperature, threshold and scores."""
    maps = softmax_maps(5, shape, classes=2, seed=3)
    labels = save_all(tmp_path / "l", [drawn(p, i) for i, p in enumerate(maps)])
    sharp = sharpened(maps)
    found = {}
    for name, items in (("two", sharp), ("one", [p[1] for p in sharp])):
        probs, out = save_all(tmp_path / name, items), tmp_path / f"o_{name}"
        words = [probs, "--labels", labels, "--fit", probs, labels, "--out", out, "--scored", 1]
        assert run(*words, "-p", "rankdice", "-p", "T_fit", "--calibrate", "temperature", "--report") == 0
        found[name] = result(out, "rankdice") | {"at": result(out, "T_fit")["fitted"]["at"]}
        page = json.loads((out / "report" / "report.json").read_text())
        assert page["temperature"] == pytest.approx(found[name]["temperature"])
    assert found["one"]["temperature"] == pytest.approx(found["two"]["temperature"], rel=1e-3)
    assert found["one"]["at"] == found["two"]["at"]
    one, two = (found[name]["scores"]["mean_dice"] for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-3)
    out = tmp_path / "class"
    words = [tmp_path / "one", "--labels", labels, "--fit", tmp_path / "one", labels, "--out", out]
    assert run(*words, "-p", "rankdice", "--calibrate", "class") == 0
    values = result(out, "rankdice")["calibration"]
    assert len(values["temperature"]) == 1
    # A bias of its own can only lower the log-loss of the images that it is fitted on.
    assert result(out, "rankdice")["scores"]["log_loss"] <= found["one"]["scores"]["log_loss"] + 1e-4


def test_class_calibration_undoes_a_bias(tmp_path: Path) -> None:
    maps = softmax_maps(6, (24, 20), seed=8)
    bias = torch.tensor([0.0, 1.0, -0.5])[:, None, None]
    labels = save_all(tmp_path / "l", [drawn(p, i) for i, p in enumerate(maps)])
    probs = save_all(tmp_path / "p", [2 * p.log() + bias for p in maps])
    words = [probs, "--labels", labels, "--fit", probs, labels, "--out", tmp_path / "o"]
    flags = ["-p", "rankdice", "--link", "softmax", "--classes-axis", "first", "--calibrate", "class"]
    assert run(*words, *flags) == 0
    found = result(tmp_path / "o", "rankdice")
    assert found["calibration"]["temperature"] == pytest.approx([2, 2, 2], rel=0.2)
    shift = np.array(found["calibration"]["bias"])
    assert shift - shift[0] == pytest.approx([0, -0.5, 0.25], abs=0.15)
    ratios = [found["scores"]["volume_ratio"][str(c)] for c in range(3)]
    assert ratios == pytest.approx([1, 1, 1], abs=0.02)


def test_auto_uses_the_calibration_that_won(tmp_path: Path) -> None:
    """Rule auto may choose calibrated probabilities, which the other rules of the call do not see."""
    probs, labels = folders(tmp_path, seed=20, count=12)
    out = tmp_path / "o"
    words = [probs, "--labels", labels, "--fit", probs, labels, "-p", "auto", "-p", "rankdice", "-p", "T_fit"]
    assert run(*words, "--out", out, "--write", "masks") == 0
    chosen = result(out, "auto")["fitted"]["rule"]
    if chosen == "rankdice calibrated":
        other = tmp_path / "o2"
        words = [probs, "--labels", labels, "--fit", probs, labels, "-p", "rankdice"]
        assert run(*words, "--calibrate", "temperature", "--out", other) == 0
        expected = result(other, "rankdice")["scores"]["mean_dice"]
    else:
        assert chosen in ("T_fit", "rankdice"), chosen
        expected = result(out, chosen)["scores"]["mean_dice"]
    assert result(out, "auto")["scores"]["mean_dice"] == pytest.approx(expected, abs=1e-6)


def test_the_report_has_the_scores_of_the_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probs, labels = folders(tmp_path, seed=20, count=12)
    fit = folders(tmp_path / "fit", seed=50, count=12)
    out = tmp_path / "o"
    words = [probs, "--labels", labels, "--fit", *fit, "-p", "T", "-p", "max", "-p", "rankdice", "--out", out]
    assert run(*words, "--write", "masks", "--report", "--names", "a<b,c,d") == 0
    page = json.loads((out / "report" / "report.json").read_text())
    for rule in ("T", "max", "rankdice"):
        expected = result(out, rule)["scores"]
        assert page["scores"][rule]["mean_dice"] == pytest.approx(expected["mean_dice"], abs=1e-12)
        assert page["scores"][rule]["pooled_mean_iou"] == pytest.approx(expected["pooled_mean_iou"], abs=1e-12)
    assert page["probabilities"]["raw"]["ece"] == pytest.approx(result(out, "T")["scores"]["ece"])
    assert page["probabilities"]["calibrated"]["ece"] < page["probabilities"]["raw"]["ece"]
    assert page["confidence"]["margin_images"] == 12
    html = (out / "report" / "index.html").read_text()
    assert "a&lt;b" in html and "a<b" not in html
    table = (out / "paired_statistics.md").read_text()
    assert "max − T" in table and "rankdice − T" in table
    gain = page["gains"]["rankdice - T"]["mean"]
    assert f"rankdice - T: {gain:+.2f} points" in capsys.readouterr().out


def test_a_bad_case_of_fit_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    probs, labels = folders(tmp_path, seed=20)
    fit_probs, fit_labels = folders(tmp_path / "fit", seed=50)
    np.save(fit_probs / "c2.npy", np.full((3, 24, 20), 2.0, np.float32))
    (fit_labels / "c4.npy").unlink()
    words = [probs, "--labels", labels, "--fit", fit_probs, fit_labels, "-p", "T_fit", "-p", "T"]
    assert run(*words, "--out", tmp_path / "o") == 1
    message = capsys.readouterr().err
    assert str(fit_probs / "c2.npy") in message and str(fit_probs / "c4.npy") in message
    stored = json.loads((tmp_path / "o" / "decode.fitted.json").read_text())["entries"]
    assert stored[0]["fitted_on"]["num_images"] == 4
    assert len(result(tmp_path / "o", "T")["images"]) == 6


def test_what_has_to_be_fitted_asks_for_labelled_cases(tmp_path: Path) -> None:
    probs, labels = folders(tmp_path, seed=20, count=2)
    for words in (["-p", "T_fit"], ["-p", "auto"], ["-p", "T", "--calibrate", "class"]):
        with pytest.raises(UserError, match="--fit PROBS LABELS"):
            run(probs, "--labels", labels, *words, "--out", tmp_path / "o")
    with pytest.raises(UserError, match=r"--report.*--labels"):
        run(probs, "-p", "T", "--report", "--out", tmp_path / "o")
    two = save_all(tmp_path / "two", softmax_maps(2, (24, 20), classes=2))
    binary = save_all(tmp_path / "binary", [np.zeros((24, 20), np.uint8)] * 2)
    assert run(probs, "--fit", two, binary, "-p", "T_fit", "--out", tmp_path / "o3") == 1


def test_labels_that_do_not_exclude_each_other_need_a_link(tmp_path: Path) -> None:
    maps = [torch.rand(3, 24, 20, generator=torch.Generator().manual_seed(1)) for _ in range(2)]
    probs = save_all(tmp_path / "p", maps)
    labels = save_all(tmp_path / "l", [drawn(p / p.sum(0), 0) for p in maps])
    words = [probs, "--labels", labels, "--fit", probs, labels, "-p", "T_fit"]
    assert run(*words, "--out", tmp_path / "o") == 0  # a threshold needs no logits
    with pytest.raises(UserError, match=r"c0\.npy.*--link sigmoid"):
        run(*words, "--calibrate", "temperature", "--out", tmp_path / "o2")
