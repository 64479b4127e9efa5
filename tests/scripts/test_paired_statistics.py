"""Paired statistics against scipy, against hand-made cases, and through the command line."""

from __future__ import annotations

import csv
import json
import math
import shutil
import sys

import numpy as np
import pytest
import torch

from scripts.paired.inference import average_ranks, bca_interval, bca_of_mean, standardized_mean, wilcoxon
from scripts.paired.scores import paired, read_rule
from scripts.paired.sweeps import sweep_of
from scripts.paired_statistics import compare, main

stats = pytest.importorskip("scipy.stats")


def sample(seed, size=60, skew=True):
    rng = np.random.default_rng(seed)
    return ((rng.exponential(1, size) if skew else rng.normal(0, 1, size)) - 0.7).tolist()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bca_interval_is_scipys_on_the_same_replicates(seed, confidence):
    values = np.array(sample(seed))
    theirs = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=2000,
        method="BCa",
        confidence_level=confidence,
        rng=np.random.default_rng(seed),
    )
    jackknife = torch.tensor((values.sum() - values) / (len(values) - 1))
    ours = bca_interval(values.mean(), torch.tensor(theirs.bootstrap_distribution), jackknife, confidence)
    assert ours == pytest.approx(tuple(theirs.confidence_interval), abs=1e-9)


def test_bca_of_mean_is_near_scipys_and_seeded():
    values = sample(1)
    ours = bca_of_mean(values, resamples=20_000, seed=3)
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    assert ours == pytest.approx(tuple(theirs), abs=0.02)
    assert (
        ours == bca_of_mean(values, resamples=20_000, seed=3) != bca_of_mean(values, resamples=20_000, seed=4)
    )


def test_the_bootstrap_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    bca_of_mean(sample(1), resamples=100)
    assert torch.equal(before, torch.get_rng_state())


def test_bca_covers_the_mean_of_a_skewed_law_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(200):
        low, high = bca_of_mean(rng.exponential(1, 40).tolist(), confidence=0.9, resamples=500)
        inside += low <= 1 <= high
    assert 0.80 <= inside / 200 <= 0.96


def test_bca_of_equal_values_is_that_value():
    assert bca_of_mean([0.25] * 7) == (0.25, 0.25)
    assert bca_of_mean([-1.0]) == (-1.0, -1.0)
    with pytest.raises(ValueError, match="at least one difference"):
        bca_of_mean([])
    with pytest.raises(ValueError, match="confidence=95"):
        bca_of_mean([1.0, 2.0], confidence=95)


@pytest.mark.parametrize("size", [1, 2, 5, 12, 50])
def test_exact_wilcoxon_is_scipys(size):
    values = sample(size, size)
    ours, theirs = wilcoxon(values), stats.wilcoxon(values, method="exact")
    assert ours.method == "exact"
    assert (ours.statistic, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_normal_wilcoxon_with_ties_and_zeros_is_scipys(seed):
    values = np.random.default_rng(seed).integers(-4, 6, 80).astype(float).tolist()
    ours = wilcoxon(values)
    theirs = stats.wilcoxon(values, method="asymptotic", zero_method="wilcox", correction=False)
    assert ours.method == "normal" and ours.nonzero == sum(v != 0 for v in values)
    assert (ours.statistic, ours.p) == pytest.approx((theirs.statistic, theirs.pvalue), rel=1e-12)


def test_effect_sizes():
    assert wilcoxon([1.0, 2.0, 3.0]).rank_biserial == 1
    assert wilcoxon([-1.0, -2.0]).rank_biserial == -1
    assert wilcoxon([1.0, -2.0, 3.0, -4.0]).rank_biserial == pytest.approx((4 - 6) / 10)
    none = wilcoxon([0.0, 0.0])
    assert math.isnan(none.p) and none.rank_biserial == 0 and none.nonzero == 0
    assert standardized_mean([1.0, 2.0, 3.0]) == pytest.approx(2.0)
    assert math.isnan(standardized_mean([1.0])) and math.isnan(standardized_mean([2.0, 2.0]))


def test_ranks_are_scipys():
    values = np.random.default_rng(0).integers(0, 9, 40).astype(float).tolist()
    assert average_ranks(values) == stats.rankdata(values).tolist()


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


def test_paired_keeps_the_order_and_counts_what_is_left_out():
    assert paired({"x": 1.0, "y": 2.0}, {"y": 5.0, "z": 0.0}) == ([3.0], 2)


@pytest.mark.parametrize(
    "key, value",
    [("checkpoint", {"sha256": "y"}), ("protocol", "paper"), ("temperature", 2.0), ("images", ["a"])],
)
def test_rules_on_other_probabilities_are_refused(results, key, value):
    put(results, "rankdice", RIVAL, **({"images": list("abcd")} | {key: value}))
    with pytest.raises(ValueError, match=f"same probabilities.*{key}"):
        compare(read_rule(results, "T"), read_rule(results, "rankdice"))


def test_bad_files_are_named(results):
    with pytest.raises(FileNotFoundError, match=r"rules scored there: T, rankdice"):
        read_rule(results, "max")
    text = (results / "T.csv").read_text()
    (results / "T.csv").write_text(text + "a,0,4,8,8,0.5,0.3\n")
    with pytest.raises(ValueError, match=r"T\.csv.*class 0 is there twice"):
        read_rule(results, "T")
    (results / "T.csv").write_text(text.replace("b,0,6,8,8", "b,0,9,8,8"))
    with pytest.raises(ValueError, match="impossible counts 9, 8, 8"):
        read_rule(results, "T")
    (results / "T.csv").write_text(text.replace("b,0,6,8,8", "b,0,1,8,8"))
    with pytest.raises(ValueError, match=r"mean Dice is .* says"):
        read_rule(results, "T")
    (results / "T.csv").write_text("image,class\na,0\n")
    with pytest.raises(ValueError, match="no column or key"):
        read_rule(results, "T")


def test_command_line_prints_markdown_and_json(results, capsys):
    assert main([str(results.parent)]) == 0
    text = capsys.readouterr().out
    assert (
        "rankdice − T, 0" in text
        and "+0.00 [" in text
        and "| sky |" in text
        and "left out: at most 1" in text
    )
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
        ({"seed": 0}, "seed 0 is there twice"),
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
    assert main([str(results), str(results)]) == 2
    assert "a run is given twice" in capsys.readouterr().err


def test_paper_protocol_reads_its_own_folder(results, capsys):
    put(results / "paper", "T", TRUTH, images=list("abcd"), protocol="paper")
    put(results / "paper", "max", TRUTH, images=list("abcd"), protocol="paper")
    assert main([str(results.parent), "--protocol", "paper"]) == 0
    assert "max − T" in capsys.readouterr().out
    shutil.rmtree(results / "paper")
    for folder in (results, results.parent):
        assert main([str(folder), "--protocol", "paper"]) == 2
        error = capsys.readouterr().err
        assert "no scores of protocol=paper" in error or "holds no per-image scores" in error


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], ["{}", "--rule", "maxx"], ["{}", "--confidence", "95"], ["{}", "--resamples", "-1"]],
)
def test_bad_input_is_one_line_and_exit_code_two(results, capsys, arguments):
    assert main([a.format(results) for a in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_plot_is_drawn(results, tmp_path):
    pytest.importorskip("matplotlib")
    assert main([str(results), "--plot", str(tmp_path / "p.png"), "--resamples", "200"]) == 0
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_the_plot_has_thresholds_where_a_report_measured_them(results, tmp_path, capsys):
    plt = pytest.importorskip("matplotlib.pyplot")
    pair = [read_rule(results, rule) for rule in ("T", "rankdice")]
    sweep, why = sweep_of(*pair)
    assert sweep is None and "report.json does not exist" in why and "python scripts/report.py" in why

    of = {"checkpoint": "x", "protocol": "corrected", "split": "test"}
    report = {"of": of, "threshold": {"at 0.1": 0.6, "at 0.5": 0.7}, "cutoffs": [0.2, 0.3, 0.3]}
    path = results.parent / "report" / "report.json"
    path.parent.mkdir()
    path.write_text(json.dumps(report))
    sweep, why = sweep_of(*pair)
    assert not why and sweep.curve == [(0.1, 60.0), (0.5, 70.0)] and sweep.cutoffs == [0.2, 0.3, 0.3]
    by_image = {rule.rule: 100 * sum(rule.by_image().values()) / len(rule.by_image()) for rule in pair}
    assert sweep.levels == pytest.approx(by_image)

    drawn = []
    plt.close, closed = drawn.append, plt.close
    try:
        assert main([str(results), "--plot", str(tmp_path / "p.png"), "--resamples", "200"]) == 0
    finally:
        plt.close = closed
    (_, _, third, behind) = drawn[0].axes
    assert third.get_xlabel() == "threshold; cut-off" and list(third.lines[0].get_ydata()) == [60, 70]
    assert sum(bar.get_height() for bar in behind.patches) == 3
    assert "no panel" not in capsys.readouterr().err

    for text, reason in (
        (json.dumps({**report, "of": {**of, "checkpoint": "y"}}), "of another checkpoint"),
        ("{", "cannot be read"),
    ):
        path.write_text(text)
        assert reason in sweep_of(*pair)[1]
    assert main([str(results), "--plot", str(tmp_path / "p.png"), "--resamples", "200"]) == 0
    assert "no panel of thresholds" in capsys.readouterr().err


def test_missing_matplotlib_names_the_remedy(results, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(results), "--plot", str(tmp_path / "p.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
