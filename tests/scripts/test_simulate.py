"""The simulated examples: their probabilities by formula, their Dice by hand, RankDice never behind."""

from __future__ import annotations

import itertools

import pytest
import torch

from scripts.simulate import (
    EXAMPLES,
    THRESHOLDS,
    block,
    dice_of_draws,
    exponential,
    linear,
    main,
    random_block,
    simulate,
    truncated_normal,
)
from tests.exits import exit_code

stats = pytest.importorskip("scipy.stats")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_patterns_by_their_formulas():
    for i, j in itertools.product(range(7), range(7)):
        assert exponential(7, 1.05)[i, j] == pytest.approx(1.05 ** -(i + j))
        assert linear(7, 2.0)[i, j] == pytest.approx(max(0, 1 - 2 * (i + j) / 14))


def test_background_is_the_truncated_normal():
    values = truncated_normal((200, 200), 0.1, seeded()).flatten()
    law = stats.truncnorm(-1, 9, loc=0.1, scale=0.1)
    assert stats.kstest(values.numpy(), law.cdf).pvalue > 0.01
    assert values.min() >= 0 and values.max() <= 1 and (values == 0).sum() == 0  # truncated, not clipped


def test_blocks_are_where_they_should_be():
    probs = block(20, 10, 0, 0, 0.1, seeded())
    assert probs[:10, :10].min() >= 0.5 and probs[10:].mean() < 0.2
    for seed in range(20):
        inside = random_block(64, seeded(seed)) >= 0.5
        rows, columns = ((inside.sum(d) >= 4).nonzero() for d in (1, 0))  # noise reaches 1/2 now and then
        side = int(rows.max() - rows.min()) + 1
        assert side == int(columns.max() - columns.min()) + 1 and 6 <= side <= 32


def test_dice_of_draws_has_the_expected_mean():
    probs = torch.tensor([[0.9, 0.4], [0.2, 0.0]], dtype=torch.float64)
    masks = [probs >= 0.5, probs >= 0.3, probs > 1]
    found = dice_of_draws(probs, masks, 40_000, seeded())
    assert found.shape == (40_000, 3)
    for index, mask in enumerate(masks):
        exact = 0.0
        for labels in itertools.product((0, 1), repeat=4):
            chance, hits = 1.0, 0
            for p, y, m in zip(probs.flatten().tolist(), labels, mask.flatten().tolist(), strict=True):
                chance *= p if y else 1 - p
                hits += y * m
            total = int(mask.sum()) + sum(labels)
            exact += chance * (2 * hits / total if total else 0)
        assert found[:, index].mean().item() == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("example", EXAMPLES)
def test_rankdice_is_never_clearly_behind_a_fixed_threshold(example):
    for row in simulate(example, sizes=(28,), images=8, draws=50):
        mean, error = row.gain
        assert mean > -4 * error - 1e-9, row
        assert all(0 <= dice <= 100 for dice, _ in row.dice.values())


def test_no_single_threshold_reaches_rankdice_in_example_2():
    (row,) = simulate("thresholds", images=30, draws=20)
    assert [f"T {at:g}" for at in THRESHOLDS] == list(row.dice)[:9] and row.size == 64
    best = max(row.dice[f"T {at:g}"][0] for at in THRESHOLDS)
    assert row.dice["RankDice"][0] > best
    low, mean, high = row.cutoffs
    assert low < mean < high


def test_a_seed_gives_the_same_table_regardless_of_other_examples(capsys):
    arguments = ["--sizes", "28", "--images", "3", "--draws", "5"]
    assert main(["step", *arguments]) == 0
    alone = capsys.readouterr().out
    assert main(["exponential", "step", *arguments]) == 0
    assert capsys.readouterr().out.endswith(alone)
    assert main(["step", *arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out != alone
    assert alone.count("\n") == 8  # a title, a blank, two head lines, four settings


def test_the_document_shows_what_is_printed(root, capsys):
    assert main(["exponential", "--sizes", "28"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| b = ")]
    shown = (root / "docs" / "simulations.md").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 3 and set(rows) <= set(shown)


@pytest.mark.parametrize("arguments", [["steps"], ["step", "--draws", "1"], ["linear", "--sizes", "0"]])
def test_bad_input_is_one_line_and_exit_code_two(arguments, capsys):
    assert exit_code(main, arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1


def test_heat_maps_are_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert main(["exponential", "--sizes", "28", "--draws", "2", "--heatmaps", str(tmp_path / "figures")]) == 0
    assert (tmp_path / "figures" / "simulate_exponential.png").read_bytes()[:4] == b"\x89PNG"
