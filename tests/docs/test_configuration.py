"""docs/configuration.md says what configs/ says, and configs/ explains itself."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from configs.compose import GROUPS
from scripts import config_reference as page


def test_the_page_in_git_is_fresh(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert page.main(["--check"]) == 0, capsys.readouterr().err


def test_every_group_of_the_default_configuration_is_on_it() -> None:
    assert set(page.GROUPS) == set(GROUPS)
    text = page.reference()
    for group in GROUPS:
        for path in (page.CONFIGS / group).rglob("*.yaml"):
            assert f"`{path.stem}`" in text, path


def test_values_are_those_that_yaml_reads() -> None:
    for path in page.CONFIGS.rglob("*.yaml"):
        loaded = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        for key in page.read_option(path, page.CONFIGS).keys:
            if key.name.split(".")[0] in ("defaults", "hydra"):  # Hydra's own are not on the page
                continue
            value = loaded
            for part in key.name.split("."):
                value = value[part]
            assert yaml.safe_load(key.value) == value, (path, key)


def test_comments_and_values_of_every_shape(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(
        "# @package _global_\n# Says what\n# it is.\n#   a command\n"
        "_target_: a.B\nplain: 1  # first\nempty:\nhash: 'a # b'   # second\nlist: [1,\n  2]  # third\n"
        "nested:\n  link: ${x}\n  own: {a: 1}   # fourth\n"
    )
    option = page.read_option(tmp_path / "one.yaml", tmp_path)
    assert (option.name, option.summary, option.target) == ("one", "Says what it is.", "a.B")
    found = {key.name: (key.value, key.comment) for key in option.keys}
    assert found["plain"] == ("1", "first") and found["hash"] == ("'a # b'", "second")
    assert found["list"][1] == "third" and found["nested.own"] == ("{a: 1}", "fourth")
    assert found["nested.link"] == ("${x}", "")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: (c / "trainer/default.yaml").write_text("# Says.\nnew: 1\n"), "trainer.*new.*no comment"),
        (lambda c: (c / "loss/bce.yaml").write_text("name: bce\n"), "loss/bce.yaml says nothing"),
        (lambda c: (c / "novel").mkdir() or (c / "novel/a.yaml").write_text("# A.\n"), "configs/novel"),
        (
            lambda c: (c / "experiment/smoke.yaml").write_text("# Claim: x\nseed: 1\n"),
            "lacks Claim: or Command:",
        ),
    ],
    ids=["key", "option", "group", "recipe"],
)
def test_what_is_not_explained_is_refused(change, words, tmp_path: Path, capsys) -> None:
    configs = shutil.copytree(
        page.CONFIGS, tmp_path / "configs", ignore=shutil.ignore_patterns("*.py", "__*")
    )
    change(configs)
    assert page.main([], tmp_path / "page.md", configs) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: ") and len(error.splitlines()) == 1 and not (tmp_path / "page.md").exists()
    )
    assert re.search(words, error), error


def test_check_names_a_stale_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "page.md"
    assert page.main(["--check"], target) == page.STALE and not target.exists()
    assert "stale: page.md" in capsys.readouterr().err
    assert page.main([], target) == 0 and page.main(["--check"], target) == 0
    target.write_text(target.read_text() + "by hand\n")
    assert page.main(["--check"], target) == page.STALE
