"""The picture of a run: the text above its tiles, and their places."""

from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from scripts.overview import captions, headings, main, strip

HEADINGS = headings(0.3)


def test_captions_give_scores_in_percent_and_the_gain() -> None:
    dice = {"T": 43.7, "max": 44.8, "rankdice": 65.66}
    assert captions(0.95, dice) == [
        "95% quantile of the gain", "", "", "Dice 43.7", "Dice 44.8", "Dice 65.7 (+22.0)",
    ]  # fmt: skip
    assert captions(0.5, dice | {"rankdice": 43.2})[0] == "median gain"
    assert captions(0.5, dice | {"rankdice": 43.2})[-1] == "Dice 43.2 (-0.5)"


def test_headings_are_above_the_first_row_and_move_nothing() -> None:
    drawn = [torch.full((3, 20, 60), 10 * k, dtype=torch.uint8) for k in range(len(HEADINGS))]
    above = captions(0.5, {"T": 1, "max": 2, "rankdice": 3})
    plain, headed = strip(drawn, above), strip(drawn, above, HEADINGS)
    assert HEADINGS[3] == "threshold 0.3"
    assert plain.shape[2] == headed.shape[2] == 6 * 62  # each with a frame of a pixel
    assert headed.shape[1] > plain.shape[1]
    bottom = headed[:, -22:]
    assert torch.equal(bottom[:, :, 1:61], plain[:, -22:, 1:61])
    assert [int(bottom[0, 5, 62 * k + 30]) for k in range(6)] == [10 * k for k in range(6)]


def test_a_scale_of_zero_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["overview.py", "run", "--scale", "0"])
    with pytest.raises(UserError, match="--scale=0 is invalid"):
        main()
