"""docs/configuration.md holds the files of configs/."""

from __future__ import annotations

from configs.compose import CONFIGS, GROUPS
from scripts import config_reference


def test_every_group_is_on_the_page_and_every_option_begins_with_a_comment() -> None:
    assert set(config_reference.GROUPS) >= set(GROUPS)
    for path in CONFIGS.rglob("*.yaml"):
        assert path.read_text(encoding="utf-8").startswith("# "), path
