"""Paired statistics against scipy, against hand-made cases, and through the command line."""

from __future__ import annotations

import csv
import json
import math
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from scipy import stats

from configs.errors import UserError
from scripts.analysis.scores import (
    compare,
    describe_differences,
    mean_interval,
    pair,
    read_groups,
    read_rule,
    signed_rank,
)
from scripts.paired_statistics import main
from tests.exits import exit_code
from trainers.text import csv_text


def sample(seed, size=60):
    return (np.random.default_rng(seed).exponential(1, size) - 0.7).tolist()


def bca_by_hand(values, replicates, confidence):
    """Efron's formulas, written out: bias from the replicates, acceleration from the jackknife."""
    values, normal = np.array(values), stats.norm
    below = ((replicates < values.mean()).sum() + (replicates <= values.mean()).sum()) / (2 * len(replicates))
    jackknife = (values.sum() - values) / (len(values) - 1)
    deviations = jackknife.mean() - jackknife
    acceleration = (deviations**3).sum() / (6 * (deviations**2).sum() ** 1.5)
    ends = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        shifted = normal.ppf(below) + normal.ppf(level)
        place = normal.cdf(normal.ppf(below) + shifted / (1 - acceleration * shifted))
        ends.append(np.quantile(replicates, place))
    return ends


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_the_interval_is_bca_up_to_resampling_noise(confidence):
    values = sample(1)
    rng = np.random.default_rng(5)
    replicates = rng.choice(values, (20_000, len(values))).mean(1)
    ours = mean_interval(values, confidence, resamples=20_000, seed=3)
    assert ours == pytest.approx(bca_by_hand(values, replicates, confidence), abs=0.02)
    assert ours == mean_interval(values, confidence, 20_000, seed=3) != mean_interval(values, confidence, 20_000, 4)


def test_the_bootstrap_leaves_the_global_generators_alone():
    before, numpys = torch.get_rng_state(), np.random.get_state()[1].copy()
    mean_interval(sample(1), resamples=100)
    assert torch.equal(before, torch.get_rng_state()) and (np.random.get_state()[1] == numpys).all()


def test_the_interval_covers_the_mean_of_a_skewed_law_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = mean_interval(rng.exponential(1, 40).tolist(), confidence=0.9, resamples=500)
        inside += low <= 1 <= high
    assert 0.80 <= inside / 200 <= 0.96


def test_groups_are_resampled_as_wholes():
    values = sample(2, 40)
    alone = mean_interval(values, resamples=4000)
    assert mean_interval(values, resamples=4000, groups=list(range(40))) == pytest.approx(alone, abs=1e-9)
    # Each image five times: with the copies as one group, the interval is that of the single images.
    copied = [value for value in values for _ in range(5)]
    groups = [index for index in range(40) for _ in range(5)]
    assert mean_interval(copied, resamples=4000, groups=groups) == pytest.approx(alone, abs=1e-9)
    low, high = mean_interval(copied, resamples=4000)
    assert high - low < 0.6 * (alone[1] - alone[0])
    # Groups of unlike size: the statistic is the mean over images, so a large group weighs more.
    low, high = mean_interval([0.0] * 9 + [1.0], groups=["a"] * 9 + ["b"])
    assert low >= 0 and high <= 1


def test_intervals_of_equal_values_and_bad_arguments():
    assert mean_interval([0.25] * 7) == (0.25, 0.25)
    assert mean_interval([-1.0]) == (-1.0, -1.0)
    assert mean_interval([1.0, 2.0, 3.0], groups=["a"] * 3) == (2.0, 2.0)
    low, high = mean_interval([0.0, 1e-3, 5.0], resamples=3)
    assert 0 <= low <= high <= 5
    with pytest.raises(UserError, match="no image"):
        describe_differences([])
    with pytest.raises(UserError, match="confidence=95"):
        mean_interval([1.0, 2.0], confidence=95)


def test_exact_signed_rank_law_by_enumeration():
    values = sample(12, 12)
    ranks = stats.rankdata(np.abs(values))
    positive = sum(r for r, v in zip(ranks, values, strict=True) if v > 0)
    least = min(positive, ranks.sum() - positive)
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in product((0, 1), repeat=12)]
    p = min(1.0, 2 * sum(total <= least for total in sums) / len(sums))
    assert signed_rank(values)[:2] == (pytest.approx(p, rel=1e-12), "exact")


@pytest.mark.parametrize("seed", range(4))
def test_normal_signed_rank_law_with_ties_and_zeros(seed):
    values = np.random.default_rng(seed).integers(-4, 6, 80).astype(float)
    moved = values[values != 0]
    ranks = stats.rankdata(np.abs(moved))
    size, (_, ties) = len(moved), np.unique(ranks, return_counts=True)
    variance = size * (size + 1) * (2 * size + 1) / 24 - (ties**3 - ties).sum() / 48
    z = (ranks[moved > 0].sum() - ranks.sum() / 2) / math.sqrt(variance)
    p, method, effect = signed_rank(values.tolist())
    assert method == "normal" and p == pytest.approx(2 * stats.norm.sf(abs(z)), rel=1e-9)
    assert effect == pytest.approx(2 * ranks[moved > 0].sum() / ranks.sum() - 1)


def test_effect_sizes():
    assert signed_rank([1.0, 2.0, 3.0])[2] == 1
    assert signed_rank([-1.0, -2.0])[2] == -1
    assert signed_rank([1.0, -2.0, 3.0, -4.0])[2] == pytest.approx((4 - 6) / 10)
    p, method, effect = signed_rank([0.0, 0.0])
    assert math.isnan(p) and effect == 0 and method == "none"
    assert all(map(math.isnan, mean_interval([])))
    assert describe_differences([1.0, 2.0, 3.0])["standardized_mean"] == pytest.approx(2.0)
    for values in ([1.0], [2.0, 2.0]):
        assert math.isnan(describe_differences(values)["standardized_mean"])


def test_harm_is_counted():
    found = describe_differences([-12.0, -6.0, -5.0, -1.5, -1.0, 0.0, 3.0, 40.0])
    assert found["harm"] == {"1": 4 / 8, "5": 2 / 8, "10": 1 / 8}
    assert (found["worst_loss"], found["best_gain"]) == (12, 40)
    only_gains = describe_differences([1.0, 2.0])
    assert only_gains["worst_loss"] == 0 and only_gains["harm"] == {"1": 0, "5": 0, "10": 0}


def put(folder, rule, counts, **changes):
    """Write a rule's files as test.py does; counts: (image, class) -> (intersection, predicted, actual)."""
    folder.mkdir(parents=True, exist_ok=True)
    dice = {}
    with open(folder / f"{rule}.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("image", "class", "intersection", "predicted", "actual", "dice", "iou"))
        for (image, c), (inter, predicted, actual) in counts.items():
            d = 2 * inter / (predicted + actual)
            dice.setdefault(image, []).append(d)
            writer.writerow((image, c, inter, predicted, actual, f"{d:.6f}", f"{d / (2 - d):.6f}"))
    mean = sum(sum(v) / len(v) for v in dice.values()) / len(dice)
    record = {"predictor": rule, "seed": 0, "checkpoint": {"sha256": "x"}, "classes": ["sky", "cat", "dog"]}
    record |= {"format": 1, "protocol": "corrected", "model": "tiny", "loss": "ce", "config_hash": "c"}
    record |= {"dataset": {"name": "drawn", "split": "test", "fingerprint": "f", "num_images": 4}}
    record |= {
        "scores": {"mean_dice": mean, "mean_iou": mean},
        "images": sorted({i for i, _ in counts}),
        **changes,
    }
    (folder / f"{rule}.json").write_text(json.dumps(record))


TRUTH = {("a", 0): (4, 8, 8), ("a", 1): (2, 4, 4), ("b", 0): (6, 8, 8), ("c", 0): (8, 8, 8)}
RIVAL = {
    ("a", 0): (6, 8, 8),
    ("a", 1): (2, 4, 4),
    ("b", 0): (5, 8, 8),
    ("c", 0): (8, 8, 8),
    ("d", 2): (0, 1, 0),
}


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "seed0" / "results"
    put(folder, "T", TRUTH, images=list("abcd"))
    put(folder, "rankdice", RIVAL, images=list("abcd"))
    return folder


def test_differences_by_hand(results):
    found = compare(read_rule(results, "T"), read_rule(results, "rankdice"))
    assert found["differences"] == pytest.approx([12.5, -12.5, 0.0])  # a: mean over two classes
    assert found["images"] == 3 and found["unpaired"] == 1  # d has a score under one rule only
    assert (found["better"], found["worse"], found["tied"]) == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert found["mean"] == pytest.approx(0) and found["median"] == pytest.approx(0)
    sky, cat, dog = found["classes"]
    assert sky["name"] == "sky" and sky["baseline"] == pytest.approx(75) and sky["images"] == 3
    assert sky["mean"] == pytest.approx((25 - 12.5 + 0) / 3)
    assert cat["mean"] == 0 and list(cat["interval"]) == [0, 0]
    assert dog["images"] == 0 and dog["unpaired"] == 1 and math.isnan(dog["mean"])


def test_iou_is_made_from_the_counts(results):
    values = read_rule(results, "T", "iou").by_image()
    assert values == pytest.approx({"a": (4 / 12 + 2 / 6) / 2, "b": 6 / 10, "c": 1})


def test_pair_keeps_the_order_and_counts_what_is_left_out():
    assert pair({"x": 1.0, "y": 2.0}, {"y": 5.0, "z": 0.0}) == ({"y": 3.0}, 2)


@pytest.mark.parametrize(
    "key, value",
    [("checkpoint", {"sha256": "y"}), ("protocol", "paper"), ("temperature", 2.0), ("images", ["a"])],
)
def test_rules_on_other_probabilities_are_rejected(results, key, value):
    put(results, "rankdice", RIVAL, **({"images": list("abcd")} | {key: value}))
    with pytest.raises(ValueError, match=f"same probabilities.*{key}"):
        compare(read_rule(results, "T"), read_rule(results, "rankdice"))


def test_bad_files_are_named(results):
    with pytest.raises(UserError, match=r"T, rankdice"):
        read_rule(results, "max")
    text = (results / "T.csv").read_text()
    (results / "T.csv").write_text(text + "a,0,4,8,8,0.5,0.3\n")
    with pytest.raises(ValueError, match=r"T\.csv.*class 0 occurs twice"):
        read_rule(results, "T")
    (results / "T.csv").write_text(text.replace("b,0,6,8,8", "b,0,9,8,8"))
    with pytest.raises(ValueError, match="intersection=9, predicted=8, actual=8"):
        read_rule(results, "T")
    (results / "T.csv").write_text(text.replace("b,0,6,8,8", "b,0,1,8,8"))
    with pytest.raises(ValueError, match=r"T\.csv: .*mean Dice is 0\.5417.* T\.json has 0\.7500"):
        read_rule(results, "T")
    (results / "T.csv").write_text("image,class\na,0\n")
    with pytest.raises(ValueError, match="no column or key"):
        read_rule(results, "T")


def test_command_line_prints_markdown_and_json(results, capsys):
    assert main([str(results.parent)]) == 0
    text = capsys.readouterr().out
    assert "rankdice − T, 0" in text and "+0.00 [" in text and "| sky |" in text and "left out: at most 1" in text
    assert main([str(results), "--json", "--rule", "rankdice"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["comparisons"]
    assert found["rule"] == "rankdice" and found["classes"][2]["mean"] is None


def test_seeds_are_summed_up_by_mean_and_range_not_pooled(results, tmp_path, capsys):
    other = tmp_path / "seed1" / "results"
    put(other, "T", TRUTH, images=list("abcd"), seed=1)
    better = {**TRUTH, ("b", 0): (8, 8, 8)}
    put(other, "rankdice", better, images=list("abcd"), seed=1)
    assert main([str(results), str(other)]) == 0
    text = capsys.readouterr().out
    assert "rankdice − T over 2 seeds: +4.17 points, range +0.00, +8.33." in text
    assert "2 p-values are not adjusted" in text
    assert "| sky | +6.25 | +4.17, +8.33 |" in text and "| dog | " not in text.partition("by class")[0]
    assert main([str(results), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (seeds,) = found["seeds"]
    assert seeds["seeds"] == [0, 1] and seeds["range"] == pytest.approx([0, 25 / 3])
    assert seeds["mean"] == pytest.approx(sum(one["mean"] for one in found["comparisons"]) / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"dataset": {"name": "drawn", "split": "test", "fingerprint": "g", "num_images": 4}},
            "data fingerprint f against g",
        ),
        ({"config_hash": "d"}, "configuration c against d"),
        ({"seed": 0}, "seed 0 occurs twice"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_have_no_mean(results, tmp_path, capsys, change, words):
    other = tmp_path / "seed1" / "results"
    for rule, counts in (("T", TRUTH), ("rankdice", RIVAL)):
        put(
            other,
            rule,
            counts,
            **({"images": list("abcd"), "seed": 1, "checkpoint": {"sha256": "y"}} | change),
        )
    assert main([str(results), str(other)]) == 0
    text = capsys.readouterr().out
    assert "rankdice − T: no mean over 2 runs" in text and words in text and "range" not in text


def test_other_networks_are_other_rows_not_other_seeds(results, tmp_path, capsys):
    other = tmp_path / "other" / "seed0" / "results"
    put(other, "T", TRUTH, images=list("abcd"), model="unet")
    put(other, "rankdice", RIVAL, images=list("abcd"), model="unet")
    assert main([str(results), str(other)]) == 0
    text = capsys.readouterr().out
    assert "| unet, ce: rankdice − T, 0 |" in text and "| tiny, ce: rankdice − T, 0 |" in text
    assert "seeds" not in text
    for rule, counts in (("T", TRUTH), ("rankdice", RIVAL)):
        fitted = {"temperature": 1.4, "temperature_fitted_on": "v"}
        put(results / "calibrated", rule, counts, images=list("abcd"), **fitted)
    assert main([str(results), str(results / "calibrated")]) == 0
    text = capsys.readouterr().out
    assert "| tiny, ce, calibrated: rankdice − T, 0 |" in text and "seeds" not in text
    assert exit_code(main, [str(results), str(results)]) == 2
    assert f"{results / 'rankdice.json'} is given twice" in capsys.readouterr().err
    assert main([str(results), str(results / "calibrated"), "--rule", "rankdice", "--rule", "rankdice"]) == 0


def test_paper_protocol_reads_its_own_folder(results, capsys):
    put(results / "paper", "T", TRUTH, images=list("abcd"), protocol="paper")
    put(results / "paper", "max", TRUTH, images=list("abcd"), protocol="paper")
    assert main([str(results.parent), "--protocol", "paper"]) == 0
    assert "max − T" in capsys.readouterr().out
    shutil.rmtree(results / "paper")
    for folder in (results, results.parent):
        assert exit_code(main, [str(folder), "--protocol", "paper"]) == 2
        error = capsys.readouterr().err
        assert "no scores of protocol=paper" in error or "no per-image scores" in error


@pytest.mark.parametrize(
    "arguments",
    [["absent"], ["{}", "--rule", "maxx"], ["{}", "--confidence", "95"], ["{}", "--resamples", "-1"]],
)
def test_bad_input_is_one_line_and_exit_code_two(results, capsys, arguments):
    assert exit_code(main, [a.format(results) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_a_folder_without_scores_has_a_remedy_that_works(results, tmp_path, capsys):
    def error(path, *more):
        assert exit_code(main, [str(path), *more]) == 2
        return capsys.readouterr().err

    assert f"{tmp_path}/absent does not exist" in error(tmp_path / "absent")
    (tmp_path / "tables.csv").write_text("a table of paper_tables.py\n")
    assert f"Fix: give one run, such as {results.parent}." in error(tmp_path)  # a folder of runs
    (tmp_path / "bare" / "results").mkdir(parents=True)
    for folder in (tmp_path / "bare", tmp_path / "bare" / "results"):
        assert "test.py" not in (text := error(folder)) and "Fix: give the folder of a scored run" in text
        (tmp_path / "bare" / "last.pth").touch()
        assert f"Fix: python test.py -r {tmp_path}/bare/last.pth." in error(folder)
        assert "last.pth protocol=paper" in error(folder, "--protocol", "paper")
        (tmp_path / "bare" / "last.pth").unlink()


def test_groups_from_a_file_or_a_pattern(tmp_path):
    images = ["p1_a.png", "p1_b.png", "=p2.png"]
    assert read_groups(r"(p\d)", images) == {"p1_a.png": "p1", "p1_b.png": "p1", "=p2.png": "p2"}
    assert set(read_groups(r"p\d", images).values()) == {"p1", "p2"}
    path = tmp_path / "groups.csv"
    path.write_text(csv_text([("image", "group"), *((image, "x") for image in images)]))
    assert read_groups(str(path), images) == dict.fromkeys(images, "x")
    path.write_text("image,patient\na,1\n")
    for text, words in (
        (str(path), "columns"),
        ("(", "regular expression"),
        ("p1", "1 of 3.*=p2.png"),
        ("(p1)?", "1 of 3"),
    ):
        with pytest.raises(UserError, match=words):
            read_groups(text, images)


def test_groups_widen_the_interval_on_the_command_line(tmp_path, capsys):
    folder = tmp_path / "seed0" / "results"
    images = [f"p{k // 4}_{k}" for k in range(40)]
    names = {"images": images}
    put(folder, "T", {(image, 0): (4, 8, 8) for image in images}, **names)
    put(folder, "rankdice", {(image, 0): (4 + (k // 4) % 3, 8, 8) for k, image in enumerate(images)}, **names)
    widths = []
    for more in ([], ["--group", r"p\d+"]):
        assert main([str(folder), "--json", *more]) == 0
        (found,) = json.loads(capsys.readouterr().out)["comparisons"]
        widths.append(found["interval"][1] - found["interval"][0])
    assert found["groups"] == 10 and widths[1] > 1.5 * widths[0]
    assert main([str(folder), "--group", r"p\d+"]) == 0
    assert "40 in 10 groups" in capsys.readouterr().out


def test_auto_keeps_a_sure_gain_and_avoids_a_sure_loss(tmp_path, capsys):
    """Images of 8 pixels: T hits 4, the better rule 6 or 5, the worse one 2 or 3; Dice is hits / 8."""
    folder = tmp_path / "seed0" / "results"
    images = [f"i{k:02d}" for k in range(40)]
    put(folder, "T", {(i, 0): (4, 8, 8) for i in images})
    put(folder, "max", {(i, 0): (4, 8, 8) for i in images})
    put(folder, "rankdice", {(i, 0): (2 + k % 2, 8, 8) for k, i in enumerate(images)})
    assert main([str(folder), "--auto", "5"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| drawn"))
    loss, gain, chosen = [cell.strip() for cell in row.split("|")[2:5]]
    assert -20 < float(loss) < -17 and (gain, chosen) == ("+0.00", "T 5")
    put(folder / "calibrated", "rankdice", {(i, 0): (6 - k % 2, 8, 8) for k, i in enumerate(images)})
    assert main([str(folder), "--auto", "5"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| drawn"))
    loss, gain, chosen = [cell.strip() for cell in row.split("|")[2:5]]
    assert 17 < float(gain) < 20 and chosen == "rankdice, calibrated 5"


def test_auto_rejects_options_that_it_does_not_use(results, capsys):
    for given in (["--json"], ["--rule", "rankdice"], ["--confidence", "0.9"]):
        assert exit_code(main, [str(results), "--auto", "5", *given]) == 2
        assert f"--auto does not use {given[0]}" in capsys.readouterr().err


def test_auto_names_the_rule_that_is_missing(results, capsys):
    assert exit_code(main, [str(results), "--auto", "5"]) == 2
    assert "max" in capsys.readouterr().err
